"""Draws timelines in the terminal.

Knows timelines and rich; knows nothing of how they were made.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from weft.timeline.timeline import Event, Timeline

# One letter and colour a part, so that a drawing without colours reads too.
STYLES = {"attention": ("A", "cyan"), "mlp": ("M", "yellow"), "embed": ("E", "magenta"), "head": ("H", "magenta")}
IDLE = "·"


def terminal(timeline: Timeline, width: int = 100) -> RenderableType:
    """A row for each lane of a rank; a column is the part of the model that fills most of its time."""
    begin = timeline.begin
    scale = timeline.seconds / width if timeline.events else 1.0
    lines = [_axis(timeline.seconds, width)]
    for rank in timeline.ranks:
        for lane in timeline.lanes:
            lines.append(_row(timeline.lane(rank, lane), f"rank {rank} {lane:<8}", begin, scale, width))
    lines.append(_legend(timeline))
    return Group(*lines)


def _row(events: list[Event], label: str, begin: float, scale: float, width: int) -> Text:
    row = Text(f"{label} ", style="bold")
    for column in range(width):
        left = begin + column * scale
        letter, colour = _fills_most(events, left, left + scale)
        row.append(letter, style=colour)
    return row


def _fills_most(events: list[Event], left: float, right: float) -> tuple[str, str]:
    shown = {event: min(event.stop, right) - max(event.start, left) for event in events}
    best = max(shown, key=lambda event: shown[event], default=None)
    busy = sum(seconds for seconds in shown.values() if seconds > 0)
    if best is None or busy < (right - left) / 2:
        return IDLE, "dim"
    return STYLES.get(best.stage.rpartition(".")[2], ("?", "white"))


def _axis(seconds: float, width: int) -> Text:
    label, end = " " * 16, f"{seconds * 1e3:.1f} ms"
    return Text(f"{label}0{'─' * (width - len(end) - 2)} {end}", style="dim")


def _legend(timeline: Timeline) -> Text:
    text = Text(" " * 16)
    for part, (letter, colour) in STYLES.items():
        text.append(f"{letter} {part}  ", style=colour)
    text.append(f"{IDLE} idle\n", style="dim")
    heading = f"{timeline.source}: {timeline.title}: " if timeline.title else f"{timeline.source}: "
    text.append(f"{' ' * 16}{heading}{timeline.verdict()}")
    return text
