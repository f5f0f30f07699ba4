"""Requests and the sequences that they become. Knows tokens and states; knows no model, no text and no time."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from itertools import count

from weft.batching.params import SamplingParams

_numbers = count()


@dataclass(eq=False)
class Request:
    """A prompt with its wishes, and the `n` sequences that continue it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int  # tokens of the longest completion
    number: int = field(default_factory=lambda: next(_numbers))
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index, list(self.prompt)) for index in range(self.params.n)]

    @property
    def finished(self) -> bool:
        """True when every completion has ended."""
        return all(sequence.finish_reason for sequence in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One completion under way. `computed`: how many of its tokens have their keys and values in memory."""

    request: Request
    index: int
    tokens: list[int]
    slot: int | None = None
    computed: int = 0
    finish_reason: str | None = None  # "stop" or "length"

    @property
    def output(self) -> ReadOnly[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def produced(self) -> int:
        """How many tokens that is."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def foreseeable(self) -> bool:
        """True if how its next token is chosen doesn't depend on what the one before it was."""
        return not self.request.params.penalised

    @property
    def alive(self) -> bool:
        """True while it runs: it has a slot and has not ended."""
        return self.slot is not None and self.finish_reason is None

    @property
    def room(self) -> int:
        """Tokens of key/value memory that it may come to need."""
        return len(self.request.prompt) + self.request.limit
