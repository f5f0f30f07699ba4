"""Responses that later requests may go on from: in memory, within limits, each for the key that asked for it.

Knows bytes and owners; knows nothing of what is in a response.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

MOST, BYTES, SECONDS = 1000, 64 << 20, 3600.0  # at most: how many, how large in all, how long


class KeptResponse(NamedTuple):
    """`items`: JSON of all that was said up to its end; `body`: the response itself."""

    owner: str
    items: list[bytes]
    body: bytes
    until: float

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.body) + sum(map(len, self.items))


class KeptResponses:
    """By their ids, which are random. The oldest go first."""

    def __init__(self, most: int = MOST, size: int = BYTES, seconds: float = SECONDS) -> None:
        self._most, self._size, self._seconds = most, size, seconds
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()

    def put(self, name: str, owner: str, items: list[bytes], body: bytes) -> None:
        """One more; too large a one is not kept."""
        kept = KeptResponse(owner, items, body, time.monotonic() + self._seconds)
        if kept.size <= self._size // 4:
            self._kept[name] = kept
        while len(self._kept) > self._most or sum(each.size for each in self._kept.values()) > self._size:
            self._kept.popitem(last=False)

    def get(self, name: str, owner: str) -> KeptResponse | None:
        """If it is there, and this owner's."""
        while self._kept and next(iter(self._kept.values())).until < time.monotonic():
            self._kept.popitem(last=False)
        kept = self._kept.get(name)
        return kept if kept is not None and kept.owner == owner else None

    def drop(self, name: str, owner: str) -> bool:
        """Whether it was there."""
        return self.get(name, owner) is not None and self._kept.pop(name, None) is not None
