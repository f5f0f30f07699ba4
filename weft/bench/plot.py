"""Saving against link speed, as SVG, with the ceiling drawn in. Knows points of a grid; draws with matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from weft.bench.grid import Point
from weft.compare import Variant

INK = "#010203"  # stands for the colour of the text around, which matplotlib has no name for
STYLE = (
    ".plot{max-width:100%;height:auto;color:#1f2933}.plot text{fill:currentColor}"
    "@media (prefers-color-scheme:dark){.plot{color:#e4e7eb}}"
)
UNITS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}


def megabits(link: str) -> float | None:
    """A link's speed in Mbit/s; None if it has no fixed one."""
    match = re.fullmatch(r"([\d.]+)(kbit|mbit|gbit)", link)
    return float(match[1]) * UNITS[match[2]] if match else None


def groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points that differ in their link only, slowest first; those without at least two speeds are left out."""
    found: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        if megabits(point.link) is not None:
            found.setdefault((point.tp, point.tokens), []).append(point)
    return [sorted(group, key=lambda p: megabits(p.link) or 0.0) for group in found.values() if len(group) > 1]


def saving_plot(group: Sequence[Point]) -> str:
    """One picture: every variant's saving over the links, its range over the rounds, and what can be saved."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
        speeds = [megabits(point.link) or 0.0 for point in group]
        for wire in dict.fromkeys(m.wire for m in group[0].measured):
            ceiling = [100 * point.serial(wire).saving_bound for point in group]
            axes.plot(speeds, ceiling, color=INK, linestyle="--", label=f"possible, {wire}")
        for number, variant in enumerate(_variants(group)):
            _line(axes, speeds, group, variant, f"C{number}")
        _dress(axes, speeds, group[0])
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    head, _, rest = svg.replace("<svg ", '<svg class="plot" ', 1).partition(">")
    return f"{head}><style>{STYLE}</style>{rest}"


def _variants(group: Sequence[Point]) -> list[Variant]:
    return [Variant(m.overlap, m.wire) for m in group[0].measured if m.overlap != "serial"]


def _line(axes: Any, speeds: list[float], group: Sequence[Point], variant: Variant, colour: str) -> None:
    several = len({m.wire for m in group[0].measured}) > 1
    measured = [next(m for m in point.measured if (m.overlap, m.wire) == variant) for point in group]
    lows, highs = zip(*(m.saving_range for m in measured), strict=True)
    label = f"{variant.overlap}, {variant.wire}" if several else variant.overlap
    axes.plot(speeds, [100 * m.saving for m in measured], marker="o", color=colour, label=label)
    axes.fill_between(speeds, [100 * x for x in lows], [100 * x for x in highs], color=colour, alpha=0.15)


def _dress(axes: Any, speeds: list[float], first: Point) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(speeds, [f"{speed:g}" for speed in speeds])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("link, Mbit/s", color=INK)
    axes.set_ylabel("prefill time saved, % of serial", color=INK)
    axes.set_title(f"{first.tokens} tokens, {first.tp} ranks", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)
    axes.legend(frameon=False, labelcolor=INK)
