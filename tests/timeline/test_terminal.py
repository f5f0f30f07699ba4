"""The terminal drawing: does it show what overlaps?"""

from __future__ import annotations

from rich.console import Console

from tests.timeline.test_timeline import TIMELINE
from weft.timeline.terminal import IDLE, terminal
from weft.timeline.timeline import Timeline


def drawn(timeline: Timeline, width: int) -> list[str]:
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(terminal(timeline, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_lanes_over_time() -> None:
    lines = drawn(TIMELINE, 16)
    assert lines[0].endswith("4000.0 ms")
    assert lines[1] == f"rank 0 compute  MMMM{IDLE * 4}MM{IDLE * 6}"
    assert lines[2] == f"rank 0 network  {IDLE * 4}{'M' * 8}{IDLE * 4}"
    assert lines[4] == f"rank 1 network  {IDLE * 4}{'M' * 12}"
    assert lines[-1].strip() == "measured: 0% of the communication is hidden; 3000.0 of 4000.0 ms wait for it"


def test_nothing_to_draw() -> None:
    assert "nothing is communicated" in drawn(Timeline((), "measured"), 10)[-1]
