"""Which layout a group of workers is to have: the one that is predicted to be best, from costs of the one it has; or
which replicas, groups of their own, should take its place.

Knows planners, costs and machines' memory; starts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from msgspec import structs

from weft.admission import demand_memory, room_for_layers, room_for_tokens
from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError, NoRoom
from weft.execute.protocol import Hello
from weft.layout import Layout
from weft.plan.derived import derived, pace_of_ranks
from weft.plan.layouts import Aim, Rating, Workload, divisions, even_layout, layouts_of, rate
from weft.plan.planner import Planner
from weft.simulate.cost import Table

STILL = 0.95  # of what is free, that is so at the next start


class Apart(NamedTuple):
    """So many replicas, each of this layout, and what they give together."""

    replicas: int
    layout: Layout
    rating: Rating

    def __str__(self) -> str:
        return f"{self.replicas} replicas of {self.layout}"

    @property
    def options(self) -> str:
        """Of a command that starts them."""
        pp = len(self.layout.sections)
        return f"--replicas {self.replicas} --tp {self.layout.world // pp}" + (f" --pp {pp}" if pp > 1 else "")


class Decision(NamedTuple):
    """The best layout of one group, or replicas that are better than that; and a line with what all would give."""

    layout: Layout
    line: str
    apart: Apart | None = None


def chosen(
    planner: Planner, model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello], sums: Mapping[int, Table],
    aim: Aim,
) -> Decision:  # fmt: skip
    """What is best for the aim. The planner has the costs of the layout that is there."""
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
        return Decision(config.layout, f"layout {config.layout}: no other one fits, or divides so many ranks")
    best, rating = min(rated, key=lambda each: each[1].cost(aim.what, aim.load))
    apart = list(replicated(planner, model, config, hellos, sums, aim.load))
    better = min(apart, key=lambda each: each.rating.cost(aim.what, aim.load), default=None)
    if better is not None and better.rating.cost(aim.what, aim.load) >= rating.cost(aim.what, aim.load):
        better = None
    ratings = {str(layout): each for layout, each in rated} | {str(each): each.rating for each in apart}
    name = str(better) if better is not None and aim.replicas else str(best)
    what = f"{aim.what} of {aim.load.prompt} tokens and {aim.load.answer} of answer"
    first = f"layout {name} by cost ({what}, predicted): {aim.describe(ratings.pop(name))}"
    line = "; ".join([first, *(f"{other}: {aim.describe(each)}" for other, each in ratings.items())])
    if better is None:
        return Decision(best, line)
    if aim.replicas:
        return Decision(best, f"{line}. At once the next time: weft serve {better.options}", better)
    return Decision(best, f"{line}. Replicas would be better: weft serve {better.options}")


def replicated(
    planner: Planner, model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello], sums: Mapping[int, Table],
    load: Workload,
) -> Iterator[Apart]:  # fmt: skip
    """What replicas on these ranks would give: in the mean over them, each as much slower than the first one as its
    slowest rank is. Those that fit, with a full context of keys and values, or what the ranks have room for together:
    what one engine can serve, each of several must."""
    enough = min(config.max_length, room_for_tokens(model, config, hellos))
    for tp, pp, replicas in divisions(config.ranks, model.layers, model.heads):
        if replicas == 1:
            continue
        layout = even_layout(model.layers, tp, pp)
        groups = [range(first, first + layout.world) for first in range(0, config.ranks, layout.world)]
        divided = replace(config, layout=layout)
        if any(room_for_tokens(model, divided, _parts_of(hellos, ranks)) < enough for ranks in groups):
            continue
        assert planner.costs is not None, "layouts are chosen by costs"
        paces = pace_of_ranks(planner.costs, config.layout, planner.outline)
        times = [max(paces[rank] for rank in ranks) for ranks in groups]
        slower = [each / times[0] for each in times]
        rating, mean = rate(_planner(planner, layout, config, sums), load, replicas), sum(slower) / replicas
        yield Apart(replicas, layout, Rating(
            rating.first_token * mean, rating.bound * mean, rating.token * mean,
            rating.requests * sum(1 / each for each in slower) / replicas,
        ))  # fmt: skip


def _parts_of(hellos: Sequence[Hello], ranks: Sequence[int]) -> list[Hello]:
    """These ranks', with their part of what is free on their machine, and will be once they are started anew."""
    on = Counter(hello.machine for hello in hellos)
    own = Counter(hellos[rank].machine for rank in ranks)
    each = [hellos[rank] for rank in ranks]
    return [structs.replace(one, free=int(STILL * one.free * own[one.machine] / on[one.machine])) for one in each]


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
