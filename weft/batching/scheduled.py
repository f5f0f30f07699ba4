"""What the batcher decides: a batch with the sequences behind it, and what becomes of memory.

Knows requests and slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from weft.batching.request import Sequence
from weft.program.batch import Batch, Segment


class CopyPrefix(NamedTuple):
    """The first `length` positions of one slot go to another."""

    source: int
    target: int
    length: int


class Drop(NamedTuple):
    """A slot's memory is given back."""

    slot: int


Move = CopyPrefix | Drop


@dataclass(frozen=True)
class Scheduled:
    """A batch, the sequence behind each of its segments, and the token of each of its rows.

    `follows`: where tokens are not known yet, for each row the wanted row of the batch before whose token it gets.
    """

    batch: Batch
    sequences: tuple[Sequence, ...]
    tokens: tuple[int, ...]
    growing: tuple[bool, ...]  # which of them get a token: all but those that go on in another batch
    follows: tuple[int, ...] = ()

    @property
    def parts(self) -> Iterator[tuple[Sequence, Segment, bool]]:
        """Each sequence with its segment, and whether it gets a token."""
        return zip(self.sequences, self.batch.segments, self.growing, strict=True)


@dataclass
class Counts:
    """What happened so far: tokens of prompts that were looked up among the prefixes, and those that were there;
    sequences that had to wait again."""

    looked_up: int = 0
    reused: int = 0
    preempted: int = 0
