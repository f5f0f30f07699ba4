"""Which sums a plan compresses: those that would else be exposed, as little as it takes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.outlines import decoder_outline
from tests.simulate.costs import costs
from weft.errors import InputError
from weft.plan.candidates import SIMPLER
from weft.plan.planner import Plan, Planner
from weft.plan.search import MARGIN
from weft.plan.wiring import Wiring, travels
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.text import parse, write
from weft.simulate.cost import Costs
from weft.wires import WIRES, allowed, needed

OUTLINE = decoder_outline(6)


def known(times: float) -> Costs:
    """Of a link with `times` the speed at which exact sums take as long as computation."""
    base = costs(times)
    exact = base.wires["exact"]
    return replace(
        base, wires={wire: replace(exact, element=b) for wire, b in zip(WIRES, (4, 2, 1.06, 0.59), strict=True)}
    )


def planned(times: float, wire: str, overlap: str = "auto", tokens: int = 1000) -> Plan:
    return Planner(OUTLINE, overlap, wire, 1, known(times)).plan(one_prompt(tokens))


def wires_of(plan: Plan) -> set[str]:
    """Of all sums but the last layer's of wanted rows."""
    steps = [step for block in plan.program.form.blocks for step in block.steps if travels(step) and not step.wanted]
    return {step.wire or plan.wire for step in steps}


def seconds(plan: Plan) -> float:
    assert plan.predicted is not None
    return plan.predicted.seconds


def test_wires_as_they_are_written() -> None:
    assert allowed("auto:int8") == ("exact", "bf16", "int8") and allowed("int4") == ("int4",)
    assert needed("int4") == ("int4", "int8") and needed("auto:int4") == WIRES and needed("bf16") == ("bf16",)
    for wrong in ("auto", "auto:", "auto:exact", "int3", "", "AUTO:int8", "auto:int8,int4"):
        with pytest.raises(InputError, match="is not known; allowed: exact, bf16, int8, int4, auto:bf16, auto:int8"):
            allowed(wrong)


@pytest.mark.parametrize("times", [2.0, 4.0, 100.0])
def test_what_hides_stays_exact(times: float) -> None:
    plan = planned(times, "auto:int4")
    assert wires_of(plan) == {"exact"}
    assert plan.why == ("all sums exact: with fewer bytes the pass would take hardly less",)
    assert not planned(times, "exact").why


@pytest.mark.parametrize("times", [0.02, 0.05])
def test_where_even_the_smallest_is_exposed_all_are_the_smallest(times: float) -> None:
    plan = planned(times, "auto:int8")
    assert wires_of(plan) == {"int8"} and len(plan.why) == 1
    assert plan.why[0].startswith("all sums as int8: on bf16 each alone would be exposed for ")


@pytest.mark.parametrize("times", [0.1, 0.2, 0.3, 0.42, 0.5, 0.6, 0.7, 0.85, 1.0, 1.3])
@pytest.mark.parametrize("least", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("overlap", ["auto", "iso:2", "iso:3"])
def test_as_fast_as_the_least_exact_and_no_less_exact_than_it_takes(times: float, least: str, overlap: str) -> None:
    chosen, fastest = planned(times, f"auto:{least}", overlap), planned(times, least, overlap)
    assert seconds(chosen) <= (1 + 3 * SIMPLER) * seconds(fastest)
    # One step more exact all along, on a link that is a little slower, costs time that can be seen.
    more = allowed(f"auto:{least}")
    least_used = max(wires_of(chosen), key=WIRES.index)
    if least_used != "exact":
        up = more[more.index(least_used) - 1]
        careful = Planner(OUTLINE, str(chosen.strategy), up, 1, known(times).scaled(1.0, 1 + MARGIN)).plan(
            one_prompt(1000)
        )
        assert seconds(careful) > seconds(fastest)


def test_some_sums_only() -> None:
    """Between what hides whole and what doesn't, a few sums are compressed, and the plan says which and why."""
    mixed = [plan for times in range(20, 100, 4) if len(wires_of(plan := planned(times / 100, "auto:int8"))) > 1]
    assert len(mixed) >= 5
    for plan in mixed:
        assert plan.why and all("each alone would be exposed" in line for line in plan.why)
        assert re.search(rf"wire {plan.wire} · \w+: (attention|mlp) \d+:\d+", plan.describe())
        assert parse(write(plan.program)) == plan.program, "wires are part of the step, and of its text"


def test_more_exact_wires_never_cost_what_a_plan_gains() -> None:
    """Wires are compared at the strategy that is best for each."""
    for times in (0.3, 0.5, 0.7, 0.9):
        exact, chosen = planned(times, "exact"), planned(times, "auto:int8")
        assert seconds(chosen) <= 1.001 * seconds(exact)


def test_few_rows_stay_exact_where_bytes_hardly_matter() -> None:
    """A token's sums take what any message takes."""
    batch = Batch((Segment(0, 500, 1),))
    plan = Planner(OUTLINE, "auto", "auto:int4", 1, known(20.0)).plan(batch)
    assert wires_of(plan) <= {"exact"} and plan.wire == "exact"


def test_the_last_sums_are_never_below_int8() -> None:
    """Nothing that comes after makes up for what they lack."""
    program = planned(0.05, "int4").program
    last = [step for block in program.form.blocks for step in block.steps if step.wanted and travels(step)]
    assert last and {step.wire for step in last} == {"int8"}
    assert Wiring("int8").on(program).form.blocks  # and others are left as they are
    without = Planner(OUTLINE, "serial", "int4").plan(one_prompt(100))
    assert without.predicted is None and {s.wire for b in without.program.form.blocks for s in b.steps} == {"", "int8"}


def test_without_costs_all_are_the_smallest() -> None:
    """A link that is too slow to be measured is slow."""
    plan = Planner(OUTLINE, "auto", "auto:int8").plan(one_prompt(1000))
    assert plan.wire == "int8" and plan.predicted is None and str(plan.strategy) == "serial"


def test_costs_of_other_wires_are_not_taken_for_these() -> None:
    planner = Planner(OUTLINE, "auto", "int4", 1, costs())
    assert not planner.knows_costs and planner.plan(one_prompt(100)).predicted is None
