"""Legality: every rule refuses a program that breaks it, and lets the others pass."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.execute.programs import SEGMENTS, legal_programs
from weft.program.batch import Batch, one_prompt
from weft.program.check import check
from weft.program.steps import Program, ProgramError, Step, decoder_stages

STAGES = decoder_stages(1)
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
compute  head          0:8  after reduce L0.mlp 4:8
gather   head          0:8
"""


def test_a_good_program_passes() -> None:
    # The head waits for the last collective only: the network lane runs in order, so the first has arrived too.
    check(Program.parse(GOOD), STAGES, one_prompt(8))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  after reduce L0.attention 0:4", "", "not after everything that L0.attention leaves"),
        ("0:8  after reduce L0.mlp 4:8", "0:8  after reduce L0.mlp 0:4", "not after everything that L0.mlp"),
        ("compute  L0.attention  4:8\nreduce   L0.attention  4:8\n", "", "not a step|does not stand before"),
        ("tail     L0.mlp        0:4\n", "", "no single partial holds these rows"),
        ("tail     L0.mlp        0:4\n", "tail     L0.mlp        2:6\n", "no body of these rows"),
        ("reduce   L0.mlp        0:4\n", "reduce   L0.mlp        0:8\n", "no single partial"),
        ("reduce   L0.mlp        0:4\n", "reduce   L0.mlp        0:3\n", "not after everything"),
        ("gather   head          0:8\n", "", "head: not all of the rows 0:8"),
        ("gather   head          0:8\n", "reduce   head          0:8\n", "this stage ends in gather"),
        ("compute  embed         0:8\n", "body     embed         0:8\n", "only a stage that ends in a reduce"),
        ("compute  L0.mlp        4:8", "compute  L0.mlp        3:8", "some of these rows were done before"),
        ("compute  L0.mlp        4:8", "compute  L0.dance      4:8", "no such stage"),
        ("compute  L0.mlp        4:8", "compute  L0.mlp        4:9", "the batch has only the rows 0:8"),
        ("compute  head          0:8", "compute  head          4:8", "this stage runs once"),
    ],
)
def test_each_rule(old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    with pytest.raises(ProgramError, match=complaint):
        check(Program.parse(GOOD.replace(old, new, 1)), STAGES, one_prompt(8))


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
compute         head          0:8  after all_gather head 0:4, all_gather head 4:8
gather          head          0:8
"""


def test_scattered_sums_pass() -> None:
    check(Program.parse(SCATTERED), STAGES, one_prompt(8))


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
        ("all_gather      L0.mlp        4:8", "reduce_scatter  head  0:8\nEND", "head 0:8.*this stage ends in gather"),
        ("compute         head", "enter           L0.mlp  0:4\ncompute         head", "the program already has"),
        ("reduce_scatter  L0.attention  4:8\n", "reduce  L0.attention  4:8\n", "does not stand before"),
    ],
)  # fmt: skip
def test_each_rule_of_scattered_sums(old: str, new: str, complaint: str) -> None:
    assert old in SCATTERED
    with pytest.raises(ProgramError, match=complaint):
        check(Program.parse(SCATTERED.replace(old, new, 1).partition("END")[0]), STAGES, one_prompt(8))


def test_a_stage_is_gathered_whole_or_not_at_all() -> None:
    """Rows 4:8 were summed everywhere, and the stage takes its input from all_gathers."""
    mixed = SCATTERED.replace("reduce_scatter  L0.attention  4:8\n", "reduce          L0.attention  4:8\n")
    mixed = mixed.replace("enter           L0.mlp        4:8  after reduce_scatter L0.attention 4:8\n", "")
    mixed = mixed.replace("all_gather      L0.mlp        4:8\n", "").replace(
        "L0.mlp 4:8\nreduce_s", "L0.mlp 0:4\nreduce_s"
    )
    with pytest.raises(ProgramError, match=r"compute L0.mlp 0:8.*not after an all_gather"):
        check(Program.parse(mixed), STAGES, one_prompt(8))


def test_chunks_of_one_sequence_keep_their_order() -> None:
    lines = GOOD.splitlines(keepends=True)
    swapped = "".join([lines[0], *lines[3:5], *lines[1:3], *lines[5:]])
    with pytest.raises(ProgramError, match=r"earlier rows of the same sequence \(0:4\) come later"):
        check(Program.parse(swapped), STAGES, one_prompt(8))


def test_sequences_may_come_in_any_order() -> None:
    from weft.program.batch import Segment

    lines = GOOD.splitlines(keepends=True)
    swapped = "".join([lines[0], *lines[3:5], *lines[1:3], *lines[5:]])
    check(Program.parse(swapped), STAGES, Batch((Segment(0, 0, 4), Segment(1, 0, 4))))


@settings(max_examples=100, deadline=None)
@given(program=legal_programs(decoder_stages(2)))
def test_random_legal_programs_pass(program: Program) -> None:
    check(program, decoder_stages(2), Batch(SEGMENTS))


@settings(max_examples=60, deadline=None)
@given(program=legal_programs(decoder_stages(2)))
def test_without_its_last_edges_a_program_is_refused(program: Program) -> None:
    """The head's edges include one to the last collective, which nothing else waits for."""
    steps = [Step(s.kind, s.stage, s.rows, () if s.stage == "head" else s.after) for s in program]
    with pytest.raises(ProgramError, match="(compute|enter) head"):
        check(Program(tuple(steps)), decoder_stages(2), Batch(SEGMENTS))
