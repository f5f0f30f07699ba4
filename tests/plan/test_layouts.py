"""Layouts: which there are, what they are predicted to give, and which is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.outlines import decoder_outline
from tests.simulate.costs import NOTHING, RANK, costs
from weft.errors import InputError
from weft.layout import Layout
from weft.plan.derived import FIXED, derived
from weft.plan.layouts import Aim, Workload, divisions, even_layout, layouts_of, rate
from weft.plan.planner import Planner
from weft.simulate.cost import Contention, Costs, Table

OUTLINE = decoder_outline(12)
LOAD = Workload(prompt=512, answer=64, requests=8)


def known(delay: float = 0.0, rate: float = 1e9, world: int = 2) -> Costs:
    """Of a pipeline: ranks with whole layers, over a link of so many bytes a second and seconds."""
    send = Table.line(delay + 5e-5, 1 / rate)
    wires = {name: replace(wire, send=send, sums={"exchange": NOTHING}) for name, wire in costs().wires.items()}
    begins = replace(RANK, body=RANK.body | {"head": NOTHING})
    ends = replace(RANK, body=RANK.body | {"embed": NOTHING})
    ranks = (begins, *[replace(begins, body=begins.body | {"embed": NOTHING})] * (world - 2), ends)
    return replace(costs(), ranks=ranks, wires=wires, world=world, contention=Contention())


def sums(delay: float = 0.0, rate: float = 1e9) -> dict[int, Table]:
    return {2: Table.line(delay + 5e-5, 1 / rate), 4: Table.line(2 * delay + 1e-4, 1.5 / rate)}


def best(delay: float, speed: float, aim: Aim, world: int = 2) -> Layout:
    base = even_layout(12, 1, world)

    def cost(layout: Layout) -> float:
        of = derived(known(delay, speed, world), base, layout, OUTLINE, sums(delay, speed))
        planner = Planner(OUTLINE, "auto", "exact", costs=of, layout=layout)
        return rate(planner, aim.load).cost(aim.what, aim.load)

    return min(layouts_of(world, 12, 12), key=cost)


def test_which_there_are() -> None:
    assert list(divisions(4, 12, 12)) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    assert list(divisions(4, 3, 2)) == [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1)]
    assert [str(layout) for layout in layouts_of(4, 12, 12)] == ["tp 1 x pp 4", "tp 2 x pp 2", "tp 4"]
    assert even_layout(7, 2, 2, (1, 2, 3, 4)) == Layout((4, 3), ((1, 2), (3, 4)))


def test_a_part_of_a_layer_takes_its_part() -> None:
    base, tensor = even_layout(12, 1, 2), Layout.tensor(12, (1, 3))
    of = derived(known(), base, tensor, OUTLINE, sums())
    for rank, part in enumerate((0.25, 0.75)):
        before, after = RANK.whole["mlp"].at(256), of.ranks[rank].whole["mlp"].at(256)
        assert after == pytest.approx(part * before + 2 * (1 - part) * FIXED)
        assert of.ranks[rank].past == part * RANK.past
        assert of.ranks[rank].body["embed"] == RANK.body["embed"]  # whole on each
        assert of.ranks[rank].body["head"].at(1) == pytest.approx(part * RANK.body["head"].at(1))
    assert of.wires["exact"].sums["exchange"] == sums()[2]
    again = derived(known(), base, base, OUTLINE, sums())
    assert again.ranks[0].body["head"] == NOTHING == again.ranks[1].body["embed"]
    assert again.ranks[1].body["head"].at(1) == pytest.approx(RANK.body["head"].at(1))


def test_slow_links_want_pipelines_and_fast_ones_none() -> None:
    """Where sums take next to nothing, all read a token's weights at once; where they wait, rows go on once."""
    latency = Aim("latency", LOAD)
    assert str(best(0.0, 1e11, latency)) == "tp 2"
    assert str(best(0.01, 1e7, latency)) == "tp 1 x pp 2"
    assert str(best(0.01, 1e7, Aim("throughput", LOAD), world=4)) == "tp 1 x pp 4"


def test_a_pipeline_is_rated_by_its_busiest_section_and_its_round() -> None:
    layout, delay = even_layout(12, 1, 2), 0.005
    planner = Planner(OUTLINE, "auto", "exact", costs=known(delay), layout=layout)
    rating = rate(planner, LOAD)
    assert rating.bound < rating.first_token < 2 * rating.bound
    assert 2 * delay < rating.token < 2 * delay + 0.05  # there and back
    prompts = rate(planner, replace(LOAD, answer=1))
    assert prompts.requests == pytest.approx(1 / rating.bound, rel=0.15)  # batches follow each other


@pytest.mark.parametrize(("text", "what", "load"), [
    ("latency", "latency", Workload()), ("throughput", "throughput", Workload()),
    ("latency:2048,1", "latency", Workload(2048, 1)),
])  # fmt: skip
def test_aims(text: str, what: str, load: Workload) -> None:
    assert Aim.parse(text) == Aim(what, load)


@pytest.mark.parametrize(
    "text", ["", "speed", "latency:", "latency:5", "latency:0,1", "latency:8,00", "throughput:1,2,3"]
)
def test_aims_that_say_nothing(text: str) -> None:
    with pytest.raises(InputError, match="--optimise .* is not known; give latency or throughput"):
        Aim.parse(text)


def test_loads_within_a_context() -> None:
    assert Workload(1024, 128).within(512) == Workload(510, 1, 8) and Workload(1024, 128).within(1100) == Workload(
        1024, 75, 8
    )
    assert Workload(1024, 128).within(9000) == Workload(1024, 128)
