"""Which tokens go into the next batch, and which key/value memory they find."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.batching.batcher import AGE_SECONDS, Batcher
from weft.batching.params import SamplingParams
from weft.batching.request import Request, Sequence
from weft.batching.scheduled import CopyPrefix, Drop, Scheduled


def request(length: int, limit: int = 4, n: int = 1, first: int = 0, **more: object) -> Request:
    return Request(tuple(range(first, first + length)), SamplingParams(n=n), limit, **more)  # type: ignore[arg-type]


def commit(batcher: Batcher, scheduled: Scheduled, token: int = 7) -> None:
    for sequence, segment, grows in scheduled.parts:
        sequence.land(segment.end)
        if grows:
            sequence.tokens.append(token)
    batcher.check_integrity()


def shape(scheduled: Scheduled) -> list[tuple[int, int]]:
    return [(segment.start, segment.length) for segment in scheduled.batch.segments]


def batcher_of(*requests: Request, sequences: int = 4, memory: int = 1000, **more: int) -> Batcher:
    batcher = Batcher(sequences, memory, **more)
    for each in requests:
        batcher.add(each)
    return batcher


def finish(batcher: Batcher, sequences: ReadOnly[Sequence]) -> None:
    """Lets running sequences go, as the engine does with those that are complete."""
    batcher.leave(sequences)
    batcher.check_integrity()


def test_prompts_then_their_next_tokens() -> None:
    batcher = batcher_of(request(3), request(5))
    first = batcher.next(100)
    assert shape(first) == [(0, 3), (0, 5)] and first.tokens == (0, 1, 2, 0, 1, 2, 3, 4)
    commit(batcher, first)
    second = batcher.next(100)
    assert shape(second) == [(3, 1), (5, 1)] and second.tokens == (7, 7)


def test_slots_and_memory_limit_what_starts() -> None:
    assert len(batcher_of(*(request(3) for _ in range(4)), sequences=2).next(100).sequences) == 2
    assert len(batcher_of(*(request(3) for _ in range(4)), sequences=9, memory=40).next(100).sequences) == 2


def test_a_long_prompt_comes_in_pieces_beside_next_tokens() -> None:
    batcher = batcher_of(request(3))
    commit(batcher, batcher.next(8))
    batcher.add(request(20))
    shapes = []
    for _ in range(3):
        scheduled = batcher.next(8)
        shapes.append(shape(scheduled))
        commit(batcher, scheduled)
    assert shapes == [[(3, 1), (0, 7)], [(4, 1), (7, 7)], [(5, 1), (14, 6)]]
    assert [segment.wanted for segment in scheduled.batch.segments] == [1, 1]


def test_pieces_end_on_the_granule_and_never_leave_a_single_token() -> None:
    batcher = batcher_of(request(25), granule=8)
    shapes = []
    for _ in range(3):
        scheduled = batcher.next(24)
        shapes += shape(scheduled)
        commit(batcher, scheduled)
    assert shapes == [(0, 16), (16, 9), (25, 1)]


def test_a_piece_is_no_smaller_than_the_granule() -> None:
    batcher = batcher_of(request(3), request(40, first=100), granule=8)
    commit(batcher, batcher.next(4))
    scheduled = batcher.next(4)
    assert shape(scheduled) == [(3, 1)], "beside others it waits until there is room for 8"
    commit(batcher, scheduled)
    finish(batcher, [s for s in batcher.running if s.left == 1])
    assert shape(batcher.next(4)) == [(0, 16)], "alone it goes on in any case"


def test_priority_then_who_had_least_then_who_came_first() -> None:
    low, late, urgent = request(3, priority=1), request(3), request(3, priority=-1)
    batcher = batcher_of(low, late, urgent, sequences=1)
    assert batcher.next(100, now=0.0).sequences == tuple(urgent.sequences)

    busy = [request(3, owner="busy") for _ in range(3)]
    batcher = batcher_of(*busy, sequences=1)
    commit(batcher, batcher.next(100))
    batcher.add(request(3, owner="other"))
    finish(batcher, busy[0].sequences)
    first = batcher.next(100)
    assert first.sequences[0].request.owner == "busy", "who comes new starts level: nothing is saved up"
    commit(batcher, first)
    finish(batcher, first.sequences)
    assert batcher.next(100).sequences[0].request.owner == "other"


def test_waiting_makes_up_for_priority() -> None:
    batcher = batcher_of(request(3, priority=1, arrived=0.0), sequences=1)
    batcher.add(request(3, arrived=2.5 * AGE_SECONDS))
    assert batcher.next(100, now=2.5 * AGE_SECONDS).sequences[0].request.priority == 1


def test_freed_slots_are_used_again() -> None:
    first, second = request(3), request(4)
    batcher = batcher_of(first, second, sequences=1)
    commit(batcher, batcher.next(100))
    finish(batcher, first.sequences)
    assert batcher.moves() == [Drop(0)] and batcher.moves() == []
    assert batcher.next(100).sequences == tuple(second.sequences)
    finish(batcher, second.sequences)
    assert batcher.idle


def test_waiting_sequences_can_leave_and_deadlines_are_seen() -> None:
    waiting = request(3, n=2, deadline=5.0)
    batcher = batcher_of(waiting)
    assert batcher.expired(4.9) == [] and batcher.expired(5.0) == waiting.sequences
    batcher.leave(waiting.sequences)
    assert batcher.idle


def test_after_a_restart_sequences_start_over_within_the_budget() -> None:
    batcher = batcher_of(request(3), request(4), prefixes=4)
    commit(batcher, batcher.next(8))
    batcher.rewind()
    again = batcher.next(5)
    assert shape(again) == [(0, 4), (0, 1)] and again.tokens == (0, 1, 2, 7, 0)


def test_memory_that_runs_out_makes_the_least_urgent_wait_again() -> None:
    first, second = request(3, limit=36), request(3, limit=36)
    batcher = batcher_of(first, second, memory=40)
    for _ in range(19):
        commit(batcher, batcher.next(100))
    assert batcher.counts.preempted == 1 and batcher.waiting == second.sequences
    assert Drop(1) in batcher.moves() and second.sequences[0].computed == 0
    finish(batcher, first.sequences)
    assert shape(batcher.next(100)) == [(0, 21)], "with the tokens that it had, once there is memory"


def test_nobody_waits_again_for_someone_less_urgent() -> None:
    urgent, late = request(40, limit=4, first=100), request(3, limit=60, priority=1)
    batcher = batcher_of(late, memory=86)
    for _ in range(10):
        commit(batcher, batcher.next(100))
    batcher.add(urgent)  # comes in pieces, while the other one goes on decoding
    while urgent.sequences[0].produced < 4:
        commit(batcher, batcher.next(2))
        assert urgent.sequences[0] in batcher.running
    finish(batcher, urgent.sequences)
    while late.sequences[0].produced < 60:
        commit(batcher, batcher.next(100))


class TestReuse:
    def test_a_longer_conversation_goes_on_in_place(self) -> None:
        first = request(40)
        batcher = batcher_of(first, prefixes=4)
        commit(batcher, batcher.next(100))
        finish(batcher, first.sequences)
        assert batcher.moves() == []
        batcher.add(request(50))
        scheduled = batcher.next(100)
        assert shape(scheduled) == [(40, 10)] and batcher.moves() == []
        assert scheduled.sequences[0].reused == 40 and batcher.counts.reused == 40

    def test_a_shared_beginning_is_copied_where_the_rest_would_be_lost(self) -> None:
        first = request(200)
        batcher = batcher_of(first, prefixes=4)
        commit(batcher, batcher.next(500))
        finish(batcher, first.sequences)
        batcher.add(Request((*range(100), 7, 7), SamplingParams(), 4))
        assert shape(batcher.next(500)) == [(100, 2)]
        assert batcher.moves() == [CopyPrefix(0, 1, 100)] and 0 in batcher.prefixes

    def test_the_last_token_is_computed_in_any_case(self) -> None:
        first = request(40)
        batcher = batcher_of(first, prefixes=4)
        commit(batcher, batcher.next(100))
        batcher.add(request(40))
        assert shape(batcher.next(100)) == [(40, 1), (39, 1)] and batcher.moves() == [CopyPrefix(0, 1, 39)]

    def test_completions_of_one_prompt_wait_for_its_first(self) -> None:
        batcher = batcher_of(request(60, n=3), prefixes=4)
        scheduled = batcher.next(500)
        assert shape(scheduled) == [(0, 60)]
        commit(batcher, scheduled)
        assert shape(batcher.next(500)) == [(60, 1), (59, 1), (59, 1)]
        assert batcher.moves() == [CopyPrefix(0, 1, 59), CopyPrefix(0, 2, 59)]

    def test_on_the_granule_and_never_all_but_one(self) -> None:
        first = request(100)
        batcher = batcher_of(first, prefixes=4, granule=32)
        commit(batcher, batcher.next(500))
        batcher.add(request(97))
        assert shape(batcher.next(500)) == [(100, 1), (64, 33)]

    def test_kept_prefixes_give_way_to_what_runs(self) -> None:
        first = request(30)
        batcher = batcher_of(first, prefixes=4, memory=50)
        commit(batcher, batcher.next(100))
        finish(batcher, first.sequences)
        batcher.add(request(30, first=500))
        assert shape(batcher.next(100)) == [(0, 30)] and batcher.moves() == [Drop(0)]
        batcher.check_integrity()

    def test_a_copy_fits_beside_what_is_kept_or_is_not_made(self) -> None:
        for memory, moves in ((170, [Drop(1), CopyPrefix(0, 1, 50)]), (140, [Drop(1)])):  # then on in place
            kept = request(100), request(30, first=500)
            batcher = batcher_of(*kept, prefixes=4, memory=memory)
            for each in kept:
                commit(batcher, batcher.next(100))
                finish(batcher, each.sequences)
            assert batcher.moves() == [] and len(batcher.prefixes) == 2
            batcher.add(Request((*range(50), 7, 7), SamplingParams(), 4))
            [sequence] = batcher.next(1).sequences
            assert batcher.moves() == moves and sequence.reused == 50
            batcher.check_integrity()

    def test_nothing_is_reused_where_that_is_off(self) -> None:
        batcher = batcher_of(request(40, n=2))
        assert shape(batcher.next(100)) == [(0, 40), (0, 40)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_happens_all_is_computed_once_and_memory_is_kept_right(data: st.DataObject) -> None:
    """Requests come, are cancelled, end; workers are lost. A model of the workers' memory sees every move.

    A position's memory is its token, and whatever else its bits depend on: with a granule, whether it was computed as a
    token of an answer; with angles that stretch, by how much they were, or in which of two forms.
    """
    granule = data.draw(st.sampled_from([1, 8]))
    memory = data.draw(st.integers(60, 300))
    trained = data.draw(st.sampled_from([None, 20]))
    anew = trained is not None and data.draw(st.booleans())
    batcher = Batcher(
        data.draw(st.integers(1, 4)),
        memory,
        data.draw(st.integers(0, 4)),
        granule,
        trained,
        data.draw(st.integers(1, 40)),
        anew,
    )
    slots: list[list[Kept]] = [[] for _ in range(batcher.slots)]
    for turn in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["add", "add", "run", "run", "run", "cancel", "restart"]))
        if action == "add":
            kind, length = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 50))
            prompt = (*([kind] * data.draw(st.integers(0, length))), *range(length))[:length]
            params = SamplingParams(
                n=data.draw(st.integers(1, 2)), prompt_logprobs=data.draw(st.sampled_from([None, 0]))
            )
            batcher.add(Request(prompt, params, data.draw(st.integers(0, 8)), owner=str(kind), arrived=turn))
        elif action == "cancel" and not batcher.idle:
            there = [*batcher.waiting, *batcher.running]
            batcher.leave([there[data.draw(st.integers(0, len(there) - 1))]])
        elif action == "restart":
            batcher.rewind()
            slots = [[] for _ in slots]
            for sequence in batcher.running:
                sequence.alone = data.draw(st.booleans())
        elif not batcher.idle:
            scheduled = batcher.next(data.draw(st.integers(1, 40)), now=turn)
            run(batcher, scheduled, slots)
        batcher.check_integrity()
    for turn in range(1000):
        if batcher.idle:
            break
        run(batcher, batcher.next(30, now=100 + turn), slots)
    assert batcher.idle, "something waits for ever"


Kept = tuple[int, bool, int]


def bits(batcher: Batcher, sequence: Sequence, position: int) -> Kept:
    """What a position's keys and values are, if each sequence were alone."""
    length = len(sequence.request.prompt)
    stretch = max(batcher.stretching.trained, length, position + 1) if batcher.stretching.trained is not None else 0
    if batcher.stretching.trained is not None and batcher.stretching.anew:
        stretch = int(len(sequence.tokens) > batcher.stretching.trained)
    return sequence.tokens[position], batcher.granule > 1 and position >= length, stretch


def run(batcher: Batcher, scheduled: Scheduled, slots: list[list[Kept]]) -> None:
    """What workers and engine do with a batch: memory must hold each sequence's own tokens up to where it goes on."""
    for move in batcher.moves():
        if isinstance(move, CopyPrefix):
            assert len(slots[move.source]) >= move.length, "what is copied is not there"
            slots[move.target] = slots[move.source][: move.length]
        else:
            slots[move.slot] = []
    offset, done = 0, []
    if any(sequence.alone for sequence in scheduled.sequences):
        assert len(scheduled.sequences) == 1
    assert sum(s.length for q, s, _ in scheduled.parts if q.scored) <= batcher.most_scored
    for sequence, segment, grows in scheduled.parts:
        memory = slots[segment.sequence]
        own = [bits(batcher, sequence, position) for position in range(segment.end)]
        assert memory[: segment.start] == own[: segment.start], "another sequence's keys and values"
        tokens = list(scheduled.tokens[offset : offset + segment.length])
        assert tokens == sequence.tokens[segment.start : segment.end]
        length = len(sequence.request.prompt)
        if batcher.stretching.trained is not None and batcher.stretching.anew:
            assert (segment.prompt > batcher.stretching.trained) == (len(sequence.tokens) > batcher.stretching.trained)
        if batcher.granule > 1:
            assert segment.end <= length or segment.length == 1 or segment.start == 0 == length - segment.end
        if sequence.scored:
            assert segment.wanted == segment.length and sequence.reused == 0
        slots[segment.sequence] = memory[: segment.start] + own[segment.start :]
        offset += segment.length
        sequence.land(segment.end)
        if grows:
            sequence.tokens.append(9)
            sequence.alone = False
        if sequence.produced >= sequence.request.limit and sequence.computed >= length:
            sequence.finish_reason = "length"
            done.append(sequence)
    batcher.leave(done)
    batcher.check_integrity()


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_budgets_are_kept(budget: int) -> None:
    batcher = batcher_of(*(request(30, first=100 * n) for n in range(6)))
    for _ in range(20):
        scheduled = batcher.next(budget)
        assert scheduled.batch.tokens <= budget
        commit(batcher, scheduled)
