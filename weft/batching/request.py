"""Requests and the sequences that they become. Knows tokens, states and wishes; knows no model and no text."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

from weft.batching.params import SamplingParams
from weft.cache.prefixes import packed

_numbers = count()


@dataclass(eq=False)
class Request:
    """A prompt with its wishes, and the `n` sequences that continue it.

    `limit`: tokens of the longest completion. `priority`: lower runs earlier. `owner`: who shares the engine fairly
    with other owners. `salt`: only what has the same shares prefixes with it. `arrived`, `deadline`: seconds of a
    monotonic clock. `failures`: batches that failed with it; `error`: why it was refused.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    priority: int = 0
    owner: str = ""
    arrived: float = 0.0
    deadline: float | None = None
    salt: str = ""
    number: int = field(default_factory=lambda: next(_numbers))
    sequences: list[Sequence] = field(default_factory=list)
    failures: int = 0
    error: str = ""

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index, list(self.prompt)) for index in range(self.params.n)]

    @property
    def finished(self) -> bool:
        """True when every completion has ended."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @cached_property
    def packed(self) -> bytes:
        """The prompt in a form that compares quickly."""
        return packed(self.prompt)


@dataclass(eq=False)
class Sequence:
    """One completion under way.

    `computed`: how many of its tokens have their keys and values in memory; `flying`: how many more will, once the
    batches under way have come; `reused`: how many of them were not
    computed for it; `stretch`: what their angles depend on beside the position, see `Batcher`. `finish_reason`: "stop",
    "length", "timeout" or "error". `alone`: it is computed in batches by itself, because one that failed had it;
    `failures`: how many of those failed too, one upon the other.
    """

    request: Request
    index: int
    tokens: list[int]
    slot: int | None = None
    computed: int = 0
    flying: int = 0
    reused: int = 0
    stretch: int = 0
    finish_reason: str | None = None
    alone: bool = False
    failures: int = 0

    @property
    def output(self) -> ReadOnly[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def produced(self) -> int:
        """How many tokens that is."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens that have no keys and values yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def sent(self) -> int:
        """Tokens that are in memory, or in batches under way."""
        return self.computed + self.flying

    @property
    def unsent(self) -> int:
        """Those that are in neither."""
        return len(self.tokens) - self.sent

    def land(self, end: int) -> None:
        """A batch has come, which holds its tokens up to a position."""
        self.flying -= end - self.computed
        self.computed = end

    @property
    def scored(self) -> bool:
        """True while the tokens of its prompt are to be scored. Whoever has a token more than the prompt has its
        scores."""
        return self.request.params.prompt_logprobs is not None and not self.produced

    @property
    def heeded(self) -> bool:
        """True while all rows of its prompt are wanted, none from memory: they are scored, or their mean taken."""
        return self.scored or self.request.params.pooling == "mean"

    @property
    def of_use(self) -> bool:
        """True if others may go on from what it has in memory: of one that failed that may be why, and embeddings would
        push out what conversations go on from."""
        return self.finish_reason != "error" and self.request.params.pooling is None

    @property
    def foreseeable(self) -> bool:
        """True if how its next token is chosen doesn't depend on what the one before it was."""
        params = self.request.params
        return not (params.penalised or params.form or params.thinking)

    @property
    def alive(self) -> bool:
        """True while it runs: it has a slot and has not ended."""
        return self.slot is not None and self.finish_reason is None

    @property
    def room(self) -> int:
        """Tokens of key/value memory that it may come to need."""
        return len(self.request.prompt) + self.request.limit
