"""Costs that have changed are noticed."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tests.outlines import decoder_outline
from tests.simulate.costs import costs
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment, one_prompt
from weft.simulate.cost import Costs

OUTLINE = decoder_outline(8)
PROMPT = one_prompt(800)


def serve(planner: Planner, truth: Costs, batch: Batch, batches: int, random: Random) -> int | None:
    """Runs batches that take what `truth` says, give or take a tenth; how many until the costs were corrected."""
    for number in range(1, batches + 1):
        plan = planner.plan(batch)
        real = Planner(OUTLINE, str(plan.strategy), "exact", 1, truth).plan(batch).predicted
        assert real is not None
        noise = [random.uniform(0.9, 1.1) for _ in range(2)]
        if planner.observe(plan, batch, real.lanes.compute * noise[0], real.lanes.network * noise[1]):
            return number
    return None


@pytest.mark.parametrize("factor", [1.5, 3.0, 0.5])
def test_a_slower_link_is_noticed_within_20_batches(factor: float) -> None:
    random, planner = Random(1), Planner(OUTLINE, "auto", "exact", 1, costs(4.0))
    assert serve(planner, costs(4.0), PROMPT, 40, random) is None
    noticed = serve(planner, costs(4.0 / factor), PROMPT, 20, random)
    assert noticed is not None and noticed <= 20
    for _ in range(5):  # the median follows
        serve(planner, costs(4.0 / factor), PROMPT, 5, random)
    assert planner.drift.factors[False].network == pytest.approx(factor, rel=0.2)
    assert planner.drift.factors[True].network == 1.0  # nothing was seen of small batches
    said = planner.drift.describe()
    assert said is not None and "communication takes " in said and " times as long for prompts, and plans fol" in said


def test_the_plan_follows() -> None:
    """On a fast link this prompt isn't cut; when the link turns out slow, it is."""
    planner, random = Planner(OUTLINE, "auto", "exact", 1, costs(60.0)), Random(2)
    assert str(planner.plan(PROMPT).strategy) == "serial"
    for _ in range(4):
        serve(planner, costs(1.0), PROMPT, 12, random)
    assert str(planner.plan(PROMPT).strategy) != "serial"


def test_computation_and_small_batches_are_told_apart() -> None:
    decoding = Batch((Segment(0, 100, 1), Segment(1, 200, 1)))
    slow = replace(costs(), ranks=tuple(rank.scaled(1.4) for rank in costs().ranks))
    planner, random = Planner(OUTLINE, "auto", "exact", 1, costs()), Random(3)
    assert serve(planner, slow, decoding, 20, random) is not None
    assert planner.drift.factors[True].compute > 1.2 and planner.drift.factors[False].compute == 1.0


def test_noise_that_comes_and_goes_finds_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short batches' times are noisy; searching anew each time took longer than the batches themselves."""
    planner, random, judged = Planner(OUTLINE, "auto", "exact", 1, costs()), Random(5), list[Batch]()
    judge = planner.search.best
    monkeypatch.setattr(planner.search, "best", lambda batch, *rest: judged.append(batch) or judge(batch, *rest))
    decoding, changed = Batch((Segment(0, 100, 1),)), 0
    planner.plan(PROMPT)
    for _ in range(500):
        plan = planner.plan(decoding)
        assert plan.predicted is not None
        busy = plan.predicted.lanes.compute / plan.predicted.factors.compute
        changed += planner.observe(plan, decoding, busy * random.choice([0.8, 1.0, 1.3, 1.6]), 0.0)
        planner.plan(PROMPT)
    assert changed > 20, "this noise is taken for drift again and again"
    assert len(judged) < 20 and judged.count(one_prompt(800)) == 1, "what prompts take did not change"


def test_odd_batches_are_not_drift() -> None:
    planner, random = Planner(OUTLINE, "auto", "exact", 1, costs()), Random(4)
    for _ in range(12):
        assert serve(planner, costs(), PROMPT, 4, random) is None
        plan = planner.plan(PROMPT)
        assert plan.predicted is not None
        planner.observe(plan, PROMPT, plan.predicted.lanes.compute * 5, plan.predicted.lanes.network * 5)
    assert planner.drift.describe() is None


def test_nothing_is_learnt_without_a_prediction() -> None:
    planner = Planner(OUTLINE, "iso:2", "exact")
    assert not planner.observe(planner.plan(PROMPT), PROMPT, 1.0, 1.0)
