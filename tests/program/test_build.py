"""Builders: the schedules that the design describes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.outlines import decoder_outline
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.build import build, issued, numbered
from weft.program.check import check
from weft.program.fold import Issue, folded
from weft.program.stages import Kind, Outline, Stage
from weft.program.steps import Program
from weft.program.strategy import Strategy, place
from weft.program.text import parse, write, write_expanded

SERIAL = """\
compute  embed         0:8
compute  L0.attention  0:8
reduce   L0.attention  0:8
compute  L0.mlp        0:8  after reduce L0.attention 0:8
reduce   L0.mlp        0:8
compute  L1.attention  0:8  wanted  after reduce L0.mlp 0:8
reduce   L1.attention  0:8  wanted
compute  L1.mlp        0:8  wanted  after reduce L1.attention 0:8
reduce   L1.mlp        0:8  wanted
compute  head          0:8  wanted  after reduce L1.mlp 0:8
gather   head          0:8  wanted
"""

ISO = """\
compute  embed         0:8
compute  L0.attention  0:4
reduce   L0.attention  0:4
compute  L0.attention  4:8
reduce   L0.attention  4:8
compute  L0.mlp        0:4  after reduce L0.attention 0:4
reduce   L0.mlp        0:4
compute  L0.mlp        4:8  after reduce L0.attention 4:8
reduce   L0.mlp        4:8
"""

AHEAD = """\
compute  embed         0:9
compute  L0.attention  0:3
reduce   L0.attention  0:3
compute  L0.attention  3:6
reduce   L0.attention  3:6
compute  L0.mlp        0:3  after reduce L0.attention 0:3
reduce   L0.mlp        0:3
compute  L0.attention  6:9
reduce   L0.attention  6:9
compute  L0.mlp        3:6  after reduce L0.attention 3:6
reduce   L0.mlp        3:6
compute  L0.mlp        6:9  after reduce L0.attention 6:9
reduce   L0.mlp        6:9
compute  head          0:9  after reduce L0.mlp 0:3, reduce L0.mlp 3:6, reduce L0.mlp 6:9
gather   head          0:9
"""

TILES = """\
body     L0.attention  0:8
tail     L0.attention  0:4
reduce   L0.attention  0:4
tail     L0.attention  4:8
reduce   L0.attention  4:8
body     L0.mlp        0:8  after reduce L0.attention 0:4, reduce L0.attention 4:8
"""


SCATTERED = """\
compute         L0.attention  0:4
reduce_scatter  L0.attention  0:4
compute         L0.attention  4:8
enter           L0.mlp        0:4  after reduce_scatter L0.attention 0:4
all_gather      L0.mlp        0:4
reduce_scatter  L0.attention  4:8
compute         L0.mlp        0:4  after all_gather L0.mlp 0:4
enter           L0.mlp        4:8  after reduce_scatter L0.attention 4:8
all_gather      L0.mlp        4:8
reduce_scatter  L0.mlp        0:4
compute         L0.mlp        4:8  after all_gather L0.mlp 4:8
"""


@pytest.mark.parametrize(
    ("strategy", "part"), [("serial", SERIAL), ("iso:2", ISO), ("tiles:2", TILES), ("iso:2+rs", SCATTERED)]
)
def test_schedules(strategy: str, part: str) -> None:
    assert part in write_expanded(build(Strategy.parse(strategy), decoder_outline(2), one_prompt(8)))


def test_earlier_chunks_go_ahead() -> None:
    """Attention of a later chunk stands between two stages of an earlier one."""
    text = write_expanded(build(Strategy.parse("iso:3+ahead"), decoder_outline(1), one_prompt(9)))
    assert text.replace("  wanted", "") == AHEAD


EVERY = [
    "serial", "iso:2", "iso:3", "iso:2/4", "iso:4/2", "iso@3,9/5", "tiles:4", "requests",
    "iso:2/4+tiles:3", "requests:2+tiles:2", "rs", "iso:2+rs", "iso:4+rs", "iso@3,9+rs", "requests+rs", "iso:2+ahead",
    "iso:3+ahead", "iso@3,9+ahead", "requests+ahead",
]  # fmt: skip


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("lengths", [(1,), (2,), (17,), (700,), (3, 1, 90), (1, 1, 1, 1)])
def test_built_programs_are_legal(strategy: str, lengths: tuple[int, ...]) -> None:
    batch = Batch(tuple(Segment(slot, 5 * slot, length) for slot, length in enumerate(lengths)))
    for layers in (1, 3, 12):
        outline = decoder_outline(layers)
        check(build(Strategy.parse(strategy), outline, batch), outline, batch)


EIGHTY = """\
chunks  a 0:512  b 512:1024  all 0:1024

compute  embed          all
compute  L0.attention   a
reduce   L0.attention   a
compute  L0.attention   b
reduce   L0.attention   b
compute  L0.mlp         a    after reduce L0.attention a
reduce   L0.mlp         a
compute  L0.mlp         b    after reduce L0.attention b
reduce   L0.mlp         b
78x
compute  L1.attention   a    after reduce L0.mlp a
reduce   L1.attention   a
compute  L1.attention   b    after reduce L0.mlp b
reduce   L1.attention   b
compute  L1.mlp         a    after reduce L1.attention a
reduce   L1.mlp         a
compute  L1.mlp         b    after reduce L1.attention b
reduce   L1.mlp         b
1x
compute  L79.attention  a    wanted  after reduce L78.mlp a
reduce   L79.attention  a    wanted
compute  L79.attention  b    wanted  after reduce L78.mlp b
reduce   L79.attention  b    wanted
compute  L79.mlp        a    wanted  after reduce L79.attention a
reduce   L79.mlp        a    wanted
compute  L79.mlp        b    wanted  after reduce L79.attention b
reduce   L79.mlp        b    wanted
compute  head           all  wanted  after reduce L79.mlp a, reduce L79.mlp b
gather   head           all  wanted
"""


def test_eighty_layers_fit_on_a_screen() -> None:
    """After the last layer's keys and values are there, only wanted rows go on."""
    assert write(build(Strategy.parse("iso:2"), decoder_outline(80), one_prompt(1024))) == EIGHTY


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6, 7, 30])
@pytest.mark.parametrize("alternating", [1, 2, 3])
def test_what_is_folded_is_what_would_be_written_out(strategy: str, layers: int, alternating: int) -> None:
    """Also where not every layer is like the one before, and where stages go without the last sum."""
    stage = decoder_outline(1).layer
    lagging = Stage("experts", Kind.REDUCE, lag=0 if strategy.endswith("rs") else 1)
    outline = replace(decoder_outline(layers), layer=(stage[0], lagging, stage[1]) if alternating == 3 else stage)
    batch = Batch((Segment(0, 0, 50), Segment(1, 7, 20)))

    def issue(short: Outline) -> list[Issue]:
        plain = issued(short, numbered(70, place(Strategy.parse(strategy), batch))[0])
        travels = (Kind.REDUCE, Kind.REDUCE_SCATTER, Kind.ALL_GATHER)
        odd = [
            each._replace(wire="bf16") if each.kind in travels and (each.layer or 0) % alternating == 1 else each
            for each in plain
        ]
        return odd if alternating == 2 else plain

    whole = issue(outline)
    offsets = numbered(70, place(Strategy.parse(strategy), batch))[1]
    program = Program(folded(outline, issue), offsets)
    assert len(program) == len(whole)
    for got, wanted in zip(program, whole, strict=True):
        assert (got.kind, got.step.part, got.layer, got.after) == (wanted.kind, wanted.part, wanted.layer, wanted.after)
        assert got.rows == Rows(offsets[wanted.rows.start], offsets[wanted.rows.stop])
        assert (got.step.wanted, got.step.wire) == (wanted.wanted, wanted.wire)
    assert parse(write(program)) == program
    check(program, outline, batch)
