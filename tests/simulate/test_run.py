"""The simulator."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.execute.programs import SEGMENTS, legal_programs
from tests.simulate.costs import RANK, costs
from weft.program.batch import Batch, one_prompt
from weft.program.build import build
from weft.program.steps import Lane, Program, decoder_stages
from weft.program.strategy import Strategy
from weft.simulate.cost import Contention, Costs
from weft.simulate.run import simulate
from weft.timeline.timeline import Timeline

STAGES = decoder_stages(4)


def run(strategy: str, tokens: int = 512, known: Costs | None = None, layers: int = 4) -> Timeline:
    batch = one_prompt(tokens)
    program = build(Strategy.parse(strategy), decoder_stages(layers), batch)
    return simulate(program, batch, known or costs(), "exact")


def test_serial_takes_what_its_lanes_take() -> None:
    timeline = run("serial")
    assert timeline.seconds == pytest.approx(timeline.busy(0, Lane.COMPUTE) + timeline.busy(0, Lane.NETWORK))
    assert timeline.overlapped(0) == 0 and timeline.source == "predicted" and timeline.ranks == [0, 1]


def test_two_chunks_by_hand() -> None:
    """One layer, two chunks: every start and stop follows from the four times alone."""
    batch, known = one_prompt(256), costs()
    program = build(Strategy.parse("iso:2"), decoder_stages(1), batch)
    timeline = simulate(program, batch, known, "exact")
    spans = {(e.kind, e.stage, e.rows.start): (e.start, e.stop) for e in timeline.events if e.rank == 0}
    first, second = spans["compute", "L0.attention", 0], spans["compute", "L0.attention", 128]
    sums = [spans["reduce", "L0.attention", start] for start in (0, 128)]
    assert second[0] == first[1] and sums[0][0] == first[1]
    assert sums[1][0] == max(second[1], sums[0][1])
    assert spans["compute", "L0.mlp", 0][0] == max(second[1], sums[0][1])
    assert spans["compute", "L0.mlp", 128][0] == max(spans["compute", "L0.mlp", 0][1], sums[1][1])


def test_contention_slows_computation_beside_a_sum() -> None:
    free, held = run("iso:2"), run("iso:2", known=costs(contention=Contention(fixed=2e-3)))
    assert held.busy(0, Lane.COMPUTE) > free.busy(0, Lane.COMPUTE)
    assert run("serial", known=costs(contention=Contention(fixed=2e-3))).seconds == run("serial").seconds
    # Sums of 512 rows whole: hidden whole, each takes its 2 ms, no more.
    assert held.busy(0, Lane.COMPUTE) - free.busy(0, Lane.COMPUTE) <= 16 * 2e-3 + 1e-9


def test_waiting_for_a_turn_and_waking() -> None:
    base = run("serial").seconds
    assert run("serial", known=costs(contention=Contention(turn=1e-3))).seconds == base  # nothing computes beside it
    assert (
        run("iso:2", known=costs(0.25, contention=Contention(turn=1e-3))).seconds
        > run("iso:2", known=costs(0.25)).seconds
    )
    assert run("serial", known=costs(contention=Contention(wake=1e-3))).seconds == pytest.approx(base + 8e-3)


def test_an_idle_link_saves_up() -> None:
    """A token bucket takes bytes at once after a pause, but no pass sends more than the link carries."""
    saved = costs(0.25, contention=Contention(burst=250e3))
    assert run("serial", known=saved).seconds < run("serial", known=costs(0.25)).seconds
    wire = saved.wires["exact"]
    sent = 8 * 512 * 4096
    assert run("serial", known=saved).seconds >= sent * wire.per_byte - 250e3 * wire.per_byte
    # Where the link never pauses there is nothing to save.
    assert run("iso:4", known=saved).seconds == pytest.approx(run("iso:4", known=costs(0.25)).seconds, rel=0.03)


def test_ranks_of_their_own_pace() -> None:
    """The slow rank is never idle for the fast one; the fast one waits, and both end together."""
    alike, apart = run("iso:2"), run("iso:2", known=costs(ranks=(RANK.scaled(0.5), RANK)))
    assert apart.seconds == pytest.approx(alike.seconds)
    assert apart.busy(0, Lane.COMPUTE) == pytest.approx(0.5 * apart.busy(1, Lane.COMPUTE), rel=0.01)
    for rank in (0, 1):
        for lane in Lane:
            events = apart.lane(rank, lane)
            assert all(a.stop <= b.start + 1e-12 for a, b in zip(events, events[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(program=legal_programs(STAGES), stolen=st.floats(0, 5e-3), burst=st.floats(0, 1e5))
def test_any_legal_program_keeps_order_and_lanes(program: Program, stolen: float, burst: float) -> None:
    """No step before what it waits for, one at a time on each lane, and never faster than the lanes alone."""
    batch, known = Batch(SEGMENTS), costs(contention=Contention(fixed=stolen, small=stolen, burst=burst, turn=1e-4))
    events = [e for e in simulate(program, batch, known, "exact").events if e.rank == 0]
    alone = [
        e for e in simulate(program, batch, replace(known, contention=Contention()), "exact").events if e.rank == 0
    ]
    assert len(events) == len(program)
    last = {lane: 0.0 for lane in Lane}
    for step, event in zip(program, events, strict=True):
        assert event.start >= max([last[step.lane], *(events[edge].stop for edge in step.after)]) - 1e-12
        last[step.lane] = event.stop
    busy = {lane: sum(e.seconds for e in alone if e.lane is lane) for lane in Lane}
    assert max(e.stop for e in events) >= busy[Lane.COMPUTE] - 1e-9


def test_ten_thousand_steps_in_a_tenth_of_a_second() -> None:
    program = build(Strategy.parse("iso:4"), decoder_stages(625), one_prompt(512))
    assert len(program) > 10_000
    batch, known, best = one_prompt(512), costs(), float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        simulate(program, batch, known, "exact")
        best = min(best, time.perf_counter() - begin)
    assert best < 0.1 * 2, f"{best:.3f} s"  # 0.04 s on a quiet machine; twice the promise on one that is not
