"""Which key/value slots still hold the beginning of which token sequence, though their sequence is over.

A new sequence that begins alike need not compute that part again. Least recently used go first. Knows token ids and
slot numbers; knows nothing of memory, models or requests. No torch.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH = array("I").itemsize


Kind = tuple[int, str]
USUAL: Kind = (0, "")


class Prefix(NamedTuple):
    """The first `length` tokens are in `slot`."""

    slot: int
    length: int


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids in a form that compares quickly."""
    return array("I", tokens).tobytes()


def shared(first: bytes, second: bytes) -> int:
    """How many tokens two packed sequences have in common from their beginning on."""
    least, most = 0, min(len(first), len(second)) // _WIDTH
    left, right = memoryview(first), memoryview(second)
    if left[: most * _WIDTH] == right[: most * _WIDTH]:
        return most
    while most - least > 1:  # `least` tokens agree, `most` don't
        middle = (least + most) // 2
        here = slice(least * _WIDTH, middle * _WIDTH)
        least, most = (middle, most) if left[here] == right[here] else (least, middle)
    return least


class Prefixes:
    """Kept slots with their tokens, at most `limit` of them, the least recently used first.

    Slots of another `kind` hold other keys for the same tokens, or somebody else's: it must be equal (see `Batcher`).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kinds: dict[int, Kind] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def length(self, slot: int) -> int:
        """Tokens that a kept slot holds."""
        return len(self._kept[slot]) // _WIDTH

    def longest(self, tokens: bytes, kind: Kind = USUAL) -> Prefix | None:
        """The kept slot that shares the longest beginning with these tokens; it counts as used now."""
        best: Prefix | None = None
        for slot, kept in self._alike(kind):
            if kept[:_WIDTH] == tokens[:_WIDTH] and (length := shared(kept, tokens)) > (best.length if best else 0):
                best = Prefix(slot, length)
        if best is not None:
            self._kept.move_to_end(best.slot)
        return best

    def _alike(self, kind: Kind) -> list[tuple[int, bytes]]:
        return [(slot, kept) for slot, kept in self._kept.items() if self._kinds[slot] == kind]

    def keep(self, slot: int, tokens: bytes, kind: Kind = USUAL) -> list[int]:
        """Keeps a slot; returns those that are let go for it, which may be the slot itself.

        What one slot holds, and more, need not be held by another.
        """
        assert slot not in self._kept, f"slot {slot} is kept already"
        if not tokens or self.limit == 0 or any(kept.startswith(tokens) for _, kept in self._alike(kind)):
            return [slot]
        dropped = [other for other, kept in self._alike(kind) if tokens.startswith(kept)]
        self._kept[slot], self._kinds[slot] = tokens, kind
        for other in dropped:
            self.take(other)
        while len(self._kept) > self.limit:
            dropped.append(next(iter(self._kept)))
            self.take(dropped[-1])
        return dropped

    def take(self, slot: int) -> None:
        """A slot gets another use."""
        del self._kept[slot], self._kinds[slot]

    def oldest(self, but: int | None = None) -> int | None:
        """The least recently used slot, beside `but`."""
        return next((slot for slot in self._kept if slot != but), None)

    def clear(self) -> list[int]:
        """Lets go of all; returns their slots."""
        slots = list(self._kept)
        self._kept.clear()
        self._kinds.clear()
        return slots

    def check_integrity(self) -> None:
        """Asserts that there are no more than allowed, and that none is empty or held by another."""
        assert len(self._kept) <= self.limit, f"{len(self._kept)} prefixes are kept, {self.limit} are allowed"
        assert all(self._kept.values()), "an empty prefix is kept"
        assert self._kept.keys() == self._kinds.keys(), "a slot is kept in part"
        for slot, tokens in self._kept.items():
            others = [kept for other, kept in self._alike(self._kinds[slot]) if other != slot]
            assert not any(tokens.startswith(kept) for kept in others), "a prefix is kept twice"
