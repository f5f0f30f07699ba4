"""The simulator."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.execute.programs import SEGMENTS, legal_programs
from tests.outlines import changed, decoder_outline
from tests.simulate.costs import RANK, costs
from weft.plan.candidates import ROUNDS
from weft.program.batch import Batch, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.stages import COMPUTE, NETWORK, Kind
from weft.program.steps import Program
from weft.program.strategy import Strategy
from weft.program.text import write
from weft.simulate.cost import Contention, Costs
from weft.simulate.predicted import simulate
from weft.simulate.run import coupling, lay_out, structure_of, taken
from weft.timeline.timeline import Timeline

OUTLINE = decoder_outline(4)


def steps_take(structure, program, batch, costs, wire, rank):
    return [taken(work, program.rows[chunk], batch, costs, wire, rank) for work, chunk in structure.works]


def run(strategy: str, tokens: int = 512, known: Costs | None = None, layers: int = 4) -> Timeline:
    batch = one_prompt(tokens)
    program = build(Strategy.parse(strategy), decoder_outline(layers), batch)
    return simulate(program, batch, known or costs(), "exact")


def test_serial_takes_what_its_lanes_take() -> None:
    timeline = run("serial")
    assert timeline.seconds == pytest.approx(timeline.busy(0, COMPUTE) + timeline.busy(0, NETWORK))
    assert timeline.overlapped(0) == 0 and timeline.source == "predicted" and timeline.ranks == [0, 1]


def test_two_chunks_by_hand() -> None:
    """The first layer, two chunks: every start and stop follows from the four times alone."""
    batch, known = one_prompt(256), costs()
    program = build(Strategy.parse("iso:2"), decoder_outline(2), batch)
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
    assert held.busy(0, COMPUTE) > free.busy(0, COMPUTE)
    assert run("serial", known=costs(contention=Contention(fixed=2e-3))).seconds == run("serial").seconds
    # Sums of 512 rows whole: hidden whole, each takes its 2 ms, no more.
    assert held.busy(0, COMPUTE) - free.busy(0, COMPUTE) <= 16 * 2e-3 + 1e-9


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
    sent = 6 * 512 * 4096 + 2 * 4096  # of the last layer, the wanted row alone
    assert run("serial", known=saved).seconds >= sent * wire.per_byte - 250e3 * wire.per_byte
    # Where the link never pauses there is nothing to save.
    assert run("iso:4", known=saved).seconds == pytest.approx(run("iso:4", known=costs(0.25)).seconds, rel=0.03)


def test_ranks_of_their_own_pace() -> None:
    """The slow rank is never idle for the fast one; the fast one waits, and both end together."""
    alike, apart = run("iso:2"), run("iso:2", known=costs(ranks=(RANK.scaled(0.5), RANK)))
    assert apart.seconds == pytest.approx(alike.seconds)
    assert apart.busy(0, COMPUTE) == pytest.approx(0.5 * apart.busy(1, COMPUTE), rel=0.01)
    for rank in (0, 1):
        for lane in (COMPUTE, NETWORK):
            events = apart.lane(rank, lane)
            assert all(a.stop <= b.start + 1e-12 for a, b in zip(events, events[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(program=legal_programs(OUTLINE), stolen=st.floats(0, 5e-3), burst=st.floats(0, 1e5))
def test_any_legal_program_keeps_order_and_lanes(program: Program, stolen: float, burst: float) -> None:
    """No step before what it waits for, one at a time on each lane, and never faster than the lanes alone."""
    batch, known = Batch(SEGMENTS), costs(contention=Contention(fixed=stolen, small=stolen, burst=burst, turn=1e-4))
    events = [e for e in simulate(program, batch, known, "exact").events if e.rank == 0]
    alone = [
        e for e in simulate(program, batch, replace(known, contention=Contention()), "exact").events if e.rank == 0
    ]
    steps, last = list(program), dict.fromkeys(program.form.lanes, 0.0)
    stopped = {(event.kind, event.stage, event.rows): event.stop for event in events}
    ran = iter(events)
    for step in steps:
        if (step.kind, step.stage, step.rows) not in stopped:
            assert step.step.wanted and not batch.wanted(step.rows).length
            continue
        event, after = next(ran), [steps[edge] for edge in step.after]
        waited = [stopped.get((each.kind, each.stage, each.rows), 0.0) for each in after]
        assert (event.kind, event.stage, event.rows) == (step.kind, step.stage, step.rows)
        assert event.start >= max([last[step.lane], *waited]) - 1e-12
        last[step.lane] = event.stop
    assert next(ran, None) is None
    assert max(e.stop for e in events) >= sum(e.seconds for e in alone if e.lane == COMPUTE) - 1e-9


@settings(max_examples=40, deadline=None)
@given(
    strategy=st.sampled_from(["serial", "iso:2", "iso:3+ahead", "iso:4", "tiles:3", "iso:2+rs", "iso:2/4"]),
    times=st.floats(0.1, 10), fixed=st.floats(0, 2e-3), layers=st.integers(1, 90), tokens=st.integers(2, 2000),
)  # fmt: skip
def test_rounds_that_repeat_take_what_they_would_take_laid_out(
    strategy: str, times: float, fixed: float, layers: int, tokens: int
) -> None:
    batch, known = one_prompt(tokens), costs(times, contention=Contention(fixed=fixed, turn=2e-4, wake=1e-4))
    program = build(Strategy.parse(strategy), decoder_outline(layers), batch)
    structure = structure_of(program.form)
    each = steps_take(structure, program, batch, known, "exact", known.pace)
    between = coupling(known, known.wires["exact"], program.form.lanes)
    all_of_it, some = lay_out(structure, each, between), lay_out(structure, each, between, most=layers)
    few = lay_out(structure, each, between, most=ROUNDS)
    assert few.seconds == pytest.approx(all_of_it.seconds, rel=0.05)  # where they take long to repeat
    assert some.seconds == pytest.approx(all_of_it.seconds, rel=1e-9)
    assert some.busy == pytest.approx(all_of_it.busy, rel=2e-3)  # beside a block's end, turns are other ones


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso:3+ahead", "iso:4", "tiles:3", "iso:2+rs", "iso:2/4"])
@pytest.mark.parametrize("times", [0.25, 4.0])
def test_a_few_rounds_tell_of_eighty_layers(strategy: str, times: float) -> None:
    batch, known = one_prompt(1000), costs(times)
    program = build(Strategy.parse(strategy), decoder_outline(80), batch)
    structure = structure_of(program.form)
    each = steps_take(structure, program, batch, known, "exact", known.pace)
    assert sum(lay_out(structure, each, coupling(known, known.wires["exact"], program.form.lanes), most=80).laid) <= 6


def test_two_lanes_over_one_link_share_it_and_over_two_they_don_t() -> None:
    """A toy lane: attention's sums on a network of their own."""
    batch, outline = one_prompt(512), decoder_outline(8)
    plain = build(Strategy.parse("iso:4"), outline, batch)
    sums = Kind.REDUCE, "attention"
    both = changed(plain, lambda step: step._replace(on="network2") if (step.kind, step.part) == sums else step)
    check(both, outline, batch)
    known = costs(0.25)
    free = replace(known, between={"network network2": Contention(), "network2 network": Contention()})
    one, shared, apart = (
        simulate(program, batch, each, "exact") for program, each in ((plain, known), (both, known), (both, free))
    )
    assert apart.lanes == ("compute", "network", "network2") and "network2" in write(both)
    assert apart.seconds < 0.75 * one.seconds  # where the link is slow, two of them are nearly twice as fast
    assert shared.seconds == pytest.approx(one.seconds, rel=0.1)
    assert apart.exposed(0) == pytest.approx(apart.seconds - apart.busy(0, COMPUTE), rel=0.01)


def test_ten_thousand_steps_in_a_tenth_of_a_second() -> None:
    program = build(Strategy.parse("iso:4"), decoder_outline(625), one_prompt(512))
    assert len(program) > 10_000
    batch, known, best = one_prompt(512), costs(), float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        simulate(program, batch, known, "exact")
        best = min(best, time.perf_counter() - begin)
    assert best < 0.1 * 2, f"{best:.3f} s"  # 0.04 s on a quiet machine; twice the promise on one that is not
