"""Which layout a group of workers is to have: the one that is predicted to be best, from costs of the one it has; and
what replicas, which are groups of their own, would give in its place.

Knows planners, costs and machines' memory; starts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from msgspec import structs

from weft.admission import demand_memory, room_for_layers
from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError, NoRoom
from weft.execute.protocol import Hello
from weft.layout import Layout
from weft.plan.derived import derived, pace_of_ranks
from weft.plan.layouts import Aim, Rating, Workload, divisions, even_layout, layouts_of, rate
from weft.plan.planner import Planner
from weft.simulate.cost import Table


def chosen(
    planner: Planner, model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello], sums: Mapping[int, Table],
    aim: Aim,
) -> tuple[Layout, str]:  # fmt: skip
    """The best layout, and a line with what others would give. The planner has the costs of the one that is there."""
    aim = replace(aim, load=aim.load.within(config.max_length))
    rated: list[tuple[Layout, Rating]] = []
    for even in layouts_of(config.ranks, model.layers, model.heads):
        layout, fitting = even, replace(config, layout=even)
        try:
            if even.several:
                layout = _by_speed(planner, even, config, room_for_layers(model, fitting, hellos), sums)
                fitting = replace(config, layout=layout)
            demand_memory(model, fitting, hellos)
        except (NoRoom, InputError):
            continue
        rated.append((layout, rate(_planner(planner, layout, config, sums), aim.load)))
    if not rated:
        return config.layout, f"layout {config.layout}: no other one fits, or divides so many ranks"
    best, rating = min(rated, key=lambda each: each[1].cost(aim.what, aim.load))
    others = [f"{layout}: {aim.describe(each)}" for layout, each in rated if layout != best]
    apart = list(replicated(planner, model, config, hellos, sums, aim.load))
    others += [f"{each.replicas} replicas of {each.layout}: {aim.describe(each.rating)}" for each in apart]
    what = f"{aim.what} of {aim.load.prompt} tokens and {aim.load.answer} of answer"
    line = "; ".join([f"layout {best} by cost ({what}, predicted): {aim.describe(rating)}", *others])
    most = min(apart, key=lambda each: each.rating.cost(aim.what, aim.load), default=None)
    if most is not None and most.rating.cost(aim.what, aim.load) < rating.cost(aim.what, aim.load):
        pp = len(most.layout.sections)
        line += f". Replicas would be better: weft serve --replicas {most.replicas} --tp {most.layout.world // pp}"
        line += f" --pp {pp}" if pp > 1 else ""
    return best, line


class Apart(NamedTuple):
    """So many replicas, each of this layout, and what they give together."""

    replicas: int
    layout: Layout
    rating: Rating


def replicated(
    planner: Planner, model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello], sums: Mapping[int, Table],
    load: Workload,
) -> Iterator[Apart]:  # fmt: skip
    """What replicas on these ranks would give that fit into their memory: the first one's, and so much of it of each
    other one as that one's slowest rank is fast."""
    for tp, pp, replicas in divisions(config.ranks, model.layers, model.heads):
        if replicas == 1:
            continue
        layout = even_layout(model.layers, tp, pp)
        groups = [range(first, first + layout.world) for first in range(0, config.ranks, layout.world)]
        try:
            for ranks in groups:
                demand_memory(model, replace(config, layout=layout), _parts_of(hellos, ranks))
        except NoRoom:
            continue
        assert planner.costs is not None, "layouts are chosen by costs"
        paces = pace_of_ranks(planner.costs, config.layout, planner.outline)
        slowest = [max(paces[rank] for rank in ranks) for ranks in groups]
        rating = rate(_planner(planner, layout, config, sums), load, replicas)
        share = sum(slowest[0] / each for each in slowest) / replicas
        yield Apart(replicas, layout, replace(rating, requests=rating.requests * share))


def _parts_of(hellos: Sequence[Hello], ranks: Sequence[int]) -> list[Hello]:
    """These ranks', with their part of what is free on their machine."""
    on = Counter(hello.machine for hello in hellos)
    own = Counter(hellos[rank].machine for rank in ranks)
    each = [hellos[rank] for rank in ranks]
    return [structs.replace(one, free=one.free * own[one.machine] // on[one.machine]) for one in each]


def _planner(planner: Planner, layout: Layout, config: EngineConfig, sums: Mapping[int, Table]) -> Planner:
    """Of another layout."""
    assert planner.costs is not None, "layouts are chosen by costs"
    costs = derived(planner.costs, config.layout, layout, planner.outline, sums)
    return Planner(planner.outline, planner.overlap, planner.wire, planner.granule, costs, layout=layout)


def _by_speed(
    planner: Planner, layout: Layout, config: EngineConfig, most: Sequence[int], sums: Mapping[int, Table]
) -> Layout:  # fmt: skip
    """With layers as the sections' speeds call for."""
    found = _planner(planner, layout, config, sums).layers_by_speed(most)
    return replace(layout, layers=found.layers)
