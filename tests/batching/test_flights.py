"""Several batches in flight: who is in which, and what becomes of memory meanwhile."""

from __future__ import annotations

from random import Random

import pytest

from weft.batching.batcher import Batcher
from weft.batching.params import SamplingParams
from weft.batching.request import Request
from weft.batching.scheduled import Scheduled


def request(length: int = 3, limit: int = 50) -> Request:
    return Request(tuple(range(1, length + 1)), SamplingParams(), limit)


def fill(batcher: Batcher, under_way: list[Scheduled], budget: int = 100) -> list[Scheduled]:
    """As the engine does it."""
    if not under_way:
        under_way.append(batcher.next(budget))
    while (more := batcher.further(under_way, lambda: budget, 0.0)) is not None:
        under_way.append(more)
    return under_way


def land(scheduled: Scheduled) -> None:
    for sequence, segment, grows in scheduled.parts:
        if sequence.alive:
            sequence.land(segment.end)
            sequence.tokens += [7] if grows else []


def test_answers_are_divided_and_no_token_is_asked_for_twice() -> None:
    batcher, under_way = Batcher(sequences=8, memory=10_000, flights=3), list[Scheduled]()
    for _ in range(8):
        batcher.add(request())
    for _ in range(30):
        fill(batcher, under_way)
        sequences = [sequence for scheduled in under_way for sequence in scheduled.sequences]
        assert len(sequences) == len(set(sequences)) and len(under_way) <= 3
        batcher.check_integrity()
        land(under_way.pop(0))
    assert max(len(scheduled.sequences) for scheduled in fill(batcher, under_way)) == 3  # of eight


def test_a_long_prompt_is_in_several() -> None:
    batcher = Batcher(sequences=4, memory=10_000, flights=3)
    batcher.add(request(250))
    under_way = fill(batcher, [], budget=100)
    segments = [scheduled.batch.segments[0] for scheduled in under_way]
    assert [(each.start, each.length) for each in segments] == [(0, 100), (100, 100), (200, 50)]
    assert [s.growing for s in under_way] == [(False,), (False,), (True,)]
    for scheduled in under_way:
        land(scheduled)
    [sequence] = batcher.running
    assert (sequence.computed, sequence.flying, sequence.unsent) == (250, 0, 1)


def test_what_is_in_flight_keeps_its_memory() -> None:
    """A more urgent request takes the memory of a sequence that waits, not of one that ranks are computing."""
    batcher = Batcher(sequences=4, memory=60, flights=2)
    batcher.add(request(40))
    under_way = fill(batcher, [], budget=20)
    assert len(under_way) == 2
    urgent = Request(tuple(range(1, 31)), SamplingParams(), 5, priority=-5)
    batcher.add(urgent)
    land(under_way.pop(0))
    fill(batcher, under_way, budget=40)
    batcher.check_integrity()
    assert all(sequence.slot is not None for scheduled in under_way for sequence in scheduled.sequences)


def test_who_is_by_itself_flies_alone() -> None:
    batcher = Batcher(sequences=4, memory=1000, flights=2)
    suspect, other = request(), request()
    suspect.sequences[0].alone = True
    batcher.add(suspect)
    batcher.add(other)
    seen = set()
    for _ in range(6):
        under_way = fill(batcher, [])
        alone = [scheduled for scheduled in under_way if any(sequence.alone for sequence in scheduled.sequences)]
        assert not alone or len(under_way) == 1
        seen |= {len(alone)}
        for scheduled in under_way:
            land(scheduled)
    assert seen == {0, 1}


@pytest.mark.parametrize("seed", range(80))
def test_whatever_comes_and_goes(seed: int) -> None:
    """Memory is counted right, positions are computed in order, and all end."""
    random = Random(seed)
    flights, budget = random.randint(1, 4), random.randint(5, 60)
    batcher, under_way = Batcher(sequences=4, memory=200, prefixes=3, flights=flights), list[Scheduled]()
    everybody = [request(random.randint(1, 60), random.randint(1, 12)) for _ in range(8)]
    left = list(everybody)
    while left or not batcher.idle:
        if left and (batcher.idle or random.random() < 0.3):
            batcher.add(left.pop())
        fill(batcher, under_way, budget)
        batcher.moves()
        batcher.check_integrity()
        for scheduled in under_way:
            for sequence, segment, _ in scheduled.parts:
                assert not sequence.alive or segment.sequence == sequence.slot
        landed = under_way.pop(0)
        land(landed)
        alive = [sequence for sequence in landed.sequences if sequence.alive]
        over = [s for s in alive if s.produced >= s.request.limit or random.random() < 0.1]
        for sequence in over:
            sequence.finish_reason = "stop"
        batcher.leave(over)
        while under_way and not any(sequence.alive for sequence in under_way[-1].sequences):
            under_way.pop()
    assert all(sequence.finish_reason for each in everybody for sequence in each.sequences)
