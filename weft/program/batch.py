"""The shape of a batch: which tokens of which sequences one forward pass computes.

Knows lengths and positions; knows nothing of token ids, weights or ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Rows(NamedTuple):
    """A half-open range of the flattened batch: the coordinate that every step names. Prints as `0:512`."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    def intersects(self, other: Rows) -> bool:
        """True if at least one row is in both."""
        return self.start < other.stop and other.start < self.stop

    def contains(self, other: Rows) -> bool:
        """True if every row of `other` is in this range."""
        return self.start <= other.start and other.stop <= self.stop

    def clip(self, other: Rows) -> Rows:
        """The rows that are in both; empty (start == stop) when there are none."""
        start = max(self.start, other.start)
        return Rows(start, max(start, min(self.stop, other.stop)))


@dataclass(frozen=True)
class Segment:
    """`length` consecutive tokens of one sequence, the first at position `start` of that sequence.

    `sequence` is the slot of key/value memory. `wanted`: how many of the tokens, counted from the last, leave the last
    layer. `prompt`: tokens of the sequence's prompt, where rotary angles depend on it (see `model.rope`); 0: all of
    these tokens are. `pooled`: what leaves is added up, as an embedding; else it goes through the output head.
    """

    sequence: int
    start: int
    length: int
    wanted: int = 1
    prompt: int = 0
    pooled: bool = False

    @property
    def predicting(self) -> int:
        """How many of the tokens go through the output head."""
        return 0 if self.pooled else self.wanted

    @property
    def decoding(self) -> bool:
        """These tokens are decoded one by one, with the bits that such tokens have, and are no piece of a prompt."""
        return self.length == 1

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Batch:
    """The segments of one forward pass, flattened in this order."""

    segments: tuple[Segment, ...]

    @cached_property
    def tokens(self) -> int:
        """Number of rows."""
        return sum(segment.length for segment in self.segments)

    @cached_property
    def spans(self) -> tuple[Rows, ...]:
        """The rows of each segment."""
        spans, offset = [], 0
        for segment in self.segments:
            spans.append(Rows(offset, offset + segment.length))
            offset += segment.length
        return tuple(spans)

    @cached_property
    def wanted_rows(self) -> tuple[int, ...]:
        """The rows that leave the last layer: the last ones of each segment, as many as it wants."""
        pairs = zip(self.segments, self.spans, strict=True)
        return tuple(row for segment, span in pairs for row in range(span.stop - segment.wanted, span.stop))

    def wanted(self, rows: Rows) -> Rows:
        """Which of all wanted rows, counted from 0, are in `rows`."""
        return Rows(bisect_left(self.wanted_rows, rows.start), bisect_left(self.wanted_rows, rows.stop))

    @cached_property
    def pools(self) -> bool:
        """Some wanted rows don't go through the output head."""
        return any(segment.pooled and segment.wanted for segment in self.segments)

    @cached_property
    def predicting_rows(self) -> tuple[int, ...]:
        """The wanted rows that go through the output head."""
        if not self.pools:
            return self.wanted_rows
        pairs = zip(self.segments, self.spans, strict=True)
        return tuple(row for segment, span in pairs for row in range(span.stop - segment.predicting, span.stop))

    def predicting(self, rows: Rows) -> Rows:
        """Which of all those, counted from 0, are in `rows`."""
        return Rows(bisect_left(self.predicting_rows, rows.start), bisect_left(self.predicting_rows, rows.stop))

    @cached_property
    def pooled_parts(self) -> tuple[Rows, ...]:
        """Of each pooled segment that wants any, its rows among the wanted ones, counted from 0."""
        pairs = zip(self.segments, self.spans, strict=True)
        return tuple(self.wanted(span) for segment, span in pairs if segment.pooled and segment.wanted)

    def within(self, rows: Rows) -> Iterator[tuple[Segment, Rows, Rows]]:
        """Each segment that has tokens in `rows`, with all its rows and with those of them that are in `rows`."""
        for segment, span in zip(self.segments, self.spans, strict=True):
            if span.intersects(rows):
                yield segment, span, span.clip(rows)


def one_prompt(tokens: int) -> Batch:
    """A batch of one new prompt of `tokens` tokens, in slot 0."""
    return Batch((Segment(0, 0, tokens),))
