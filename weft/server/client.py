"""What the server asks of whoever runs the model: one engine (service.py), or several replicas of it (replicas.py)."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from weft.about import About, Figures
from weft.batching.params import SamplingParams
from weft.grammar import Grammar
from weft.server.lately import Live
from weft.server.metrics import Metrics
from weft.server.ticket import Ticket, Wishes
from weft.text import Tokenizer


class State(StrEnum):
    """Of whoever runs the model."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"  # workers were lost; requests are kept
    DRAINING = "draining"  # what runs is finished, nothing new is taken
    FAILED = "failed"


class EngineClient(Protocol):
    """Takes requests and hands out what comes of them. `metrics` and `live` are written to from any thread."""

    metrics: Metrics
    live: Live

    @property
    def state(self) -> State:
        """How it stands."""
        ...

    @property
    def reason(self) -> str:
        """Why, in words, while it is not ready."""
        ...

    @property
    def loaded(self) -> float:
        """How much of what it starts with is done, 0 to 1."""
        ...

    @property
    def error(self) -> BaseException | None:
        """What ended it, if anything did."""
        ...

    @property
    def about(self) -> About:
        """What is served. Raises `Unavailable` while it is not there."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, if it has one. Raises `Unavailable` while the model is not there."""
        ...

    @property
    def figures(self) -> Figures | None:
        """How it stands, in numbers, if anything has been loaded."""
        ...

    @property
    def waiting(self) -> int:
        """Completions that wait for a slot."""
        ...

    @property
    def running(self) -> int:
        """Completions that have one."""
        ...

    @property
    def busy(self) -> bool:
        """Whether requests are under way, or wait."""
        ...

    def start(self) -> None:
        """Starts loading; returns at once."""
        ...

    async def loaded_or_failed(self) -> None:
        """Returns when everything is loaded. Raises what kept it from that."""
        ...

    def kept_grammar(self, schema: str) -> Grammar | None:
        """A schema's, if it is there already."""
        ...

    async def grammar(self, schema: str) -> Grammar:
        """A schema's, which may take a while. Raises `InputError`."""
        ...

    async def submit(
        self, prompt: list[int], params: SamplingParams, wishes: Wishes, grammar: Grammar | None = None
    ) -> Ticket:
        """Queues a request. `grammar`: of its schema. Raises `InputError` if it can't run, `Busy` if too many wait,
        `Unavailable`."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for any more. Safe to repeat."""
        ...

    def drain(self) -> None:
        """Takes nothing new from now on."""
        ...

    def tell(self, line: str, more: str = "") -> None:
        """Says what goes on, to whoever runs the server and to whoever asks for its state. `more`: what the former
        alone should see."""
        ...

    def abort(self, reason: str = ...) -> None:
        """Tells all requests under way that they can't be finished."""
        ...

    def close(self) -> None:
        """Ends everything; requests under way are told so."""
        ...
