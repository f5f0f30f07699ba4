"""Calibration, on machines that are simulated: what it finds is known."""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

import pytest

from tests.outlines import decoder_outline
from tests.simulate.costs import RANK, costs
from weft.plan.calibrate import BUDGET, Probe, TooSlow, calibrate
from weft.plan.planner import Planner
from weft.plan.readings import KERNEL
from weft.plan.samples import Sample, Subject
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.stages import COMPUTE, NETWORK, Kind, Outline, Stage
from weft.program.steps import Program
from weft.simulate.cost import ComputeCosts, Contention, Costs, Table
from weft.simulate.predicted import simulate
from weft.timeline.timeline import Timeline, median

OUTLINE = decoder_outline(6)
SUBJECT = Subject(
    outline=OUTLINE, width=1024, logits=16384.0, world=2, length=4096, slots=16, limit=65536,
    elements={"exact": 4.0, "bf16": 2.0},
)  # fmt: skip


def machine(truth: Costs, noise: float = 0.0, saved: bool = False, seed: int = 7) -> Probe:
    """Runs a program by simulating it, with every event a little longer or shorter; a sum is so on all ranks. `saved`:
    messages alone find a link that has saved up too."""
    random = Random(seed)

    def probe(batch: Batch, program: Program, wire: str, part: str) -> Sample:
        timeline = simulate(program, batch, truth, wire)
        if part in ("network", "beside"):
            empty = replace(truth, contention=replace(truth.contention, burst=0.0))  # nothing is saved up in between
            timeline = _only(simulate(program, batch, truth if saved else empty, wire), NETWORK)
        elif part == "compute":
            alone = replace(truth, contention=Contention())
            timeline = _only(simulate(program, batch, alone, wire), COMPUTE)
        longer: dict[object, float] = {}
        for e in timeline.events:
            longer.setdefault(
                (e.stage, e.rows, e.kind, e.rank * (e.lane == COMPUTE)), random.uniform(1 - noise, 1 + noise)
            )
        events = tuple(
            replace(e, stop=e.start + e.seconds * longer[e.stage, e.rows, e.kind, e.rank * (e.lane == COMPUTE)])
            for e in timeline.events
        )
        sums = [e for e in events if e.lane is NETWORK and e.rank == 0]
        size = {e: truth.wires[wire].element * truth.width * e.rows.length for e in sums}
        stolen = sum(truth.contention.taken(truth.wires[wire], size[e], e.seconds) for e in sums) / KERNEL
        return Sample(timeline.seconds + 2e-4, [stolen] * 2, Timeline(events, "measured"))

    return probe


def _only(timeline: Timeline, lane: str) -> Timeline:
    return Timeline(tuple(e for e in timeline.events if e.lane == lane), "measured")


@pytest.mark.parametrize("times", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_predictions_after_it_are_right(times: float, noise: float) -> None:
    truth = costs(times, contention=Contention(small=3e-4, fixed=4e-4, per_byte=2e-10))
    found = calibrate(machine(truth, noise), SUBJECT)
    batches = (one_prompt(100), one_prompt(700), one_prompt(3000), Batch((Segment(0, 0, 400), Segment(1, 0, 90))),
               Batch((Segment(0, 2000, 500),)), Batch(tuple(Segment(i, 900, 1) for i in range(6))))  # fmt: skip
    for batch in batches:
        for strategy in ("serial", "iso:2", "iso:3", "tiles:4"):
            for wire in ("exact", "bf16"):
                real, guess = (
                    Planner(OUTLINE, strategy, wire, 1, known).plan(batch).predicted for known in (truth, found)
                )
                assert real is not None and guess is not None
                assert guess.seconds == pytest.approx(real.seconds, rel=0.1 + noise), (batch, strategy, wire)


@pytest.mark.parametrize(("times", "length"), [(0.03, 8192), (0.03, 4096), (0.03, 2048), (1.0, 1024), (1.0, 300)])
def test_what_earlier_positions_cost_is_found(times: float, length: int) -> None:
    """However many rows a fast machine affords, and however short the context is."""
    truth = costs(times)
    found = calibrate(machine(truth, 0.01), replace(SUBJECT, length=length)).pace
    n = min(512, length // 2)
    seen, real = (each.scores(Batch((Segment(0, length - n, n),)), Rows(0, n)) for each in (found, truth.pace))
    assert seen == pytest.approx(real, rel=0.3)
    one, other = (each.scores(Batch((Segment(0, length - 1, 1),)), Rows(0, 1)) for each in (found, truth.pace))
    assert one == pytest.approx(other, rel=0.3)


@pytest.mark.parametrize("length", [2, 3, 17, 63, 64, 127, 255, 256])
@pytest.mark.parametrize("granule", [1, 128])
def test_a_context_may_be_as_short_as_it_likes(length: int, granule: int) -> None:
    """What so few positions cost is not told from noise."""
    truth = costs()
    found = calibrate(machine(truth, 0.05), replace(SUBJECT, length=length, granule=granule))
    assert found.pace.past <= 2 * truth.pace.past
    assert found.pace.whole["mlp"].at(length) == pytest.approx(truth.pace.whole["mlp"].at(length), rel=0.6)


def test_memory_that_is_looked_at_was_written_before() -> None:
    """In all layers that a lone token goes through: pages that nobody has written are read much faster."""
    runs, plain = list[tuple[Batch, Program]](), machine(costs())

    def probe(batch: Batch, program: Program, wire: str, part: str) -> Sample:
        runs.append((batch, program))
        return plain(batch, program, wire, part)

    calibrate(probe, SUBJECT)
    written = 0  # positions of the first sequence times layers
    looked = 0
    for batch, program in runs:
        layers = 1 + max(step.layer or 0 for block in program.form.blocks for step in block.steps)
        segment = batch.segments[0]
        if segment.start:
            looked += 1
            assert written >= segment.start * min(layers, OUTLINE.layers)
        else:
            written = max(written, segment.length * layers)
    assert looked


@pytest.mark.parametrize("times", [0.2, 0.5, 1.0])
def test_what_coding_costs_is_found_for_each_wire(times: float) -> None:
    """Beside a sum's bytes: the same longer for every sum, and of the compute lane's processor."""
    base = costs(times, contention=Contention(small=1e-4, fixed=2e-4, per_byte=2e-10))
    exact = base.wires["exact"]
    longer = Table.line(0.8e-3, exact.per_byte * 1.1)
    coded = replace(exact, element=1.0, sums={"exchange": longer}, codec=Table((0.0, 1e6), (0.0, 3e-3)))
    truth = replace(base, wires={"exact": exact, "int8": coded})
    found = calibrate(machine(truth, 0.02), replace(SUBJECT, elements={"exact": 4.0, "int8": 1.0}))
    assert found.wires["int8"].fixed == pytest.approx(0.8e-3, rel=0.15)
    assert found.wires["exact"].fixed == pytest.approx(0.3e-3, rel=0.35)
    assert found.wires["exact"].codec.at(1e6) == 0
    for strategy in ("serial", "iso:2", "iso:3"):
        for wire in ("exact", "int8"):
            real, guess = (
                Planner(OUTLINE, strategy, wire, 1, known).plan(one_prompt(1000)).predicted for known in (truth, found)
            )
            assert real is not None and guess is not None
            assert guess.seconds == pytest.approx(real.seconds, rel=0.08), (strategy, wire)
    beside = found.contention.taken(found.wires["int8"], 1e6, 0.0)
    assert beside == pytest.approx(truth.contention.taken(coded, 1e6, 0.0), rel=0.35)


def test_a_delay_costs_no_bytes() -> None:
    """A link that is long and not slow: every sum takes as long, and none of it is read as time of its bytes."""
    near = costs(100.0)
    wire = near.wires["exact"]
    far = replace(wire, sums={"exchange": Table.line(5e-3, wire.per_byte)}, hop=Table.line(5e-3, wire.per_byte / 2))
    truth = replace(near, wires={"exact": far})
    subject = replace(SUBJECT, elements={"exact": 4.0})
    each = [calibrate(machine(truth, 0.02, seed=seed), subject).wires["exact"] for seed in range(5)]
    assert all(found.fixed == pytest.approx(5e-3, rel=0.03) for found in each)
    for size in (4096.0, 1e6, 4e6):
        seconds = median(found.table(Kind.REDUCE, size).at(size) for found in each)  # so few bytes drown in noise
        assert seconds == pytest.approx(far.table(Kind.REDUCE, size).at(size), rel=0.05)


def test_a_link_that_has_nothing_saved_up_makes_small_sums_no_dearer() -> None:
    """Sixteen rows are few, but a whole pass of them is more than a bucket holds, and waits for it."""
    truth = costs(0.5, contention=Contention(burst=70e3))
    found = calibrate(machine(truth), replace(SUBJECT, elements={"exact": 4.0}))
    assert found.wires["exact"].fixed == pytest.approx(0.3e-3, rel=0.35)


@pytest.mark.parametrize("saved", [False, True])
def test_what_a_link_has_saved_up_makes_no_wire_dearer(saved: bool) -> None:
    """Sums of a row took less than their bytes do, on every wire alike."""
    truth = costs(0.25, contention=Contention(burst=70e3))
    found = calibrate(machine(truth, saved=saved), SUBJECT).wires
    assert found["bf16"].fixed == pytest.approx(found["exact"].fixed, rel=0.2)
    assert found["exact"].fixed == pytest.approx(truth.wires["exact"].fixed, rel=0.35)


@pytest.mark.parametrize("delay", [2e-3, 20e-3])
def test_what_an_idle_link_saves_up_is_found_beside_a_delay(delay: float) -> None:
    truth = costs(0.5, contention=Contention(burst=70e3))
    wire = truth.wires["exact"]
    far = replace(wire, sums={"exchange": Table.line(delay, wire.per_byte)}, hop=Table.line(delay, wire.per_byte / 2))
    truth = replace(truth, wires={"exact": far})
    found = calibrate(machine(truth, 0.02), replace(SUBJECT, elements={"exact": 4.0}))
    assert found.contention.burst == pytest.approx(70e3, rel=0.2)
    for strategy in ("serial", "iso:2"):
        real, guess = (
            Planner(OUTLINE, strategy, "exact", 1, known).plan(one_prompt(512)).predicted for known in (truth, found)
        )
        assert real is not None and guess is not None and guess.seconds == pytest.approx(real.seconds, rel=0.05)


def test_a_link_that_is_too_slow_is_said_to_be() -> None:
    """Before minutes have gone by: one row tells."""
    asked: list[int] = []

    def slow(batch: Batch, program: Program, wire: str, part: str) -> Sample:
        asked.append(batch.tokens)
        return Sample(2.1, [0.0, 0.0], Timeline((), "measured"))

    with pytest.raises(TooSlow, match="1 row of two layers took 2.1 s"):
        calibrate(slow, SUBJECT)
    assert asked == [1]


def test_ranks_of_unequal_speed_are_told_apart() -> None:
    found = calibrate(machine(costs(ranks=(RANK.scaled(2.0), RANK))), SUBJECT)
    ratio = found.ranks[0].body["mlp"].at(200) / found.ranks[1].body["mlp"].at(200)
    assert ratio == pytest.approx(2.0, rel=0.05)


def test_it_keeps_to_its_time_and_tells_how_far_it_is() -> None:
    """On a machine where one pass takes a quarter of a second, a few rounds; shares rise to one."""
    inner, told = machine(costs()), list[float]()

    def slow(batch: Batch, program: Program, wire: str, part: str) -> Sample:
        sample = inner(batch, program, wire, part)
        time.sleep(sample.seconds * 0.5)
        return sample

    begin = time.monotonic()
    calibrate(slow, replace(SUBJECT, elements={"exact": 4.0}), told.append)
    assert time.monotonic() - begin < BUDGET + 1.0
    assert told == sorted(told) and told[0] >= 0 and told[-1] <= 1.0


def test_small_subjects() -> None:
    """A short context, few slots, few layers."""
    tiny = replace(SUBJECT, outline=decoder_outline(1), length=200, slots=1, elements={"exact": 4.0})
    found = calibrate(machine(costs()), tiny)
    assert found.ranks[0].body["mlp"].at(100) == pytest.approx(RANK.body["mlp"].at(100), rel=0.1)


BLOCK = replace(OUTLINE, layer=(Stage("block", Kind.REDUCE, ordered=True),))
ASIDE = replace(OUTLINE, layer=(Stage("qk_norm", Kind.REDUCE, aside=2), *OUTLINE.layer))


def of_parts(*parts: str) -> ComputeCosts:
    """A rank whose stages are like the usual ones."""
    like = {"block": "mlp", "qk_norm": "mlp"}
    body, tail = (
        {part: table[like.get(part, part)] for part in ("embed", *parts, "head")} for table in (RANK.body, RANK.tail)
    )
    return replace(RANK, body=body, tail=tail, scored=next(part for part in parts if part != "qk_norm"))


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("times", [0.3, 2.0])
@pytest.mark.parametrize("outline", [BLOCK, ASIDE], ids=["block", "aside"])
def test_layers_of_one_sum_and_sums_that_stay_aside(outline: Outline, times: float, layers: int) -> None:
    """What a sum takes is read from those of whole rows alone, and from more layers where each has but one."""
    rank, some = of_parts(*(stage.part for stage in outline.layer)), outline.of(layers)
    aside = {"qk_norm": 2} if outline is ASIDE else {}
    truth = replace(costs(times, ranks=(rank,)), aside=aside)
    found = calibrate(machine(truth, 0.02), replace(SUBJECT, outline=some))
    assert found.aside == aside
    for strategy in ("serial", "iso:2", "tiles:4"):
        real, guess = (
            Planner(some, strategy, "exact", 1, each).plan(one_prompt(1000)).predicted for each in (truth, found)
        )
        assert real is not None and guess is not None
        assert guess.seconds == pytest.approx(real.seconds, rel=0.12), strategy
        assert guess.network_alone == pytest.approx(real.network_alone, rel=0.12), strategy


def test_windows_by_layer_are_seen_in_the_mean() -> None:
    """The layers that are measured see less than the mean of all."""
    truth = costs(ranks=(replace(RANK, windows=((100, 1.0),)),))
    windows = (100,) * 8 + (None,) * 4
    found = calibrate(machine(truth), replace(SUBJECT, windows=windows)).ranks[0]
    assert found.past == pytest.approx(RANK.past, rel=0.1) and found.one == pytest.approx(RANK.one, rel=0.1)
    alike = replace(found, windows=((100, 1.0),))
    for rows in (512, 2048):
        ours, theirs = (each.scores(one_prompt(rows), Rows(0, rows)) for each in (alike, truth.pace))
        assert ours == pytest.approx(theirs, rel=0.3), rows
    assert found.seen(5000) == pytest.approx((2 * 100 + 5000) / 3) and found.seen(50) == pytest.approx(50)
