"""Which of several replicas a request goes to: the one with the longest prefix of it, unless that one is busier by more
than the prefix is worth.

Both are counted in tokens of prompts: what a replica has still to compute before it is at the request's prompt, and
what of that prompt it need not compute again. Knows tokens and loads; knows nothing of engines, servers or processes,
so that a cluster's router decides by the same code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

BLOCK = 32  # tokens that are remembered together
ANSWER = 64  # tokens of prompts that an answer under way counts as: one of usual length, half of which is there


class Backlog(NamedTuple):
    """Of one replica: tokens of prompts that it has still to compute, and completions under way or waiting."""

    prompt: int = 0
    completions: int = 0

    @property
    def tokens(self) -> int:
        """Both, in tokens of prompts."""
        return self.prompt + ANSWER * self.completions


class Router:
    """Remembers which prompts each of so many replicas was given, as far as its `tokens` of key/value memory go. What a
    replica has let go of meanwhile it doesn't know; then a prompt is computed anew where it might have been elsewhere,
    and later ones find it there."""

    def __init__(self, replicas: int, tokens: int) -> None:
        self._most = max(1, tokens // BLOCK)
        self._there = [OrderedDict[int, None]() for _ in range(replicas)]  # blocks, by all that comes before them
        self._given = [0] * replicas  # requests

    def order(self, prompt: Sequence[int], loads: Sequence[Backlog | None], salt: str = "") -> list[int]:
        """Replicas, the best one first. `loads`: None of those that take nothing; `salt`: prefixes are shared where it
        is the same."""
        marks = _marks(prompt, salt)
        costs = {
            replica: (load.tokens + len(prompt) - BLOCK * self._shared(replica, marks), self._given[replica])
            for replica, load in enumerate(loads)
            if load is not None
        }
        return sorted(costs, key=lambda replica: costs[replica])

    def sent(self, replica: int, prompt: Sequence[int], salt: str = "") -> None:
        """A replica took a request."""
        there = self._there[replica]
        self._given[replica] += 1
        for mark in reversed(_marks(prompt, salt)):  # so that of a prompt its end is forgotten first
            there[mark] = None
            there.move_to_end(mark)
        while len(there) > self._most:
            there.popitem(last=False)

    def forget(self, replica: int) -> None:
        """It was started again, and has nothing any more."""
        self._there[replica].clear()

    def _shared(self, replica: int, marks: Sequence[int]) -> int:
        """Blocks from the beginning on that a replica has."""
        return next((n for n, mark in enumerate(marks) if mark not in self._there[replica]), len(marks))


def _marks(prompt: Sequence[int], salt: str) -> list[int]:
    """One for each whole block and all that comes before it."""
    mark, marks = hash(salt), list[int]()
    for first in range(0, len(prompt) - BLOCK + 1, BLOCK):
        mark = hash((mark, *prompt[first : first + BLOCK]))
        marks.append(mark)
    return marks
