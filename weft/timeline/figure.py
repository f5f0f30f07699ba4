"""Plots as SVG that take the page's colours, light or dark. Draws with matplotlib; knows nothing of what is plotted."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

INK = "#010203"  # stands for the colour of the text around, which matplotlib has no name for
STYLE = (
    ".plot{max-width:100%;height:auto;color:#1f2933}.plot text{fill:currentColor}"
    "@media (prefers-color-scheme:dark){.plot{color:#e4e7eb}}"
)


def figure(draw: Callable[[Any], None]) -> str:
    """One picture; `draw` is given the axes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        picture, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
        draw(axes)
        _dress(axes)
        text = io.StringIO()
        picture.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(picture)
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    head, _, rest = svg.replace("<svg ", '<svg class="plot" ', 1).partition(">")
    return f"{head}><style>{STYLE}</style>{rest}"


def name(axes: Any, title: str, across: str, up: str, ticks: Sequence[float]) -> None:
    """Names of the whole and of both axes; `ticks` stand on the one across, which is logarithmic."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_title(title, color=INK)


def _dress(axes: Any) -> None:
    axes.tick_params(colors=INK, which="both")
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)
    axes.legend(frameon=False, labelcolor=INK)
