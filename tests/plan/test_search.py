"""The search for cuts."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.outlines import decoder_outline
from tests.simulate.costs import RANK, costs
from weft.plan.planner import Planner
from weft.plan.search import Search
from weft.plan.wiring import Wiring
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.stages import COMPUTE
from weft.program.strategy import Strategy, place
from weft.simulate.cost import Contention, Costs, Table
from weft.simulate.predicted import simulate
from weft.simulate.run import Structure

OUTLINE = decoder_outline(24)
MIXED = Batch((Segment(0, 0, 300), Segment(1, 0, 900), Segment(2, 0, 100)))
BATCHES = {
    "short": one_prompt(64), "prompt": one_prompt(1000), "long": one_prompt(8000),
    "late chunk": Batch((Segment(0, 4000, 512),)),
    "several": MIXED, "with decoding": Batch((*(Segment(i, 300 * i, 1) for i in range(7)), Segment(9, 0, 700))),
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso:3", "iso:2/4", "iso@100,700/50,100,300,700", "tiles:4",
                                      "iso:2+tiles:2", "rs", "iso:4+rs"])  # fmt: skip
@pytest.mark.parametrize("times", [0.25, 1.0, 4.0, 100.0])
def test_three_layers_tell_of_all(strategy: str, times: float) -> None:
    """What the search judges by is what the simulator says of the whole program."""
    batch, known = one_prompt(1000), costs(times, contention=Contention(fixed=5e-4, turn=2e-4, burst=1e5))
    estimate = Search(OUTLINE).estimate(batch, place(Strategy.parse(strategy), batch), known, Wiring("exact"))
    whole = simulate(build(Strategy.parse(strategy), OUTLINE, batch), batch, known, "exact")
    assert estimate.seconds == pytest.approx(whole.seconds + known.pace.begin.at(1000), rel=0.01)
    assert estimate.compute == pytest.approx(whole.busy(0, COMPUTE) + known.pace.begin.at(1000), rel=0.02)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("times", [0.1, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("granule", [1, 128])
def test_never_worse_than_what_it_could_have_taken(name: str, times: float, granule: int) -> None:
    batch, known = BATCHES[name], costs(times, contention=Contention(fixed=5e-4))
    plan = Planner(OUTLINE, "auto", "exact", granule, known).plan(batch)
    assert plan.predicted is not None
    for fixed in ("serial", "iso:2", "iso:3", "iso:4", "tiles:4", "requests:2"):
        other = Planner(OUTLINE, fixed, "exact", granule, known).plan(batch).predicted
        assert other is not None
        # What is left on the table: a gain too small to be worth a risk, or worth more steps.
        assert plan.predicted.seconds <= 1.045 * other.seconds, fixed
    assert plan.predicted.seconds <= plan.predicted.serial


@pytest.mark.parametrize("burst", [0.0, 5e5, 1e6])
@pytest.mark.parametrize(("times", "fixed"), [(0.5, 3e-3), (0.8, 6e-3), (1.0, 6e-3), (1.0, 3e-4)])
@pytest.mark.parametrize("tokens", [128, 256, 1024])
def test_what_is_not_laid_out_would_not_have_been_chosen(
    burst: float, times: float, fixed: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on links that save up, where the fixed part of each sum is time to do so."""
    base = costs(times, contention=Contention(burst=burst))
    way = base.wires["exact"]
    slow = replace(way, sums={"exchange": Table.line(fixed, way.per_byte)})
    known, search = replace(base, wires={"exact": slow}), Search(OUTLINE)
    pruned = search.best(one_prompt(tokens), known, ("exact",))
    monkeypatch.setattr(Structure, "bound", lambda structure, costs, credit: 0.0)
    assert pruned.lanes.seconds <= 1.01 * search.best(one_prompt(tokens), known, ("exact",)).lanes.seconds


def test_serial_where_nothing_is_gained() -> None:
    for batch, times in ((one_prompt(1000), 1000.0), (Batch(tuple(Segment(i, 500, 1) for i in range(8))), 1.0)):
        assert str(Planner(OUTLINE, "auto", "exact", 1, costs(times)).plan(batch).strategy) == "serial"
    alone = Planner(OUTLINE, "auto", "exact").plan(one_prompt(1000))
    assert str(alone.strategy) == "serial" and alone.predicted is None


def test_what_is_found_beats_every_even_cut_where_attention_dominates() -> None:
    """With scores as most of the work an even cut leaves the first chunk little to hide behind: shorter later chunks
    are better, and earlier chunks that go ahead are better still."""
    deep, base = replace(RANK, present=RANK.present.scaled(20), past=RANK.past * 20), costs(0.03)
    wire = replace(base.wires["exact"], sums={"exchange": Table.line(1.0, base.wires["exact"].per_byte)})
    known = replace(base, ranks=(deep,), wires={"exact": wire}, contention=Contention(fixed=1.0))
    planner = Planner(OUTLINE, "auto", "exact", 1, known)

    def seconds(overlap: str) -> float:
        predicted = planner.like(overlap, "exact").plan(one_prompt(16000)).predicted
        assert predicted is not None
        return predicted.seconds

    even = min(seconds(f"iso:{n}") for n in (2, 3, 4, 6, 8, 12))
    assert seconds("auto") < 0.98 * even
    assert seconds("iso@7440,11080,14200") < 0.98 * even
    assert str(planner.plan(one_prompt(16000)).strategy).endswith("+ahead")


@pytest.mark.parametrize("layers", [6, 32])
def test_a_plan_takes_three_milliseconds(layers: int) -> None:
    """Batches that were not seen, on a processor that is not busy; twice that is allowed where it is."""
    planner = Planner(decoder_outline(layers), "auto", "exact", 1, costs(1.0, contention=Contention(fixed=5e-4)))
    taken = []
    for tokens in range(500, 1500, 25):
        begin = time.process_time()
        planner.plan(one_prompt(tokens))
        taken.append(time.process_time() - begin)
    assert sorted(taken)[len(taken) // 4] < 6e-3


def test_plans_are_kept_by_shape() -> None:
    planner = Planner(OUTLINE, "auto", "exact", 1, costs())
    assert planner.plan(Batch((Segment(3, 1000, 1),))) is planner.plan(Batch((Segment(5, 1010, 1),)))
    assert planner.plan(one_prompt(700)) is planner.plan(one_prompt(700))
    assert planner.plan(one_prompt(700)) is not planner.plan(one_prompt(701))


def test_wires_have_their_own_plans() -> None:
    planner = Planner(OUTLINE, "auto", "exact", 1, costs(0.5))
    exact, half = (planner.like("auto", wire).plan(one_prompt(1000)).predicted for wire in ("exact", "bf16"))
    assert exact is not None and half is not None and half.serial < exact.serial


def test_shares_by_speed() -> None:
    known: Costs = costs(ranks=(RANK.scaled(2.0), RANK))
    assert Planner(OUTLINE, "auto", "exact", costs=known).shares_by_speed((1.0, 1.0)) == (0.5, 1.0)
    alike = costs(ranks=(RANK, RANK))
    assert Planner(OUTLINE, "auto", "exact", costs=alike).shares_by_speed((2.0, 1.0)) == (1.0, 0.5)
