"""Legality: every rule refuses a program that breaks it, and lets the others pass."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.execute.programs import SEGMENTS, lagging, legal_programs
from tests.outlines import decoder_outline
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.steps import Block, Form, Program, ProgramError
from weft.program.strategy import Strategy
from weft.program.text import parse, write

OUTLINE = decoder_outline(1)
GOOD = """\
compute  embed         0:8
compute  L0.attention  0:4
reduce   L0.attention  0:4
compute  L0.attention  4:8
reduce   L0.attention  4:8
body     L0.mlp        0:4  after reduce L0.attention 0:4
tail     L0.mlp        0:4
reduce   L0.mlp        0:4
compute  L0.mlp        4:8  after reduce L0.attention 4:8
reduce   L0.mlp        4:8
compute  head          0:8  wanted  after reduce L0.mlp 4:8
gather   head          0:8  wanted
"""


def test_a_good_program_passes() -> None:
    # The head waits for the last collective only: the network lane runs in order, so the first has arrived too.
    check(parse(GOOD), OUTLINE, one_prompt(8))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  after reduce L0.attention 0:4", "", "not after everything that L0.attention leaves"),
        ("wanted  after reduce L0.mlp 4:8", "wanted  after reduce L0.mlp 0:4", "not after everything that L0.mlp"),
        ("compute  L0.attention  4:8\nreduce   L0.attention  4:8\n", "", "not a step|does not stand before"),
        ("tail     L0.mlp        0:4\n", "", "no single partial holds these rows"),
        ("tail     L0.mlp        0:4\n", "tail     L0.mlp        2:6\n", "no body of these rows"),
        ("reduce   L0.mlp        0:4\n", "reduce   L0.mlp        0:8\n", "no single partial"),
        ("reduce   L0.mlp        0:4\n", "reduce   L0.mlp        0:3\n", "not after everything"),
        ("gather   head          0:8  wanted\n", "", "head: not all of the rows 0:8"),
        ("gather   head          0:8  wanted\n", "reduce   head          0:8  wanted\n", "this stage ends in gather"),
        ("compute  embed         0:8\n", "body     embed         0:8\n", "only a stage that ends in a reduce"),
        ("compute  L0.mlp        4:8", "compute  L0.mlp        3:8", "some of these rows were done before"),
        ("compute  L0.mlp        4:8", "compute  L0.dance      4:8", "no such stage"),
        ("compute  L0.mlp        4:8", "compute  L0.mlp        4:9", "the batch has only the rows 0:8"),
        ("compute  head          0:8", "compute  head          4:8", "this stage runs once"),
        ("head          0:8  wanted", "head          0:8", "from head on, all steps are about wanted rows only"),
        (
            "compute  L0.mlp        4:8",
            "compute  L0.mlp        4:8  wanted",
            "from L0.mlp on, all",
        ),
        ("reduce   L0.mlp        4:8", "reduce   L0.mlp        4:8  on compute", "collectives on another"),
        (
            "reduce   L0.mlp        4:8",
            "reduce   L0.mlp        4:8  as int3",
            "wires are exact, bf16",
        ),
        ("reduce   L0.mlp        4:8", "reduce   L0.mlp        4:8  by magic", "travels in a way that is not known"),
        ("gather   head          0:8", "gather   head          0:8  as bf16", "a wire is a sum's or an all_gather's"),
        ("compute  L0.mlp        4:8", "compute  L0.mlp        4:8  by one-shot", "an algorithm a reduce's"),
    ],
)
def test_each_rule(old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    with pytest.raises(ProgramError, match=complaint):
        check(parse(GOOD.replace(old, new, 1)), OUTLINE, one_prompt(8))


SCATTERED = """\
compute         embed         0:8
compute         L0.attention  0:8
reduce_scatter  L0.attention  0:4
reduce_scatter  L0.attention  4:8
enter           L0.mlp        0:4  after reduce_scatter L0.attention 0:4
all_gather      L0.mlp        0:4
enter           L0.mlp        4:8  after reduce_scatter L0.attention 4:8
all_gather      L0.mlp        4:8
compute         L0.mlp        0:8  after all_gather L0.mlp 4:8
reduce_scatter  L0.mlp        0:4
reduce_scatter  L0.mlp        4:8
enter           head          0:4  after reduce_scatter L0.mlp 0:4
all_gather      head          0:4
enter           head          4:8  after reduce_scatter L0.mlp 4:8
all_gather      head          4:8
compute         head          0:8  wanted  after all_gather head 0:4, all_gather head 4:8
gather          head          0:8  wanted
"""


def test_scattered_sums_pass() -> None:
    check(parse(SCATTERED), OUTLINE, one_prompt(8))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  after reduce_scatter L0.attention 4:8", "", "not after everything that L0.attention leaves"),
        ("  after all_gather L0.mlp 4:8", "", "not after an all_gather of everything in its rows"),
        ("reduce_scatter  L0.mlp        0:4\n", "reduce  L0.mlp  0:4\nEND", "each rank has its part of the rows 0:4"),
        (
            "reduce_scatter  L0.mlp        0:4\nreduce_scatter  L0.mlp        4:8\n",
            "reduce_scatter  L0.mlp  0:8\nEND",
            "each rank has its part of the rows 0:4",
        ),
        (
            "enter           L0.mlp        0:4", "enter  L0.mlp  0:3 after reduce_scatter L0.attention 0:4\nEND",
            "no reduce_scatter of just these",
        ),
        ("all_gather      L0.mlp        0:4", "all_gather      L0.mlp        0:3\nEND", "no enter of just these rows"),
        ("all_gather      L0.mlp        4:8", "reduce_scatter  head  0:8  wanted\nEND", "head 0:8.*ends in gather"),
        ("compute         head", "enter           L0.mlp  0:4\ncompute         head", "the program already has"),
        ("reduce_scatter  L0.attention  4:8\n", "reduce  L0.attention  4:8\n", "does not stand before"),
    ],
)  # fmt: skip
def test_each_rule_of_scattered_sums(old: str, new: str, complaint: str) -> None:
    assert old in SCATTERED
    with pytest.raises(ProgramError, match=complaint):
        check(parse(SCATTERED.replace(old, new, 1).partition("END")[0]), OUTLINE, one_prompt(8))


def test_a_stage_is_gathered_whole_or_not_at_all() -> None:
    """Rows 4:8 were summed everywhere, and the stage takes its input from all_gathers."""
    mixed = SCATTERED.replace("reduce_scatter  L0.attention  4:8\n", "reduce          L0.attention  4:8\n")
    mixed = mixed.replace("enter           L0.mlp        4:8  after reduce_scatter L0.attention 4:8\n", "")
    mixed = mixed.replace("all_gather      L0.mlp        4:8\n", "").replace(
        "L0.mlp 4:8\nreduce_s", "L0.mlp 0:4\nreduce_s"
    )
    with pytest.raises(ProgramError, match=r"compute L0.mlp 0:8.*not after an all_gather"):
        check(parse(mixed), OUTLINE, one_prompt(8))


def test_chunks_of_one_sequence_keep_their_order() -> None:
    lines = GOOD.splitlines(keepends=True)
    swapped = "".join([lines[0], *lines[3:5], *lines[1:3], *lines[5:]])
    with pytest.raises(ProgramError, match=r"earlier rows of the same sequence \(0:4\) come later"):
        check(parse(swapped), OUTLINE, one_prompt(8))


def test_sequences_may_come_in_any_order() -> None:
    lines = GOOD.splitlines(keepends=True)
    swapped = "".join([lines[0], *lines[3:5], *lines[1:3], *lines[5:]])
    check(parse(swapped), OUTLINE, Batch((Segment(0, 0, 4), Segment(1, 0, 4))))


@settings(max_examples=100, deadline=None)
@given(program=legal_programs(decoder_outline(2)))
def test_random_legal_programs_pass(program: Program) -> None:
    check(program, decoder_outline(2), Batch(SEGMENTS))


@settings(max_examples=60, deadline=None)
@given(program=legal_programs(decoder_outline(2)))
def test_without_its_last_edges_a_program_is_refused(program: Program) -> None:
    """The head's edges include one to the last collective, which nothing else waits for."""
    [block] = program.form.blocks
    steps = tuple(step._replace(after=()) if step.part == "head" else step for step in block.steps)
    with pytest.raises(ProgramError, match="(compute|enter) head"):
        check(Program(Form((Block(steps),), program.form.chunks), program.offsets), decoder_outline(2), Batch(SEGMENTS))


ROUNDS = write(build(Strategy.parse("iso:2"), decoder_outline(80), one_prompt(1024)))


def test_rounds_that_repeat_are_proven_without_going_through_them() -> None:
    check(parse(ROUNDS), decoder_outline(80), one_prompt(1024))
    begin = time.process_time()
    check(parse(ROUNDS.replace("78x", "9998x").replace("L79", "L9999").replace("L78", "L9998")),
          decoder_outline(10_000), one_prompt(1024))  # fmt: skip
    assert time.process_time() - begin < 3  # decoder_outline and names take most of it


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("compute  L1.attention   b    after reduce L0.mlp b", "compute L1.attention b", "L1.attention 512.*not after"),
        ("compute  L1.mlp         b    after reduce L1.attention b", "compute  L1.mlp  b", "L1.mlp 512.*not after"),
        ("reduce   L1.mlp         b\n", "", "what compute L1.attention waits for.*elsewhere"),
        ("78x", "77x", "does not stand before"),
        ("78x", "79x", "already has the step"),
        ("78x\n", "39x by 2 layers\n", "does not stand before|elsewhere in round"),
        ("L79.mlp        a    wanted", "L79.mlp        a", "from L79.attention on, all steps are about wanted rows"),
        ("compute  L1.attention   a", "compute  L1.attention   a  wanted", "about wanted rows|remembers all rows"),
    ],
)  # fmt: skip
def test_each_rule_holds_in_every_round(old: str, new: str, complaint: str) -> None:
    assert old in ROUNDS
    with pytest.raises(ProgramError, match=complaint):
        check(parse(ROUNDS.replace(old, new, 1)), decoder_outline(80), one_prompt(1024))


def test_a_model_of_fewer_or_more_layers_is_told_apart() -> None:
    for layers in (79, 81):
        with pytest.raises(ProgramError, match="no such stage|not all of the rows|not after everything"):
            check(parse(ROUNDS), decoder_outline(layers), one_prompt(1024))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), lags=st.sampled_from([(0, 1), (1, 1)]))
def test_programs_of_models_whose_stages_go_without_sums(data: st.DataObject, lags: tuple[int, int]) -> None:
    outline = lagging(decoder_outline(3), *lags)
    check(data.draw(legal_programs(outline)), outline, Batch(SEGMENTS))
