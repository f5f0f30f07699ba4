"""Draws timelines in the terminal.

Knows timelines and rich; knows nothing of how they were made.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from weft.timeline.timeline import Event, Timeline

LAYER, OTHER = ("cyan", "yellow", "green", "blue"), "magenta"  # colours of a layer's parts, in order, and of others
IDLE = "·"


def _styles(timeline: Timeline) -> dict[str, tuple[str, str]]:
    """One letter and colour a part, so that a drawing without colours reads too."""
    styles: dict[str, tuple[str, str]] = {}
    for number, (part, layered) in enumerate(timeline.parts.items()):
        taken = {letter for letter, _ in styles.values()}
        letter = next((each for each in part.upper() if each not in taken), "?")
        styles[part] = letter, LAYER[number % len(LAYER)] if layered else OTHER
    return styles


def terminal(timeline: Timeline, width: int = 100) -> RenderableType:
    """A row for each lane of a rank; a column is the part of the model that fills most of its time. What is too short
    for that has the column of its middle."""
    begin = timeline.begin
    scale = timeline.seconds / width if timeline.events else 1.0
    lines, styles = [_heading(timeline), _axis(timeline.seconds, width)], _styles(timeline)
    for rank in timeline.ranks:
        for lane in timeline.lanes:
            lines.append(_row(timeline.lane(rank, lane), f"rank {rank} {lane:<8}", begin, scale, width, styles))
    lines.append(_legend(styles))
    return Group(*lines)


def _row(
    events: list[Event], label: str, begin: float, scale: float, width: int, styles: dict[str, tuple[str, str]]
) -> Text:  # fmt: skip
    row = Text(f"{label} ", style="bold")
    for column in range(width):
        left = begin + column * scale
        part = _fills_most(events, left, left + scale)
        letter, colour = styles[part] if part else (IDLE, "dim")
        row.append(letter, style=colour)
    return row


def _fills_most(events: list[Event], left: float, right: float) -> str | None:
    """The part that fills most of a time, if the lane is busy for half of it, or the middle of something lies there."""
    inside = {event: min(event.stop, right) - max(event.start, left) for event in events}
    if sum(seconds for seconds in inside.values() if seconds > 0) < (right - left) / 2:
        inside = {event: inside[event] for event in events if left <= (event.start + event.stop) / 2 < right}
    longest = max(inside, key=lambda event: inside[event], default=None)
    return longest.stage.rpartition(".")[2] if longest else None


def _axis(seconds: float, width: int) -> Text:
    label, end = " " * 16, f"{seconds * 1e3:.1f} ms"
    return Text(f"{label}0{'─' * (width - len(end) - 2)} {end}", style="dim")


def _heading(timeline: Timeline) -> Text:
    return Text(f"{timeline.source}: {f'{timeline.title}: ' * bool(timeline.title)}{timeline.verdict()}")


def _legend(styles: dict[str, tuple[str, str]]) -> Text:
    text = Text(" " * 16)
    for part, (letter, colour) in styles.items():
        text.append(f"{letter} {part}  ", style=colour)
    text.append(f"{IDLE} idle", style="dim")
    return text
