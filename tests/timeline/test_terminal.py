"""The terminal drawing: does it show what overlaps?"""

from __future__ import annotations

from rich.console import Console

from tests.timeline.test_timeline import TIMELINE
from weft.program.batch import Rows
from weft.program.stages import Kind
from weft.timeline.terminal import IDLE, terminal
from weft.timeline.timeline import Event, Timeline


def drawn(timeline: Timeline, width: int) -> list[str]:
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(terminal(timeline, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_lanes_over_time() -> None:
    lines = drawn(TIMELINE, 16)
    assert lines[0] == "measured: 0% of the communication is hidden; 3000.0 of 4000.0 ms wait for it"
    assert lines[1].endswith("4000.0 ms")
    assert lines[2] == f"rank 0 compute  MMMM{IDLE * 4}MM{IDLE * 6}"
    assert lines[3] == f"rank 0 network  {IDLE * 4}{'M' * 8}{IDLE * 4}"
    assert lines[5] == f"rank 1 network  {IDLE * 4}{'M' * 12}"


def test_nothing_to_draw() -> None:
    assert "nothing is communicated" in drawn(Timeline((), "measured"), 10)[0]


def test_what_is_shorter_than_half_a_column_is_drawn() -> None:
    """Else the sums of a short prompt vanish, above a line that says how much of them is hidden."""
    computing = Event(0, "compute", Kind.COMPUTE, "L0.mlp", Rows(0, 4), 0.0, 10.0)
    sums = [Event(0, "network", Kind.REDUCE, "L0.mlp", Rows(0, 4), at, at + 0.2) for at in (1.1, 4.4, 8.7)]
    lines = drawn(Timeline((computing, *sums), "measured"), 10)
    assert lines[2].endswith("M" * 10) and lines[3].endswith("·M··M···M·")
