"""Which of several replicas a request goes to: the one with the longest prefix of it, unless that one is busier by more
than the prefix is worth.

Both are counted in tokens of prompts: what a replica has still to compute before it is at the request's prompt, and
what of that prompt it need not compute again. Knows tokens and backlogs; knows nothing of engines, servers or
processes, so that a cluster's router decides by the same code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

BLOCK = 32  # tokens that are compared at once
ANSWER = 64  # tokens of prompts that an answer under way counts as: one of usual length, half of which is there
FULL = 1024  # those that waiting for a slot counts as


class Backlog(NamedTuple):
    """Of one replica: tokens of prompts that it has still to compute, completions under way or waiting, and how many
    may be under way; 0: any number."""

    prompt: int = 0
    completions: int = 0
    slots: int = 0

    @property
    def tokens(self) -> int:
        """All of it, in tokens of prompts."""
        waits = FULL * (self.completions // self.slots) if self.slots else 0
        return self.prompt + ANSWER * self.completions + waits


class Router:
    """Remembers the prompts that each of so many replicas was given last: as many as it keeps, and as far as its
    `tokens` of key/value memory go. What a replica has let go of earlier is computed anew, and found there next."""

    def __init__(self, replicas: int, prompts: int, tokens: int) -> None:
        self._prompts, self._blocks = prompts, tokens // BLOCK
        self._there = [OrderedDict[tuple[int, ...], None]() for _ in range(replicas)]
        self._given = [0] * replicas  # requests

    def order(self, prompt: Sequence[int], backlogs: Sequence[Backlog | None], salt: str = "") -> list[int]:
        """Replicas, the best one first. `backlogs`: None of those that take nothing; `salt`: prefixes are shared where
        it is the same."""
        marks = _marks(prompt, salt)
        costs = {
            replica: (backlog.tokens + len(prompt) - BLOCK * self._shared(replica, marks), self._given[replica])
            for replica, backlog in enumerate(backlogs)
            if backlog is not None
        }
        return sorted(costs, key=lambda replica: costs[replica])

    def took(self, replica: int, prompt: Sequence[int], salt: str = "") -> None:
        """A replica has a request."""
        there, marks = self._there[replica], _marks(prompt, salt)
        self._given[replica] += 1
        for shorter in [each for each in there if each == marks[: len(each)]]:  # a conversation goes on
            del there[shorter]
        if marks:
            there[marks] = None
        while len(there) > self._prompts or sum(map(len, there)) > self._blocks:
            there.popitem(last=False)

    def forget(self, replica: int) -> None:
        """It was started again, and has nothing any more."""
        self._there[replica].clear()

    def _shared(self, replica: int, marks: tuple[int, ...]) -> int:
        """Blocks from the beginning on that a replica has."""
        return max((_alike(marks, each) for each in self._there[replica]), default=0)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _marks(prompt: Sequence[int], salt: str) -> tuple[int, ...]:
    """One for each whole block and all that comes before it."""
    mark, marks = hash(salt), list[int]()
    for first in range(0, len(prompt) - BLOCK + 1, BLOCK):
        mark = hash((mark, *prompt[first : first + BLOCK]))
        marks.append(mark)
    return tuple(marks)
