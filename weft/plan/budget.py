"""How many tokens a batch may have so that it takes no longer than wanted. Knows plans and seconds; no torch.

Where costs are known, plans are asked; else what batches of that size took so far.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from weft.plan.drift import Factors
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment
from weft.timeline.timeline import median

SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # rows
LARGE = 64  # rows, from which a batch's time grows with them
SEEN = 15  # of the last batches the median counts
FIRST = 256  # rows, as long as nothing is known
ALONE = 5  # times the wanted time between tokens a batch may take while nobody is waiting for a next token
LEAST_ALONE = 512  # tokens of such a batch: smaller ones hide their communication worse
AT_LEAST = 1.5  # times what decoding takes alone: where that is as slow as wanted already, prompts come on all the same


class Budget:
    """Budgets of one engine's batches."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._known: dict[tuple[int, int, float, tuple[Factors, ...]], int] = {}
        self._a_row: deque[float] = deque(maxlen=SEEN)
        self._decoding: deque[float] = deque(maxlen=SEEN)
        self._sampling: deque[float] = deque(maxlen=SEEN)

    def observe(self, batch: Batch, seconds: float, sampling: float = 0.0) -> None:
        """What a batch took, and what choosing tokens after it took."""
        self._sampling.append(sampling)
        seconds += sampling
        if batch.tokens >= LARGE:
            self._a_row.append(seconds / batch.tokens)
        elif all(segment.decoding for segment in batch.segments):
            self._decoding.append(seconds)

    def tokens(self, interval: float | None, decoding: Sequence[Segment], most: int) -> int:
        """Of the next batch: as many as go well with those who wait for their next token. `interval`: seconds that they
        should have to wait; None: throughput is all that counts."""
        if interval is None:
            return max(most, len(decoding))
        if decoding:
            return self.rows(interval, decoding, most)
        return max(min(LEAST_ALONE, most), self.rows(ALONE * interval, (), most))

    def rows(self, seconds: float, decoding: Sequence[Segment], most: int) -> int:
        """Rows of a batch that takes `seconds`, the decoding segments included; never fewer than let a prompt go on."""
        if not self.planner.knows_costs:
            rows = self._by_experience(seconds, len(decoding))
        else:
            sampling = median(self._sampling) if self._sampling else 0.0  # plans know nothing of it
            rows = self._by_plans(seconds - min(round(sampling, 3), seconds / 2), decoding)
        return max(len(decoding) + SIZES[0], min(rows, most))

    def _by_experience(self, seconds: float, decoding: int) -> int:
        if not self._a_row:
            return FIRST
        alone = median(self._decoding) if self._decoding and decoding else 0.0
        return decoding + int((max(seconds, AT_LEAST * alone) - alone) / median(self._a_row))

    def _by_plans(self, seconds: float, decoding: Sequence[Segment]) -> int:
        """Asked once for about as many sequences of about the same length."""
        alike = 1 << len(decoding).bit_length() if decoding else 0
        start = 1 << max((segment.start for segment in decoding), default=0).bit_length()
        key = alike, start, seconds, tuple(self.planner.drift.factors.values())
        if key not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            beside = tuple(Segment(slot, start, 1) for slot in range(alike))
            allowed = max(seconds, AT_LEAST * self._predicted(beside, 0)) if beside else seconds
            self._known[key] = bisect_right(SIZES, allowed, key=lambda rows: self._predicted(beside, rows))
        fitting = self._known[key]
        return len(decoding) + (SIZES[fitting - 1] if fitting else 0)

    def _predicted(self, beside: tuple[Segment, ...], rows: int) -> float:
        """Seconds of a batch of these and a prompt of so many rows."""
        prompt = (Segment(len(beside), 0, rows),) if rows else ()
        expected = self.planner.expect(Batch((*(replace(s, sequence=n) for n, s in enumerate(beside)), *prompt)))
        layout = self.planner.layout  # in a pipeline others come between a sequence's batches
        flights = len(layout.sections) if layout is not None else 1
        return max(expected.seconds, flights * expected.lanes.compute if flights > 1 else 0.0)
