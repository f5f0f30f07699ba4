"""Which tokens go into the next batch. Knows requests and how much fits; knows no model, plan or process.

Every step takes the next token of each running sequence and, as long as slots, key/value memory and the batch's
token budget allow, whole new prompts in the order of their coming.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from weft.batching.request import Request, Sequence
from weft.program.batch import Batch, Segment


@dataclass(frozen=True)
class Scheduled:
    """A batch, the sequence behind each of its segments, and the token of each of its rows.

    A token below zero is not known yet: -1 - i stands for what the batch before gives its i-th sequence.
    """

    batch: Batch
    sequences: tuple[Sequence, ...]
    tokens: tuple[int, ...]


class Batcher:
    """Waiting and running sequences. Lengths in tokens; `memory_tokens`: what key/value memory holds in all."""

    def __init__(self, slots: int, batch_tokens: int, memory_tokens: int) -> None:
        self.batch_tokens, self.memory_tokens = batch_tokens, memory_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(slots - 1, -1, -1))

    def add(self, request: Request) -> None:
        """Queues a request's sequences."""
        self.waiting.extend(request.sequences)

    @property
    def idle(self) -> bool:
        """True if nothing is left to do."""
        return not (self.waiting or self.running)

    def next(self) -> Scheduled:
        """The next batch; there must be something to do."""
        tokens = sum(len(s.tokens) - s.computed for s in self.running)
        while self._may_start(tokens):
            sequence = self.waiting.popleft()
            sequence.slot = self._free.pop()
            self.running.append(sequence)
            tokens += len(sequence.tokens)
        return _scheduled(self._within_budget())

    def ahead(self, scheduled: Scheduled) -> Scheduled | None:
        """The batch that follows `scheduled`, made before its tokens are known; None if that can't be foreseen.

        It can if the same sequences all go on, whatever their next token is. One that a stop token ends meanwhile
        has then been computed once too often, which costs a row and changes nothing.
        """
        same = list(scheduled.sequences) == self.running and not (self.waiting and self._free)
        if not same or any(not s.foreseeable or s.produced + 1 >= s.request.limit for s in scheduled.sequences):
            return None
        segments = tuple(Segment(segment.sequence, segment.end, 1) for segment in scheduled.batch.segments)
        return Scheduled(Batch(segments), scheduled.sequences, tuple(-1 - i for i in range(len(segments))))

    def _may_start(self, tokens: int) -> bool:
        """True if the first waiting sequence fits; alone it always does."""
        if not self.waiting or not self._free:
            return False
        first = self.waiting[0]
        promised = sum(sequence.room for sequence in self.running)
        fits = promised + first.room <= self.memory_tokens
        return not self.running or (fits and tokens + len(first.tokens) <= self.batch_tokens)

    def _within_budget(self) -> Iterable[Sequence]:
        """Running sequences in order, until the budget is spent (after a restart all must be computed again)."""
        left = self.batch_tokens
        for number, sequence in enumerate(self.running):
            left -= len(sequence.tokens) - sequence.computed
            if left >= 0 or number == 0:
                yield sequence

    def rewind(self) -> None:
        """Key/value memory was lost: running sequences start over, from the tokens that they have."""
        for sequence in self.running:
            sequence.computed = 0

    def leave(self, sequences: Iterable[Sequence]) -> list[int]:
        """Takes sequences out, running or waiting, and returns the slots that became free."""
        freed = []
        for sequence in sequences:
            if sequence.slot is None:
                self.waiting.remove(sequence)
                continue
            self.running.remove(sequence)
            freed.append(sequence.slot)
            sequence.slot = None
        self._free += freed
        return freed

    def check_integrity(self) -> None:
        """Asserts that every slot is free or has one sequence."""
        used = [sequence.slot for sequence in self.running]
        assert None not in used and len(set(used)) == len(used), "two sequences share a slot, or one has none"
        assert not set(used) & set(self._free), "a used slot is listed as free"
        assert all(sequence.slot is None for sequence in self.waiting), "a waiting sequence has a slot"


def _scheduled(sequences: Iterable[Sequence]) -> Scheduled:
    chosen = tuple(sequences)
    segments, tokens = [], []
    for sequence in chosen:
        assert sequence.slot is not None
        new = sequence.tokens[sequence.computed :]
        segments.append(Segment(sequence.slot, sequence.computed, len(new)))
        tokens += new
    return Scheduled(Batch(tuple(segments)), chosen, tuple(tokens))
