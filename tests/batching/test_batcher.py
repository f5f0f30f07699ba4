"""Which tokens go into the next batch."""

from __future__ import annotations

from weft.batching.batcher import Batcher, Scheduled
from weft.batching.params import SamplingParams
from weft.batching.request import Request


def request(length: int, limit: int = 4, n: int = 1) -> Request:
    return Request(tuple(range(length)), SamplingParams(n=n), limit)


def commit(batcher: Batcher, scheduled: Scheduled) -> None:
    for sequence in scheduled.sequences:
        sequence.computed = len(sequence.tokens)
        sequence.tokens.append(7)
    batcher.check_integrity()


def shape(scheduled: Scheduled) -> list[tuple[int, int]]:
    return [(segment.start, segment.length) for segment in scheduled.batch.segments]


def test_prompts_then_their_next_tokens() -> None:
    batcher = Batcher(slots=4, batch_tokens=100, memory_tokens=1000)
    for length in (3, 5):
        batcher.add(request(length))
    first = batcher.next()
    assert shape(first) == [(0, 3), (0, 5)] and first.tokens == (0, 1, 2, 0, 1, 2, 3, 4)
    commit(batcher, first)
    second = batcher.next()
    assert shape(second) == [(3, 1), (5, 1)] and second.tokens == (7, 7)


def test_slots_budget_and_memory_limit_what_starts() -> None:
    two_slots = Batcher(slots=2, batch_tokens=100, memory_tokens=1000)
    small_budget = Batcher(slots=9, batch_tokens=7, memory_tokens=1000)
    small_memory = Batcher(slots=9, batch_tokens=100, memory_tokens=15)
    for batcher, expected in ((two_slots, 2), (small_budget, 2), (small_memory, 2)):
        for _ in range(4):
            batcher.add(request(3))
        assert len(batcher.next().sequences) == expected, batcher


def test_a_prompt_over_the_budget_runs_alone() -> None:
    batcher = Batcher(slots=4, batch_tokens=10, memory_tokens=1000)
    batcher.add(request(50))
    batcher.add(request(3))
    assert shape(batcher.next()) == [(0, 50)]


def test_freed_slots_are_used_again() -> None:
    batcher = Batcher(slots=1, batch_tokens=100, memory_tokens=1000)
    first, second = request(3), request(4)
    batcher.add(first)
    batcher.add(second)
    commit(batcher, batcher.next())
    assert batcher.leave(first.sequences) == [0]
    assert batcher.next().sequences == tuple(second.sequences)
    batcher.check_integrity()
    batcher.leave(second.sequences)
    assert batcher.idle


def test_waiting_sequences_can_leave() -> None:
    batcher = Batcher(slots=1, batch_tokens=100, memory_tokens=1000)
    waiting = request(3, n=2)
    batcher.add(waiting)
    assert batcher.leave(waiting.sequences) == [] and batcher.idle


def test_after_a_restart_sequences_start_over_within_the_budget() -> None:
    batcher = Batcher(slots=4, batch_tokens=8, memory_tokens=1000)
    for length in (3, 4):
        batcher.add(request(length))
    commit(batcher, batcher.next())
    batcher.rewind()
    again = batcher.next()
    assert shape(again) == [(0, 4)] and again.tokens == (0, 1, 2, 7)
    commit(batcher, again)
    assert shape(batcher.next()) == [(4, 1), (0, 5)]
