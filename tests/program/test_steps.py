"""Programs and their text form."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.execute.programs import legal_programs
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.build import build
from weft.program.steps import Kind, Lane, Program, ProgramError, Step, decoder_stages
from weft.program.strategy import Strategy

TEXT = """\
compute  L3.attention  0:512
reduce   L3.attention  0:512
compute  L3.attention  512:1024
compute  L3.mlp        0:256      after reduce L3.attention 0:512
"""


def test_reads_the_text_of_the_design() -> None:
    program = Program.parse(TEXT)
    assert program.steps[1] == Step(Kind.REDUCE, "L3.attention", Rows(0, 512))
    assert program.steps[3].after == (1,)
    assert program.steps[3].lane is Lane.COMPUTE


def test_comments_and_blank_lines_are_ignored() -> None:
    commented = "# a program\n\n" + TEXT.replace("0:512\n", "0:512  # first half\n", 1)
    assert Program.parse(commented) == Program.parse(TEXT)


@settings(max_examples=60, deadline=None)
@given(program=legal_programs(decoder_stages(2)))
def test_text_round_trips(program: Program) -> None:
    assert Program.parse(str(program)) == program


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso:2/4", "iso@3,9/5", "tiles:4", "requests", "iso+rs"])
def test_text_of_built_programs_round_trips(strategy: str) -> None:
    batch = Batch((Segment(0, 0, 10), Segment(1, 4, 7)))
    program = build(Strategy.parse(strategy), decoder_stages(3), batch)
    assert Program.parse(str(program)) == program
    assert str(Program.parse(str(program))) == str(program)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("compute L0.mlp", "line 1: 'compute L0.mlp' is not a step"),
        (
            "dance L0.mlp 0:4",
            "unknown kind 'dance'; known are compute, body, tail, enter, reduce, reduce_scatter, all_gather, gather",
        ),
        ("compute L0.mlp 4:4", "rows 4:4 are empty"),
        ("compute L0.mlp 0:4\ncompute L0.mlp 0:4", "line 2: the program already has"),
        ("compute L0.mlp 0:4 after reduce L0.attention 0:4", "does not stand before it"),
        ("compute L0.mlp 0:4 after", "is not a step"),
    ],
)
def test_what_is_no_program_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ProgramError) as caught:
        Program.parse(text)
    assert complaint in str(caught.value)


def test_stages_of_a_decoder() -> None:
    stages = decoder_stages(2)
    assert [stage.name for stage in stages] == ["embed", "L0.attention", "L0.mlp", "L1.attention", "L1.mlp", "head"]
    assert [stage.ordered for stage in stages] == [False, True, False, True, False, False]
    assert stages[1].part == "attention"


def test_which_collectives_are_awaited_next() -> None:
    batch, stages = one_prompt(8), decoder_stages(1)
    serial, iso = (build(Strategy.parse(name), stages, batch) for name in ("serial", "iso:2"))
    assert serial.awaited_next == {i for i, step in enumerate(serial) if step.lane is Lane.NETWORK}
    # With two chunks, only the last collectives before the head have nothing left to hide behind.
    assert {iso.steps[i].name for i in iso.awaited_next} == {"reduce L0.mlp 4:8", "gather head 0:8"}
