"""Which layout a group of workers is to have: the one that is predicted to be best, from costs of the one it has.

Knows planners, costs and machines' memory; starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from weft.admission import demand_memory, room_for_layers
from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError, NoRoom
from weft.execute.protocol import Hello
from weft.layout import Layout
from weft.plan.derived import derived
from weft.plan.layouts import Aim, Rating, layouts_of, rate
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
    others = "; ".join(f"{layout}: {aim.describe(each)}" for layout, each in rated if layout != best)
    what = f"{aim.what} of {aim.load.prompt} tokens and {aim.load.answer} of answer"
    return best, f"layout {best} by cost ({what}, predicted): {aim.describe(rating)}" + (
        f"; {others}" if others else ""
    )


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
