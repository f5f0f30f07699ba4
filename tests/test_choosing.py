"""Which layout is chosen from costs and memory, and what is said of replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulate.costs import NOTHING, RANK, costs
from weft.admission import room_for_tokens, weights_needed
from weft.choosing import STILL, chosen, replicated
from weft.config import EngineConfig, ModelConfig
from weft.execute.protocol import Hello
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.plan.layouts import LATENCY, THROUGHPUT, Aim, Workload, even_layout, rate
from weft.plan.planner import Planner
from weft.simulate.cost import Contention, Table

LOAD = Workload(prompt=256, answer=32, requests=8)
SLOW = {1: Table.line(0.05, 1e-6), 2: Table.line(0.05, 1e-6)}  # seconds of a message, and of a sum


def hello(rank: int, free: int, machine: str = "") -> Hello:
    return Hello(0, rank, "", "host", 0, "", machine or str(rank), free, 1)


class Known:
    """Two ranks of whole layers; the second one takes so many times as long."""

    def __init__(self, path: Path, times: float = 1.0, world: int = 2) -> None:
        self.model: ModelConfig = model_config(path)
        self.config = EngineConfig(even_layout(self.model.layers, 1, world))
        body, tail = ({part: table.scaled(times) for part, table in each.items()} for each in (RANK.body, RANK.tail))
        other = replace(RANK, body=body, tail=tail, past=RANK.past * times, present=RANK.present.scaled(times))
        wires = {name: replace(wire, send=SLOW[1], sums={"exchange": NOTHING}) for name, wire in costs().wires.items()}
        self.costs = replace(
            costs(), ranks=(RANK, *[other] * (world - 1)), wires=wires, world=world, contention=Contention()
        )
        outline = blueprint_of(self.model).outline
        self.planner = Planner(outline, "auto", "exact", costs=self.costs, layout=self.config.layout)


def test_over_a_slow_link_replicas_are_said_to_be_better(packaged: Path) -> None:
    known = Known(packaged)
    hellos = [hello(0, 1 << 40), hello(1, 1 << 40)]
    given = known.planner, known.model, known.config, hellos, SLOW
    layout, line, apart = chosen(*given, Aim(THROUGHPUT, LOAD))
    assert layout.several and "; 2 replicas of tp 1: " in line and apart is None
    assert line.endswith("Replicas would be better: weft serve --replicas 2 --tp 1")
    _, line, apart = chosen(*given, Aim(THROUGHPUT, LOAD, replicas=True))
    assert apart is not None and (apart.replicas, apart.layout.world) == (2, 1)
    assert line.startswith("layout 2 replicas of tp 1 by cost ") and f"; {layout}: " in line and "better" not in line
    assert line.endswith("At once the next time: weft serve --replicas 2 --tp 1")


def test_replicas_that_are_not_better_are_not_chosen(packaged: Path) -> None:
    """Over links without latency, an answer comes sooner from two ranks than from one."""
    known = Known(packaged)
    hellos = [hello(0, 1 << 40), hello(1, 1 << 40)]
    fast = {1: Table.line(0.0, 1e-12), 2: Table.line(0.0, 1e-12)}
    known.planner.learn(replace(known.costs, wires={
        name: replace(wire, send=fast[1]) for name, wire in known.costs.wires.items()
    }))  # fmt: skip
    aim = Aim(LATENCY, LOAD, replicas=True)
    layout, line, apart = chosen(known.planner, known.model, known.config, hellos, fast, aim)
    assert apart is None and line.startswith(f"layout {layout} by cost ") and "; 2 replicas of tp 1: " in line


def test_a_slower_replica_gives_less(packaged: Path) -> None:
    hellos = [hello(0, 1 << 40), hello(1, 1 << 40)]
    each = {}
    for times in (1.0, 2.0):
        known = Known(packaged, times)
        [apart] = replicated(known.planner, known.model, known.config, hellos, SLOW, LOAD)
        assert apart.replicas == 2 and apart.layout.world == 1
        each[times] = apart.rating.requests
    assert each[2.0] == pytest.approx(0.75 * each[1.0], rel=0.02)


def test_replicas_that_memory_does_not_hold_are_left_out(packaged: Path) -> None:
    """Each needs a full context of keys and values, too, and a little more, as less may be free at the next start."""
    known = Known(packaged)
    alone = replace(known.config, layout=even_layout(known.model.layers, 1, 1))
    [whole] = weights_needed(known.model, alone)
    free = whole
    while room_for_tokens(known.model, alone, [hello(0, free)]) < alone.max_length:
        free += 1 << 10
    assert free > 1.2 * whole
    enough, given = int(free / STILL) + 1, (known.planner, known.model, known.config)
    both = [hello(0, 2 * enough, "a"), hello(1, 2 * enough, "a")]
    assert list(replicated(*given, both, SLOW, LOAD))
    short = [hello(0, 2 * free, "a"), hello(1, 2 * free, "a")]
    assert not list(replicated(*given, short, SLOW, LOAD)), "two on one machine need twice as much"
    assert list(replicated(*given, [hello(0, enough), hello(1, enough)], SLOW, LOAD))
    assert not list(replicated(*given, [hello(0, enough), hello(1, free)], SLOW, LOAD))


def test_less_than_a_context_is_enough_where_one_engine_has_no_more(packaged: Path) -> None:
    known = Known(packaged)
    [whole] = weights_needed(known.model, replace(known.config, layout=even_layout(known.model.layers, 1, 1)))
    for free, able in ((whole, False), (int(1.1 * whole), False), (4 * whole, True)):
        hellos = [hello(0, free), hello(1, free)]
        found = list(replicated(known.planner, known.model, known.config, hellos, SLOW, LOAD))
        assert bool(found) == able, (free, whole)


def test_latency_of_replicas_is_in_the_mean_over_them(packaged: Path) -> None:
    """Lone requests go to all of them in turns."""
    hellos, each = [hello(0, 1 << 40), hello(1, 1 << 40)], {}
    for times in (1.0, 5.0):
        known = Known(packaged, times)
        [apart] = replicated(known.planner, known.model, known.config, hellos, SLOW, LOAD)
        each[times] = apart.rating
    assert each[5.0].first_token == pytest.approx(3 * each[1.0].first_token, rel=0.05)
    assert each[5.0].token == pytest.approx(3 * each[1.0].token, rel=0.05)


def test_requests_are_of_as_many_replicas_as_have_one(packaged: Path) -> None:
    planner = Known(packaged).planner
    few = replace(LOAD, requests=2)
    assert rate(planner, few, 4).requests == pytest.approx(rate(planner, few, 2).requests)


def test_where_nothing_divides_so_many_ranks_the_layout_stays(packaged: Path) -> None:
    known = Known(packaged, world=2)
    hellos = [hello(0, 0), hello(1, 0)]
    layout, line, apart = chosen(known.planner, known.model, known.config, hellos, SLOW, Aim(THROUGHPUT, LOAD))
    assert layout == known.config.layout and "no other one fits" in line and apart is None
