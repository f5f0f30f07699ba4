"""Timelines of ranks whose clocks differ, as those of several machines do."""

from __future__ import annotations

import pytest

from tests.outlines import decoder_outline
from weft.execute.protocol import Done
from weft.execute.results import timeline_of
from weft.layout import Layout
from weft.program.batch import one_prompt
from weft.program.build import build
from weft.program.stages import COMPUTE, Kind
from weft.program.steps import Program
from weft.program.strategy import Strategy

BATCH = one_prompt(16)


def spans(program: Program, world: int, off: list[float]) -> list[Done]:
    """Every step takes a second of each rank that it concerns, one step after the other; a receiver has waited for what
    it receives since the beginning. `off`: of each rank's clock."""
    found: list[list[tuple[float, float]]] = [[(0.0, 0.0)] * len(program) for _ in range(world)]
    for step in program:
        for rank in range(world):
            if step.step.concerns(rank):
                begin = 1.0 if rank in step.step.to else step.number + 1.0
                found[rank][step.number] = off[rank] + begin, off[rank] + step.number + 2.0
    return [Done(1, 1.0, 0.0, 0.0, (1.0, 1.0), 0, spans=each) for each in found]


@pytest.mark.parametrize("layout", [Layout((1, 1), ((1.0,), (1.0,))), Layout((1, 1), ((1.0, 1.0), (1.0, 1.0)))])
@pytest.mark.parametrize("strategy", ["serial", "pipe:2"])
def test_rows_come_when_they_were_sent(layout: Layout, strategy: str) -> None:
    program = build(Strategy.parse(strategy), decoder_outline(2), BATCH, layout=layout)
    off = [50.0, 3.0, 1000.0, 7.0][: layout.world]
    one = timeline_of(program, spans(program, layout.world, [0.0] * layout.world), True)
    other = timeline_of(program, spans(program, layout.world, off), False)
    for mine, theirs in zip(one.events, other.events, strict=True):
        assert (mine.start, mine.stop) == pytest.approx((theirs.start, theirs.stop))
    sent = [event for event in one.events if event.kind is Kind.SEND]
    assert sent and all(event.seconds == 1.0 for event in sent), "while nobody sends, nothing is received"
    assert one.bubble == pytest.approx(
        sum(1 - one.busy(rank, COMPUTE) / one.seconds for rank in one.ranks) / layout.world
    )  # fmt: skip


def test_ranks_of_one_section_have_no_bubble() -> None:
    program = build(Strategy.parse("serial"), decoder_outline(2), BATCH)
    one, other = (timeline_of(program, spans(program, 2, off), not any(off)) for off in ([0.0, 0.0], [4.0, 900.0]))
    assert [(e.start, e.stop) for e in one.events] == [(e.start, e.stop) for e in other.events] and one.bubble is None
