"""Programs and their text form."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.execute.programs import lagging, legal_programs
from tests.outlines import decoder_outline
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.stages import COMPUTE, NETWORK, Kind
from weft.program.steps import Program, ProgramError, Step
from weft.program.strategy import Strategy
from weft.program.text import parse, write, write_expanded

TEXT = """\
compute  L3.attention  0:512
reduce   L3.attention  0:512
compute  L3.attention  512:1024
compute  L3.mlp        0:256      after reduce L3.attention 0:512
"""


def test_reads_the_text_of_the_design() -> None:
    program = parse(TEXT)
    second, last = list(program)[1::2]
    assert second.step == Step(Kind.REDUCE, "attention", 3, 0) and second.rows == Rows(0, 512)
    assert second.stage == "L3.attention" and second.lane == NETWORK
    assert last.after == (1,) and last.lane == COMPUTE


def test_comments_and_blank_lines_are_ignored() -> None:
    commented = "# a program\n\n" + TEXT.replace("0:512\n", "0:512  # first half\n", 1)
    assert parse(commented) == parse(TEXT)


@settings(max_examples=60, deadline=None)
@given(program=legal_programs(decoder_outline(2)))
def test_text_round_trips(program: Program) -> None:
    assert parse(write(program)) == program


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso:2/4", "iso@3,9/5", "tiles:4", "requests", "iso+rs"])
def test_text_of_built_programs_round_trips(strategy: str) -> None:
    batch = Batch((Segment(0, 0, 10), Segment(1, 4, 7)))
    program = build(Strategy.parse(strategy), decoder_outline(3), batch)
    assert parse(write(program)) == program
    assert write(parse(write(program))) == write(program)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("compute L0.mlp", "line 1: 'compute L0.mlp' is not a step"),
        ("compute 3L.mlp 0:4", "'3L.mlp' is not a stage"),
        ("compute L0.mlp a", "'a' is no chunk; name its rows, or its letter in a line 'chunks a 0:512'"),
        ("chunks a", "chunks are a letter and rows each"),
        ("chunks a 0-4", "'0-4' are no rows"),
        ("compute L0.mlp 0:4 wnted", "'wnted' is nothing that a step says; after its chunk may stand: wanted, on …"),
        ("0x\ncompute L0.mlp 0:4", "once at least, 1x"),
        ("2x by 0 layers\ncompute L0.mlp 0:4", "once at least, 1x"),
        (f"compute embed 0:{'9' * 5000}", "is no chunk"),
        (f"compute L{'9' * 5000}.mlp 0:4", "not a stage"),
        (f"{'9' * 5000}x", "not a step"),
        ("chunks 0:4 4:8\ncompute embed 0:4", "no name for a chunk"),
        ("compute embed 0:4 for 0,3-2", "don't rise"),
        ("compute embed 0:4 for 0 for 1", "said twice"),
        ("compute embed 0:4\n2x\ncompute L0.mlp 0:4 after compute embed 0:4", "stands elsewhere in round 2"),
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
        parse(text)
    assert complaint in str(caught.value)


def test_stages_of_a_decoder() -> None:
    outline = decoder_outline(2)
    names = ["embed", "L0.attention", "L0.mlp", "L1.attention", "L1.mlp", "head"]
    assert [stage.name for stage in outline.stages] == names
    assert [stage.ordered for stage in outline.stages] == [False, True, False, True, False, False]
    assert [outline.place(stage.part, stage.layer) for stage in outline.stages] == list(range(6))
    assert outline.place("mlp", 2) is None and outline.place("mlp", None) is None and outline.place("head", 0) is None
    assert outline.readers == (1, 2, 3, 4, 5, None) and outline.narrow_from == 3
    assert lagging(outline, 0, 1).readers == (1, 3, 3, 5, 5, None)
    assert lagging(outline, 1, 1).of(3).readers == (1, 3, 4, 5, 6, 7, 7, None)


@pytest.mark.parametrize("layers", [1, 3, 20])
def test_which_collectives_are_awaited_next(layers: int) -> None:
    batch, outline = one_prompt(8), decoder_outline(layers)
    serial, iso = (build(Strategy.parse(name), outline, batch) for name in ("serial", "iso:2"))
    assert urgent(serial) == {step.name for step in serial if step.lane == NETWORK}
    # With two chunks, only the last collectives before the head have nothing left to hide behind.
    assert urgent(iso) == {f"reduce L{layers - 1}.mlp 4:8", "gather head 0:8"}


def urgent(program: Program) -> set[str]:
    flags = [
        flag
        for block, (between, last) in zip(program.form.blocks, program.form.urgent(0), strict=True)
        for flag in (*(between * (block.rounds - 1)), *last)
    ]
    return {step.name for step, flag in zip(program, flags, strict=True) if flag}


@pytest.mark.parametrize("text", ["", "5x", "compute embed 1:4"])
def test_what_has_no_steps_or_not_all_rows_is_refused(text: str) -> None:
    with pytest.raises(ProgramError, match="no steps, or its rows"):
        check(parse(text), decoder_outline(2), one_prompt(4))


def test_chunks_beyond_the_offsets_are_refused() -> None:
    program = build(Strategy.parse("iso:2"), decoder_outline(2), one_prompt(64))
    with pytest.raises(ProgramError, match="between offsets that the program doesn't have"):
        check(Program(program.form, (0, 64)), decoder_outline(2), one_prompt(64))


def test_more_chunks_than_letters() -> None:
    program = build(Strategy.parse("iso:64"), decoder_outline(8), one_prompt(640))
    assert parse(write(program)) == program and "z1 " in write(program)


def test_expanded_text_says_the_same() -> None:
    program = build(Strategy.parse("iso:3+ahead"), decoder_outline(30), one_prompt(900))
    again = parse(write_expanded(program))
    assert [(step.name, step.after, step.step.wanted) for step in again] == [
        (step.name, step.after, step.step.wanted) for step in program
    ]
    assert write_expanded(again) == write_expanded(program)
