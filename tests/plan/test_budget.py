"""How many tokens a batch may have so that it takes no longer than wanted."""

from __future__ import annotations

from tests.outlines import decoder_outline
from tests.simulate.costs import costs
from weft.plan.budget import AT_LEAST, FIRST, SIZES, Budget
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment, one_prompt


def decoding(count: int, start: int = 100) -> list[Segment]:
    return [Segment(slot, start, 1) for slot in range(count)]


def test_by_plans_a_batch_takes_no_longer_than_wanted() -> None:
    planner = Planner(decoder_outline(4), "auto", "exact", costs=costs())
    budget = Budget(planner)

    def seconds(rows: int) -> float:
        plan = planner.plan(Batch((*decoding(4, 128), Segment(4, 0, rows))))
        assert plan.predicted is not None
        return plan.predicted.seconds

    wanted = seconds(300)
    rows = budget.rows(wanted, decoding(4), 8192) - 4
    assert rows in SIZES and seconds(rows) <= wanted < seconds(SIZES[SIZES.index(rows) + 1])
    assert budget.rows(wanted, decoding(4), 100) == 100, "never more than is allowed"
    assert budget.rows(1e-9, decoding(4), 8192) >= 4 + SIZES[0], "prompts come on in any case"
    assert budget.rows(1e9, (), 8192) == SIZES[-1]


def test_where_decoding_is_slow_already_prompts_may_make_it_half_as_slow_again() -> None:
    planner = Planner(decoder_outline(4), "auto", "exact", costs=costs())
    alone = planner.plan(Batch(tuple(decoding(4, 128)))).predicted
    assert alone is not None
    assert Budget(planner).rows(alone.seconds / 10, decoding(4), 8192) == Budget(planner).rows(
        AT_LEAST * alone.seconds, decoding(4), 8192
    )


def test_answers_go_on_together_however_small_batches_are_to_be() -> None:
    planner = Planner(decoder_outline(4), "auto", "exact", costs=costs())
    assert (
        Budget(planner).tokens(None, decoding(16), 8) == 16 and Budget(planner).tokens(None, decoding(4), 8192) == 8192
    )


def test_by_experience_where_no_costs_are_known() -> None:
    budget = Budget(Planner(decoder_outline(4), "serial", "exact"))
    assert budget.rows(0.2, (), 8192) == FIRST
    for _ in range(5):
        budget.observe(one_prompt(1000), 1.0)
        budget.observe(Batch(tuple(decoding(4))), 0.05)
    assert budget.rows(0.2, (), 8192) == 200
    assert budget.rows(0.2, decoding(4), 8192) == 154
