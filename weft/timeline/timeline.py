"""Timelines: when each step of a program ran on each rank, and what follows from that.

Executing and predicting both give a `Timeline`. Knows steps and seconds; knows nothing of how they came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weft.errors import InputError
from weft.program.batch import Rows
from weft.program.steps import Kind, Lane


@dataclass(frozen=True)
class Event:
    """One step on one rank. `start` and `stop` in seconds from the beginning of the program."""

    rank: int
    lane: Lane
    kind: Kind
    stage: str
    rows: Rows
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start


@dataclass(frozen=True)
class Timeline:
    """Events of all ranks. `source` says how they came about: "measured" or "predicted"."""

    events: tuple[Event, ...]
    source: str

    @property
    def ranks(self) -> list[int]:
        """The ranks that have events."""
        return sorted({event.rank for event in self.events})

    @property
    def seconds(self) -> float:
        """From the first event's start to the last one's stop."""
        if not self.events:
            return 0.0
        return max(e.stop for e in self.events) - min(e.start for e in self.events)

    def lane(self, rank: int, lane: Lane) -> list[Event]:
        """One lane's events in order of time."""
        return sorted((e for e in self.events if e.rank == rank and e.lane is lane), key=lambda e: e.start)

    def busy(self, lane: Lane) -> float:
        """Seconds that the lane works, on the rank where it works most."""
        return max((sum(e.seconds for e in self.lane(rank, lane)) for rank in self.ranks), default=0.0)

    def overlapped(self, rank: int) -> float:
        """Seconds in which both lanes of a rank work at the same time."""
        network = self.lane(rank, Lane.NETWORK)
        return sum(
            max(0.0, min(c.stop, n.stop) - max(c.start, n.start))
            for c in self.lane(rank, Lane.COMPUTE)
            for n in network
        )

    def to_json(self) -> str:
        """The form that `save` writes."""
        rows = [[e.rank, e.kind, e.stage, str(e.rows), round(e.start, 7), round(e.stop, 7)] for e in self.events]
        return json.dumps({"weft_timeline": 1, "source": self.source, "events": rows})

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Reads `to_json`'s form. Raises `InputError` for anything else."""
        try:
            data = json.loads(text)
            return cls(tuple(_event(*row) for row in data["events"]), data["source"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"this is not a timeline that weft saved ({error!r})") from None

    def save(self, path: Path) -> None:
        """Writes the JSON form."""
        path.write_text(self.to_json() + "\n", "utf-8")


def _event(rank: int, kind: str, stage: str, rows: str, start: float, stop: float) -> Event:
    first, _, last = rows.partition(":")
    step = Kind(kind)
    return Event(rank, step.lane, step, stage, Rows(int(first), int(last)), start, stop)


def bound(compute_alone: float, network_alone: float) -> float:
    """Seconds that no schedule of two lanes goes below: max(compute alone, network alone)."""
    return max(compute_alone, network_alone)


def overlap_efficiency(serial: float, measured: float, bound_seconds: float) -> float | None:
    """(serial - measured) / (serial - bound): 1.0 is perfect. None where there is nothing to gain."""
    if serial <= bound_seconds:
        return None
    return (serial - measured) / (serial - bound_seconds)


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
