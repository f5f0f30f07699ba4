"""Timelines: when each step of a program ran on each rank, and what follows from that.

Executing and predicting both give a `Timeline`. Knows steps and seconds; knows nothing of how they came about.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from weft.errors import InputError
from weft.program.batch import Rows
from weft.program.stages import COMPUTE, NETWORK, Kind


@dataclass(frozen=True)
class Event:
    """One step on one rank. `start` and `stop` in seconds from the beginning of the program."""

    rank: int
    lane: str
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
    """Events of all ranks. `source` says how they came about: "measured" or "predicted"; `title` of what."""

    events: tuple[Event, ...]
    source: str
    title: str = ""

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks that have events."""
        return sorted({event.rank for event in self.events})

    @cached_property
    def lanes(self) -> tuple[str, ...]:
        """Computation first, then the lanes that communicate: the usual one, unless others do all of it."""
        used = {event.lane for event in self.events}
        usual = (NETWORK,) if NETWORK in used or len(used) < 2 else ()
        return tuple(dict.fromkeys((COMPUTE, *usual, *sorted(used))))

    @cached_property
    def parts(self) -> dict[str, bool]:
        """The parts of the model that steps are of, those of its layers first, and whether it is one of those."""
        split = (event.stage.rpartition(".") for event in self.events)
        names = dict.fromkeys((part, bool(layer)) for layer, _, part in split)
        return dict(sorted(names, key=lambda entry: not entry[1]))

    @cached_property
    def begin(self) -> float:
        """When the first event starts."""
        return min((event.start for event in self.events), default=0.0)

    @cached_property
    def end(self) -> float:
        """When the last event stops."""
        return max((event.stop for event in self.events), default=0.0)

    @property
    def seconds(self) -> float:
        """From begin to end."""
        return self.end - self.begin

    def lane(self, rank: int, lane: str) -> list[Event]:
        """One lane's events in order of time."""
        return self._lanes.get((rank, lane), [])

    @cached_property
    def _lanes(self) -> dict[tuple[int, str], list[Event]]:
        by_lane: dict[tuple[int, str], list[Event]] = {}
        for event in sorted(self.events, key=lambda e: e.start):
            by_lane.setdefault((event.rank, event.lane), []).append(event)
        return by_lane

    def busy(self, rank: int, lane: str) -> float:
        """Seconds that a rank's lane works."""
        return sum(event.seconds for event in self.lane(rank, lane))

    def communicating(self, rank: int) -> float:
        """Seconds in which a rank communicates, on one lane at least."""
        covered, until = 0.0, float("-inf")
        for event in self._communication(rank):
            covered += max(0.0, event.stop - max(event.start, until))
            until = max(until, event.stop)
        return covered

    def _communication(self, rank: int) -> list[Event]:
        """What a rank's other lanes do, in order of time."""
        lanes = [self.lane(rank, lane) for lane in self.lanes if lane != COMPUTE]
        return sorted((event for lane in lanes for event in lane), key=lambda event: event.start)

    def overlapped(self, rank: int) -> float:
        """Seconds in which a rank computes and communicates at the same time."""
        network, total = _Lane(self._communication(rank)), 0.0
        for computing in self.lane(rank, COMPUTE):
            until = computing.start
            for event in network.touching(computing.start, computing.stop):
                stop = min(computing.stop, event.stop)
                total += max(0.0, stop - max(until, event.start))
                until = max(until, stop)
        return total

    def waits(self, rank: int) -> list[Wait]:
        """When a rank's compute lane does nothing between the timeline's begin and end, split where another lane starts
        or stops a step."""
        edges = [self.begin, *(t for e in self.lane(rank, COMPUTE) for t in (e.start, e.stop)), self.end]
        network, waits = _Lane(self._communication(rank)), []
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            near = network.touching(start, stop)
            inside = {t for e in near for t in (e.start, e.stop) if start < t < stop}
            for left, right in pairwise([start, *sorted(inside), stop]):
                if right > left:
                    behind = next((e for e in near if e.start <= left and right <= e.stop), None)
                    waits.append(Wait(left, right, behind))
        return waits

    def exposed(self, rank: int) -> float:
        """Seconds in which a rank communicates and doesn't compute."""
        return self.communicating(rank) - self.overlapped(rank)

    @property
    def bubble(self) -> float | None:
        """Where rows go on from ranks to others, the part of the time in which a rank computes nothing, in the mean."""
        if not any(event.kind is Kind.SEND for event in self.events) or self.seconds <= 0:
            return None
        idle = [1 - self.busy(rank, COMPUTE) / self.seconds for rank in self.ranks]
        return sum(idle) / len(idle)

    def verdict(self) -> str:
        """Is it really overlapping, and what is exposed? One line, for the rank that waits most."""
        communicating = [rank for rank in self.ranks if self.communicating(rank) > 0]
        if not communicating:
            return f"{self.seconds * 1e3:.1f} ms, nothing is communicated"
        rank = max(communicating, key=self.exposed)
        hidden = self.overlapped(rank) / self.communicating(rank)
        bubble = f"; bubbles {self.bubble:.0%}" if self.bubble is not None else ""
        return (
            f"{hidden:.0%} of the communication is hidden; {self.exposed(rank) * 1e3:.1f} of "
            f"{self.seconds * 1e3:.1f} ms wait for it{bubble}"
        )

    def to_json(self) -> str:
        """Chrome's trace format, which Perfetto and chrome://tracing open; ranks are processes, lanes threads."""
        names = [
            {"ph": "M", "name": name, "pid": rank, "tid": tid, "args": {"name": text}}
            for rank in self.ranks
            for tid, (name, text) in enumerate(
                [("process_name", f"rank {rank}"), *(("thread_name", x) for x in self.lanes)]
            )
        ]
        steps = [
            {
                "ph": "X", "name": f"{e.stage} {e.rows}", "cat": e.kind, "pid": e.rank,
                "tid": self.lanes.index(e.lane) + 1, "ts": round(e.start * 1e6, 1),
                "dur": round(round(e.stop * 1e6, 1) - round(e.start * 1e6, 1), 1),
                "args": {"stage": e.stage, "rows": str(e.rows), "lane": e.lane},
            }
            for e in self.events
        ]  # fmt: skip
        about = {"weft_timeline": 2, "source": self.source, "title": self.title}
        return json.dumps({"traceEvents": names + steps, "displayTimeUnit": "ms", "otherData": about})

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Reads `to_json`'s form. Raises `InputError` for anything else."""
        try:
            data = json.loads(text)
            about = data["otherData"]
            events = tuple(_event(entry) for entry in data["traceEvents"] if entry["ph"] == "X")
            return cls(events, about["source"], about["title"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is not a timeline that weft saved ({error!r})") from None


class _Lane:
    """One lane's events, to be found by time: looking through all of them for each other one is too slow."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events
        self._starts = [event.start for event in events]
        self._stops = list(accumulate((event.stop for event in events), max))  # never falling, whatever a file holds

    def touching(self, start: float, stop: float) -> list[Event]:
        """Those that may share a time with this one; none that does is left out."""
        return self._events[bisect_left(self._stops, start) : bisect_right(self._starts, stop)]


@dataclass(frozen=True)
class Wait:
    """A time in which a compute lane does nothing; `behind` is what another lane of its rank does meanwhile."""

    start: float
    stop: float
    behind: Event | None


def _event(entry: dict[str, Any]) -> Event:
    first, _, last = entry["args"]["rows"].partition(":")
    kind, start = Kind(entry["cat"]), entry["ts"]
    begin, end = round(start / 1e6, 7), round((start + entry["dur"]) / 1e6, 7)
    lane = str(entry["args"].get("lane", kind.lane))  # which older ones don't say
    return Event(entry["pid"], lane, kind, entry["args"]["stage"], Rows(int(first), int(last)), begin, end)


def bound(compute_alone: float, network_alone: float) -> float:
    """Seconds that no schedule of two lanes goes below: max(compute alone, network alone)."""
    return max(compute_alone, network_alone)


LEAST_GAIN = 0.02  # of serial's time


def overlap_efficiency(serial: float, measured: float, bound_seconds: float) -> float | None:
    """(serial - measured) / (serial - bound): 1.0 is perfect. None where there is next to nothing to gain: what runs
    differ by would be all that it says. For rounds, of their medians: to leave single rounds out would flatter."""
    if serial - bound_seconds < LEAST_GAIN * serial:
        return None
    return (serial - measured) / (serial - bound_seconds)


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
