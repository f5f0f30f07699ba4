"""Timelines, the bound, and what follows from them."""

from __future__ import annotations

import json
import random
import time

import pytest

from weft.errors import InputError
from weft.program.batch import Rows
from weft.program.stages import COMPUTE, NETWORK, Kind
from weft.timeline.svg import svg
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
    assert TIMELINE.busy(0, COMPUTE) == 1.5 and TIMELINE.busy(1, NETWORK) == 3.0
    assert TIMELINE.overlapped(0) == 0.5 and TIMELINE.overlapped(1) == 0.0
    assert [e.start for e in TIMELINE.lane(0, COMPUTE)] == [0.0, 2.0]


def test_waits_are_split_where_the_network_starts_and_stops() -> None:
    waits = [(wait.start, wait.stop, wait.behind is not None) for wait in TIMELINE.waits(0)]
    assert waits == [(1.0, 2.0, True), (2.5, 3.0, True), (3.0, 4.0, False)]
    assert [(wait.start, wait.stop) for wait in TIMELINE.waits(1)] == [(0.0, 0.5), (1.0, 4.0)]
    assert TIMELINE.exposed(0) == 1.5 and TIMELINE.exposed(1) == 3.0


def test_verdict() -> None:
    assert TIMELINE.verdict() == "0% of the communication is hidden; 3000.0 of 4000.0 ms wait for it"
    assert "nothing is communicated" in Timeline(TIMELINE.events[:1], "measured").verdict()


def test_json_round_trips_and_is_a_chrome_trace() -> None:
    titled = Timeline(TIMELINE.events, "predicted", "iso:2, wire exact")
    assert Timeline.from_json(titled.to_json()) == titled
    trace = json.loads(titled.to_json())
    steps = [entry for entry in trace["traceEvents"] if entry["ph"] == "X"]
    assert steps[1] | {"args": None} == {
        "ph": "X", "name": "L0.mlp 0:4", "cat": "reduce", "pid": 0, "tid": 2, "ts": 1e6, "dur": 2e6, "args": None,
    }  # fmt: skip
    names = {(e["pid"], e["tid"], e["args"]["name"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert names == {(0, 1, "compute"), (0, 2, "network"), (1, 1, "compute"), (1, 2, "network")}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents": [{"ph": "X"}], "otherData": {"source": "x", "title": ""}}',
        '{"traceEvents": [1], "otherData": {}}',
    ],
)
def test_what_is_no_timeline_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a timeline"):
        Timeline.from_json(text)


def test_bound_and_efficiency() -> None:
    assert bound(3.0, 2.0) == 3.0
    assert overlap_efficiency(5.0, 3.0, 3.0) == 1.0
    assert overlap_efficiency(5.0, 4.0, 3.0) == 0.5
    assert overlap_efficiency(3.0, 3.0, 3.0) is overlap_efficiency(3.0, 3.3, 2.95) is None  # next to nothing to gain


def test_median() -> None:
    assert median([3, 1, 2]) == 2 and median([4, 1, 2, 3]) == 2.5


def spans(count: int, generator: random.Random, overlapping: bool) -> list[tuple[float, float]]:
    """One after the other, as a lane's are; or any, as a file may hold."""
    if overlapping:
        return [
            (start, start + generator.choice((0, 1, 5))) for start in (generator.randrange(40) for _ in range(count))
        ]
    edges = sorted(generator.randrange(60) for _ in range(2 * count))
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_what_shares_a_time_is_found_without_looking_at_all(seed: int) -> None:
    generator = random.Random(seed)
    compute = spans(generator.randrange(12), generator, overlapping=False)
    network = sorted(spans(generator.randrange(12), generator, overlapping=seed % 2 == 0))
    events = [event(0, Kind.COMPUTE, start, stop) for start, stop in compute]
    timeline = Timeline((*events, *(event(0, Kind.REDUCE, start, stop) for start, stop in network)), "measured")
    computes, communicates = (
        {moment for start, stop in each for moment in range(int(start), int(stop))} for each in (compute, network)
    )
    assert timeline.overlapped(0) == len(computes & communicates)
    assert timeline.communicating(0) == len(communicates) and timeline.exposed(0) == len(communicates - computes)
    for wait in timeline.waits(0):
        first = next((n for n in network if n[0] <= wait.start and wait.stop <= n[1]), None)
        assert (wait.behind and (wait.behind.start, wait.behind.stop)) == first
        assert not any(wait.start < edge < wait.stop for n in network for edge in n)


def test_five_thousand_events_are_drawn_at_once() -> None:
    """It took seconds, on the server's loop: every lane was looked through for every event of the other one."""
    many = [
        event(rank, kind, number + shift, number + shift + 0.8)
        for rank in range(2) for number in range(1250) for kind, shift in ((Kind.COMPUTE, 0.0), (Kind.REDUCE, 0.5))
    ]  # fmt: skip
    begin = time.perf_counter()
    assert svg([Timeline(tuple(many), "measured")]).count("<rect") > 5000
    assert time.perf_counter() - begin < 1.0
