"""Timelines, the bound, and what follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import InputError
from weft.program.batch import Rows
from weft.program.steps import Kind, Lane
from weft.timeline.timeline import Event, Timeline, bound, median, overlap_efficiency


def event(rank: int, kind: Kind, start: float, stop: float, stage: str = "L0.mlp") -> Event:
    return Event(rank, kind.lane, kind, stage, Rows(0, 4), start, stop)


TIMELINE = Timeline(
    (
        event(0, Kind.COMPUTE, 0.0, 1.0), event(0, Kind.REDUCE, 1.0, 3.0), event(0, Kind.COMPUTE, 2.0, 2.5),
        event(1, Kind.COMPUTE, 0.5, 1.0), event(1, Kind.REDUCE, 1.0, 4.0),
    ),
    "measured",
)  # fmt: skip


def test_sums() -> None:
    assert TIMELINE.ranks == [0, 1]
    assert TIMELINE.seconds == 4.0
    assert TIMELINE.busy(Lane.COMPUTE) == 1.5 and TIMELINE.busy(Lane.NETWORK) == 3.0
    assert TIMELINE.overlapped(0) == 0.5 and TIMELINE.overlapped(1) == 0.0
    assert [e.start for e in TIMELINE.lane(0, Lane.COMPUTE)] == [0.0, 2.0]


def test_json_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    TIMELINE.save(path)
    assert Timeline.from_json(path.read_text()) == TIMELINE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"events": [[1]], "source": "x"}'])
def test_what_is_no_timeline_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a timeline"):
        Timeline.from_json(text)


def test_bound_and_efficiency() -> None:
    assert bound(3.0, 2.0) == 3.0
    assert overlap_efficiency(5.0, 3.0, 3.0) == 1.0
    assert overlap_efficiency(5.0, 4.0, 3.0) == 0.5
    assert overlap_efficiency(3.0, 3.0, 3.0) is None


def test_median() -> None:
    assert median([3, 1, 2]) == 2 and median([4, 1, 2, 3]) == 2.5
