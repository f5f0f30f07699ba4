"""Costs of layouts that are not loaded, from those of one that is: layers are alike, so a part of one takes its part.

Knows costs and layouts; knows nothing of how costs were measured. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weft.layout import Layout
from weft.program.stages import Outline
from weft.simulate.cost import NOTHING, ComputeCosts, Costs, Table, WireCosts

FIXED = 20e-6  # seconds of a step that are no part of its work: calls, and waking


def derived(costs: Costs, base: Layout, layout: Layout, outline: Outline, sums: Mapping[int, Table]) -> Costs:
    """`costs` are of `base`, whose ranks are the same ones; `sums`: seconds against bytes, by how many ranks sum; of
    one, those of a message to the next section, where `base` has none."""
    ends = {stage.part for stage in (*outline.before, *outline.after)}
    first, last = costs.ranks[base.sections[0].ranks[0]], costs.ranks[base.leader]
    before = {stage.part: first.body[stage.part] for stage in outline.before}
    after = {stage.part: last.body[stage.part] for stage in outline.after}
    parts = [_parts(each) for each in (base, layout)]
    ranks = []
    for rank in range(layout.world):
        section, own = layout.section_of(rank), costs.ranks[rank]
        factor = parts[1][rank] / parts[0][rank]
        body = {part: _scaled(table, factor) for part, table in own.body.items() if part not in ends}
        tail = {part: _scaled(table, factor) for part, table in own.tail.items() if part not in ends}
        body |= before if section.first == 0 else dict.fromkeys(before, NOTHING)
        slower = _speed(own, outline) / parts[0][rank] / (_speed(last, outline) / parts[0][base.leader])
        head = parts[1][rank] / parts[0][base.leader] * slower
        body |= {
            part: table.scaled(head) if section.stop == sum(layout.layers) else NOTHING for part, table in after.items()
        }
        tail |= dict.fromkeys(ends, NOTHING)
        ranks.append(replace(
            own, body=body, tail=tail, present=own.present.scaled(factor), past=own.past * factor,
            one=own.one * factor, keyed=own.keyed * factor,
        ))  # fmt: skip
    most = max(map(len, layout.shares))
    wires = {name: _wire(wire, sums.get(most, NOTHING), most) for name, wire in costs.wires.items()}
    wires = {name: replace(wire, send=sums[1]) if 1 in sums else wire for name, wire in wires.items()}
    return replace(costs, ranks=tuple(ranks), wires=wires, world=layout.world)


def pace_of_ranks(costs: Costs, base: Layout, outline: Outline) -> list[float]:
    """Seconds of a whole layer for some rows, of each rank alone."""
    return [_speed(rank, outline) / part for rank, part in zip(costs.ranks, _parts(base), strict=True)]


def _parts(layout: Layout) -> list[float]:
    """Of a layer, what each rank has."""
    return [share / sum(section.shares) for section in layout.sections for share in section.shares]


def _speed(rank: ComputeCosts, outline: Outline) -> float:
    """Seconds of a layer for some rows, in proportion to which the head's are."""
    return sum(rank.whole[stage.part].at(64) for stage in outline.layer)


def _scaled(table: Table, factor: float) -> Table:
    return Table(table.sizes, tuple(min(s, FIXED) + max(0.0, s - FIXED) * factor for s in table.seconds))


def _wire(wire: WireCosts, seconds: Table, ranks: int) -> WireCosts:
    """With sums of so many ranks, by whatever algorithm was measured."""
    if ranks == 1:
        return replace(wire, sums={"exchange": NOTHING}, hop=NOTHING)
    return replace(wire, sums={"exchange" if ranks == 2 else "two-shot": seconds}, hop=seconds.scaled(0.5))
