"""Which tokens go into the next batch. Knows requests, slots and how much fits; knows no model, plan or process.

Every batch takes the next token of each decoding sequence, then as much of the prompts under way as the batch's token
budget allows, then new prompts. Who comes first is one expression, `Batcher.urgency`. When key/value memory runs out,
kept prefixes go first; then the least urgent running sequence waits again, and is computed anew later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ReadOnly
from itertools import accumulate

from weft.batching.request import Request, Sequence
from weft.batching.scheduled import CopyPrefix, Counts, Drop, Move, Scheduled
from weft.batching.stretching import Stretching
from weft.cache.prefixes import Prefix, Prefixes, packed, shared
from weft.program.batch import Batch, Segment

AGE_SECONDS = 10.0  # of waiting make up for one step of priority, and for any share that others have not had
LEAST_SHARED = 16  # tokens: shorter prefixes are not worth a copy
WORTH_WAITING = 32  # tokens that another sequence is computing just now, beyond those that are there
LITTLE = 0.25  # of a shared beginning may be lost behind it by going on in place: a copy costs a page fault every 4 KiB
FEW = 16  # rows that a batch may score in any case
HEADROOM = 16  # tokens that every running sequence should still find memory for when one more starts


class Batcher:
    """Waiting and running sequences. Lengths in tokens.

    sequences: how many run at once. memory: what key/value memory holds in all. prefixes: how many sequences that are
    over may be kept for those that begin alike; 0 reuses nothing. granule: positions on whose multiples alone a
    sequence may be cut; above 1 answers are computed token by token also where they are known already, as after a
    loss, so that the bits of keys and values don't tell. trained, anew: see `Stretching`. scored: rows of prompts that
    a batch may score at most. flights: batches that may be under way at a time, over which answers are divided.
    """

    def __init__(
        self, sequences: int, memory: int, prefixes: int = 0, granule: int = 1, trained: int | None = None,
        scored: int = 1 << 20, anew: bool = False, flights: int = 1,
    ) -> None:  # fmt: skip
        self.sequences, self.memory, self.granule, self.flights = sequences, memory, granule, flights
        self.stretching = Stretching(trained, anew)
        self.most_scored = max(scored, 2 * granule, FEW)
        self.slots = sequences + prefixes
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefixes = Prefixes(prefixes)
        self.counts = Counts()
        self._free = list(range(self.slots - 1, -1, -1))
        self._filled = [0] * self.slots  # positions whose memory is taken, still of use or not
        self._served: dict[str, float] = {}  # tokens, by owner
        self._moves: list[Move] = []
        self._last_alone: Sequence | None = None
        self._alone_last = False  # the last batch was the turn of those that are computed by themselves

    def add(self, request: Request) -> None:
        """Queues a request's sequences, those that have not ended."""
        # Who comes anew, or again, starts level with those who are here: what was not used is not saved up.
        active = {s.request.owner for s in (*self.waiting, *self.running)}
        if request.owner not in active:
            level = min((self._served[owner] for owner in active), default=0.0)
            self._served[request.owner] = max(self._served.get(request.owner, 0.0), level)
        self.waiting += [sequence for sequence in request.sequences if sequence.finish_reason is None]

    @property
    def idle(self) -> bool:
        """True if nothing is left to do."""
        return not (self.waiting or self.running)

    @property
    def used(self) -> int:
        """Tokens whose memory is taken."""
        return sum(self._filled)

    def urgency(self, sequence: Sequence, now: float) -> tuple[float, float, int, int]:
        """Lower comes first: priority, less what waiting has earned; who was served least; who came first."""
        request = sequence.request
        aged = request.priority - int((now - request.arrived) / AGE_SECONDS)
        return aged, self._served[request.owner], request.number, sequence.index

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline is over."""
        there = (*self.running, *self.waiting)
        return [s for s in there if s.request.deadline is not None and s.request.deadline <= now]

    def next(self, budget: int, now: float = 0.0) -> Scheduled:
        """The next batch, of about `budget` tokens at most; there must be something to do."""
        self._renew()
        self._alone_last = not self._alone_last
        turns = [self._together, self._one_alone][:: -1 if self._alone_last else 1]
        chosen = turns[0](budget, now) or turns[1](budget, now)
        assert chosen, "nothing runs though something waits"
        return self._counted(self._scheduled(chosen))

    def further(self, under_way: ReadOnly[Scheduled], budget: Callable[[], int], now: float) -> Scheduled | None:
        """One more batch beside those under way: one that is foreseen or, of several flights, of what is known."""
        if self.flights == 1:
            return self.ahead(under_way[0]) if len(under_way) == 1 else None
        if len(under_way) >= self.flights or any(sequence.alone for sequence in (*self.running, *self.waiting)):
            return None  # whoever is by itself gets its turns when nothing is under way
        self._renew()
        chosen = self._together(budget(), now)
        return self._counted(self._scheduled(chosen)) if chosen else None

    def _renew(self) -> None:
        """Those that have outgrown their form start over."""
        for sequence in self.running:
            if not sequence.flying and self.stretching.outgrown(sequence, len(sequence.tokens)):
                self._begin(sequence, 0)

    def _together(self, budget: int, now: float) -> dict[Sequence, int]:
        """How many tokens of each go into one batch."""
        chosen: dict[Sequence, int] = {}
        answers = -(-sum(sequence.left == 1 and not sequence.alone for sequence in self.running) // self.flights)
        self.running.sort(key=lambda s: (s.unsent > 1, self.urgency(s, now)))
        for sequence in list(self.running):
            answers -= sequence.unsent == 1 and not sequence.alone
            later = sequence.unsent == 1 and answers < 0  # in another flight
            if budget > 0 and sequence.slot is not None and not sequence.alone and not later:  # preempted: no slot
                budget -= self._extend(sequence, budget, chosen, now)
        for sequence in self._starting(now):
            if budget <= 0:
                break
            budget -= self._extend(sequence, budget, chosen, now)
        return chosen

    def _one_alone(self, budget: int, now: float) -> dict[Sequence, int]:
        """The same for one of those that are computed by themselves."""
        chosen: dict[Sequence, int] = {}
        there = sorted((s for s in (*self.running, *self.waiting) if s.alone), key=lambda s: self.urgency(s, now))
        if self._last_alone in there:  # in turn
            after = there.index(self._last_alone) + 1
            there = there[after:] + there[:after]
        for sequence in there:
            if self._found_slot(sequence, now) and self._extend(sequence, budget, chosen, now):
                self._last_alone = sequence
                break
        return chosen

    def _found_slot(self, sequence: Sequence, now: float) -> bool:
        """Sees to it that a sequence runs, at the cost of a less urgent one if need be; True if it does."""
        if sequence.slot is None and not self._may_start():
            own = self.urgency(sequence, now)
            others = [s for s in self.running if not s.flying and self.urgency(s, now) > own]
            if others:
                self._preempt(max(others, key=lambda s: self.urgency(s, now)))
        if sequence.slot is None and self._may_start():
            self._start(sequence, None)
        return sequence.slot is not None

    def ahead(self, scheduled: Scheduled) -> Scheduled | None:
        """The batch that follows `scheduled`, made before its tokens are known; None if that can't be foreseen.

        It can if the same sequences all go on, whatever their next token is. One that a stop token ends meanwhile
        has then been computed once too often, which costs a row and changes nothing.
        """
        same = set(scheduled.sequences) == set(self.running) and not (self.waiting and self._may_start())
        fits = self.used + 2 * len(self.running) <= self.memory and all(scheduled.growing)
        if not (same and fits):
            return None
        if any(not s.foreseeable or s.alone or s.produced + 1 >= s.request.limit for s in scheduled.sequences):
            return None
        if any(self.stretching.outgrown(s, len(s.tokens) + 1) for s in scheduled.sequences):
            return None
        segments = tuple(Segment(old.sequence, old.end, 1, prompt=old.prompt) for old in scheduled.batch.segments)
        for segment in segments:
            self._filled[segment.sequence] = max(self._filled[segment.sequence], segment.end)
        follows = tuple(rows - 1 for rows in accumulate(old.wanted for old in scheduled.batch.segments))
        return self._counted(Scheduled(Batch(segments), scheduled.sequences, (), scheduled.growing, follows))

    def _counted(self, scheduled: Scheduled) -> Scheduled:
        """Puts the batch on its owners' accounts; a token of an answer counts twice, as it takes a pass of its own."""
        for sequence, segment, grows in scheduled.parts:
            self._served[sequence.request.owner] += segment.length + grows
            sequence.flying += segment.length
        return scheduled

    def _scheduled(self, chosen: dict[Sequence, int]) -> Scheduled:
        segments, tokens, growing = [], [], []
        for sequence, count in chosen.items():
            assert sequence.slot is not None
            whole = count == sequence.unsent
            wanted, pooled = count if sequence.heeded else int(whole), sequence.request.params.pooling is not None
            segments.append(
                Segment(sequence.slot, sequence.sent, count, wanted, self.stretching.prompt(sequence), pooled)
            )
            growing.append(whole and sequence.request.limit > 0)
            tokens += sequence.tokens[sequence.sent : sequence.sent + count]
        return Scheduled(Batch(tuple(segments)), tuple(chosen), tuple(tokens), tuple(growing))

    def _may_start(self) -> bool:
        return len(self.running) < self.sequences

    def _extend(self, sequence: Sequence, most: int, chosen: dict[Sequence, int], now: float) -> int:
        """Takes the next tokens of a running sequence into the batch; returns how many there was memory for."""
        if sequence.scored:
            most = min(most, self.most_scored - sum(count for other, count in chosen.items() if other.scored))
        count = self._piece(sequence, most, alone=not chosen) if most > 0 else 0
        slot, end = sequence.slot, sequence.sent + count
        assert slot is not None
        if not count or not self._make_room(end - self._filled[slot], sequence, chosen, now):
            return 0
        self._filled[slot] = max(self._filled[slot], end)
        chosen[sequence] = count
        return count

    def _piece(self, sequence: Sequence, most: int, alone: bool) -> int:
        """How many of its next tokens: all, or up to a multiple of the granule; more than `most` only if it is alone.

        Never all but one where the granule matters: one token by itself is computed by another kernel.
        """
        length, sent = len(sequence.tokens), sequence.sent
        if self.granule > 1 and sequence.produced:  # what was an answer has the bits of tokens one by one
            length = len(sequence.request.prompt)
            if sent >= length:
                return min(1, sequence.unsent)
        stop = _cut(sent + most, length, self.granule)
        if stop <= sent and alone:
            stop = _cut(min(length, sent + 2 * self.granule), length, self.granule)
        return max(0, stop - sent)

    def _make_room(self, tokens: int, sequence: Sequence, chosen: Iterable[Sequence], now: float) -> bool:
        """Sees to it that so many more tokens of a sequence fit, at the cost of prefixes and of less urgent ones."""
        own = self.urgency(sequence, now)
        while self.used + tokens > self.memory:
            others = [s for s in self.running if not s.flying and s not in chosen and self.urgency(s, now) > own]
            if (slot := self.prefixes.oldest()) is not None:
                self.prefixes.take(slot)
                self._drop(slot)
            elif others:
                self._preempt(max(others, key=lambda s: self.urgency(s, now)))
            else:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._drop(sequence.slot)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        sequence.slot, sequence.computed = None, 0
        self.counts.preempted += 1

    def _starting(self, now: float) -> Iterator[Sequence]:
        """Waiting sequences that start now, the most urgent first; the first that finds no memory ends it."""
        if not self._may_start():
            return
        for sequence in sorted((s for s in self.waiting if not s.alone), key=lambda s: self.urgency(s, now)):
            prefix = self._found(sequence)
            if self._being_computed(sequence) >= (prefix.length if prefix else 0) + WORTH_WAITING:
                continue  # until then: the others' turn
            if self.running and not self._fits(sequence, prefix):
                return
            self._start(sequence, prefix)
            yield sequence
            if not self._may_start():
                return

    def _fits(self, sequence: Sequence, prefix: Prefix | None) -> bool:
        """True if all of it fits beside what runs, once kept prefixes have gone."""
        promised = sum(len(s.tokens) + HEADROOM for s in self.running) + len(sequence.tokens) + HEADROOM
        source = prefix.slot if prefix is not None and prefix.slot in self.prefixes else None
        return promised + (self._filled[source] if source is not None else 0) <= self.memory

    def _found(self, sequence: Sequence) -> Prefix | None:
        """Where the longest known beginning of its tokens is."""
        if not self.prefixes.limit or sequence.heeded:
            return None
        tokens = sequence.request.packed if not sequence.produced else packed(sequence.tokens)
        kept = self.prefixes.longest(tokens, (self.stretching.of(sequence), sequence.request.salt))
        prefixes = [kept] if kept is not None else []
        for other in self.running:
            assert other.slot is not None
            if other.tokens[0] == sequence.tokens[0] and self._shares(other, sequence):
                prefixes.append(Prefix(other.slot, min(other.computed, shared(other.request.packed, tokens))))
        slot, length = max(prefixes, key=lambda f: f.length, default=Prefix(0, 0))
        length = self._usable(length, sequence)
        return Prefix(slot, length) if length >= LEAST_SHARED else None

    def _usable(self, length: int, sequence: Sequence) -> int:
        """How much of a shared beginning can be reused: the last token is computed in any case."""
        last = (len(sequence.request.prompt) if self.granule > 1 else len(sequence.tokens)) - 1
        length = min(length, last) // self.granule * self.granule
        alone = self.granule > 1 and length == last
        return length - self.granule if alone else length

    def _being_computed(self, sequence: Sequence) -> int:
        """How much of its beginning other sequences are about to have."""
        if not self.prefixes.limit or sequence.heeded:
            return 0
        soon = (
            self._usable(shared(other.request.packed, sequence.request.packed), sequence)
            for other in self.running
            if other.left > 1 and other.tokens[0] == sequence.tokens[0] and not other.alone
            if self._shares(other, sequence)
        )
        return max(soon, default=0)

    def _shares(self, other: Sequence, sequence: Sequence) -> bool:
        """Whether what a running one computes is what another one would."""
        return other.request.salt == sequence.request.salt and other.stretch == self.stretching.of(sequence)

    def _begin(self, sequence: Sequence, computed: int) -> None:
        """It is computed from there on, in the form that its tokens call for."""
        sequence.computed, sequence.flying, sequence.stretch = computed, 0, self.stretching.of(sequence)

    def _lasting(self, sequence: Sequence) -> int:
        """How many of its computed positions others can have."""
        length = len(sequence.request.prompt) if self.granule > 1 else sequence.computed
        return min(self.stretching.lasting(sequence), length)

    def _start(self, sequence: Sequence, prefix: Prefix | None) -> None:
        """Gives a waiting sequence a slot, with what is known of its beginning in it."""
        copied = prefix is not None and self._worth_a_copy(prefix) and self._room_for_copy(prefix)
        if prefix is not None and not copied and prefix.slot not in self.prefixes:
            prefix = None
        length = prefix.length if prefix is not None else 0
        if prefix is not None and not copied:
            self.prefixes.take(prefix.slot)
            slot = prefix.slot
        else:
            slot = self._free.pop()
            if prefix is not None:
                self._moves.append(CopyPrefix(prefix.slot, slot, length))
        self._filled[slot] = max(self._filled[slot], length)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.slot, sequence.reused = slot, length
        self._begin(sequence, length)
        self.counts.looked_up += len(sequence.request.prompt)
        self.counts.reused += length

    def _worth_a_copy(self, prefix: Prefix) -> bool:
        """Whether going on in the prefix's own slot would cost another sequence its own, or much of what is kept."""
        kept = prefix.slot in self.prefixes
        return not kept or self.prefixes.length(prefix.slot) - prefix.length > LITTLE * prefix.length

    def _room_for_copy(self, prefix: Prefix) -> bool:
        """Sees to it that a copy fits beside all else, at the cost of other prefixes; False if it doesn't."""
        while self.used + prefix.length > self.memory and (slot := self.prefixes.oldest(prefix.slot)) is not None:
            self.prefixes.take(slot)
            self._drop(slot)
        return self.used + prefix.length <= self.memory

    def _drop(self, slot: int) -> None:
        self._moves.append(Drop(slot))
        self._filled[slot] = 0
        self._free.append(slot)

    def moves(self) -> list[Move]:
        """What is to be done with slots before the next batch, in this order; told once."""
        moves, self._moves = self._moves, []
        return moves

    def rewind(self) -> None:
        """Key/value memory was lost: running sequences start over, from the tokens that they have."""
        self._free += self.prefixes.clear()
        self._filled = [0] * self.slots
        self._moves.clear()
        for sequence in self.running:
            self._begin(sequence, 0)

    def leave(self, sequences: Iterable[Sequence]) -> None:
        """Takes sequences out, running or waiting; what they have computed may be of use to others."""
        for sequence in sequences:
            if sequence.slot is None:
                self.waiting.remove(sequence)
                continue
            self.running.remove(sequence)
            tokens = packed(sequence.tokens[: self._lasting(sequence) if sequence.of_use else 0])
            for slot in self.prefixes.keep(sequence.slot, tokens, (sequence.stretch, sequence.request.salt)):
                self._drop(slot)
            sequence.slot = None

    def forget_prefixes(self) -> None:
        """Lets go of everything that is kept."""
        for slot in self.prefixes.clear():
            self._drop(slot)

    def check_integrity(self) -> None:
        """Asserts that every slot is free, kept, or one sequence's, and that memory is counted right."""
        self.prefixes.check_integrity()
        used = [s.slot for s in self.running if s.slot is not None]
        kept = [slot for slot in range(self.slots) if slot in self.prefixes]
        assert len(used) == len(self.running), "a running sequence has no slot"
        assert sorted([*used, *kept, *self._free]) == list(range(self.slots)), "a slot has two uses, or none"
        assert all(s.slot is None and s.computed == 0 for s in self.waiting), "a waiting sequence has memory"
        assert all(self._filled[s.slot] >= s.sent for s in self.running if s.slot is not None), "more than there is"
        assert all(self._filled[slot] >= self.prefixes.length(slot) for slot in kept), "a prefix is not in memory"
        assert not any(self._filled[slot] for slot in self._free), "a free slot has memory"
        assert self.used <= self.memory or len(self.running) == 1, "more memory is used than there is"


def _cut(stop: int, length: int, granule: int) -> int:
    """The last position up to `stop` where a sequence of this length may be cut."""
    if stop >= length:
        return length
    stop = stop // granule * granule
    return stop - granule if granule > 1 and length - stop == 1 else stop
