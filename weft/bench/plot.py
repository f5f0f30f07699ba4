"""Saving against link speed, as SVG, with the ceiling drawn in. Knows points of a grid; draws with matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from weft.bench.grid import Point
from weft.compare import Variant
from weft.timeline.figure import INK, figure, name

UNITS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}


def megabits(link: str) -> float | None:
    """A link's speed in Mbit/s; None if it has no fixed one."""
    match = re.fullmatch(r"(?:shaped:)?([\d.]+)(kbit|mbit|gbit)(?:,.*)?", link)
    return float(match[1]) * UNITS[match[2]] if match else None


def groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points that differ in their link only, slowest first; those without at least two speeds are left out."""
    by_group: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        if megabits(point.link) is not None:
            by_group.setdefault((point.ranks, point.tokens), []).append(point)
    return [sorted(group, key=lambda p: megabits(p.link) or 0.0) for group in by_group.values() if len(group) > 1]


def saving_plot(group: Sequence[Point]) -> str:
    """One picture: every variant's saving over the links, its range over the rounds, and what can be saved."""
    speeds = [megabits(point.link) or 0.0 for point in group]

    def draw(axes: Any) -> None:
        for wire in dict.fromkeys(m.like for m in group[0].measured):
            ceiling = [100 * point.serial(wire).saving_bound for point in group]
            axes.plot(speeds, ceiling, color=INK, linestyle="--", label=f"possible, {wire}")
        for number, variant in enumerate(_variants(group)):
            _line(axes, speeds, group, variant, f"C{number}")
        first = group[0]
        layout = f" ({first.layout.describe()})" if first.layout.several else ""
        title = f"{first.tokens} tokens, {first.ranks} ranks{layout}"
        name(axes, title, "link, Mbit/s", "prefill time saved, % of serial", speeds)

    return figure(draw)


def _variants(group: Sequence[Point]) -> list[Variant]:
    return [Variant(m.overlap, m.wire) for m in group[0].measured if m.overlap != "serial"]


def _line(axes: Any, speeds: list[float], group: Sequence[Point], variant: Variant, colour: str) -> None:
    several = len({m.wire for m in group[0].measured}) > 1
    measured = [next(m for m in point.measured if (m.overlap, m.wire) == variant) for point in group]
    lows, highs = zip(*(m.saving_range for m in measured), strict=True)
    label = f"{variant.overlap}, {variant.wire}" if several else variant.overlap
    axes.plot(speeds, [100 * m.saving for m in measured], marker="o", color=colour, label=label)
    axes.fill_between(speeds, [100 * x for x in lows], [100 * x for x in highs], color=colour, alpha=0.15)
