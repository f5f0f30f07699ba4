"""One request under way, and what of it is to be fetched: pieces of its completions as they grow.

Knows sequences, completions and asyncio; knows nothing of HTTP or of the engine's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from weft.batching.request import Request, Sequence
from weft.completion import Completion
from weft.embedding import Embedding
from weft.execute.protocol import Chosen


class Token(NamedTuple):
    """A token of a prompt or an answer, and the characters of the text before it. `scored`: not for a first one."""

    chosen: Chosen
    offset: int
    scored: bool = True


@dataclass(frozen=True)
class Piece:
    """What a batch added to one completion. `tokens`: those whose text is known; `scores`: of the prompt's tokens from
    the second one on, with the first piece, if they were asked for; `embedding`: the prompt's, likewise."""

    index: int
    text: str
    tokens: list[Token]
    scores: list[Chosen] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    embedding: Embedding | None = None


@dataclass(frozen=True)
class Prefill:
    """How far a prompt is: tokens computed, of them reused, and all; seconds since it was queued."""

    done: int
    reused: int
    total: int
    seconds: float


Item = Piece | Prefill | Exception  # what a request gets


@dataclass(frozen=True)
class Wishes:
    """What a request asks of the service beside its sampling parameters. `timeout`: seconds since it `arrived`, by the
    monotonic clock; 0: now. `salt`: see `Request`."""

    priority: int = 0
    owner: str = ""
    timeout: float | None = None
    arrived: float = 0.0
    salt: str = ""


@dataclass(eq=False)
class Ticket:
    """One request under way, and what of it is to be fetched."""

    loop: asyncio.AbstractEventLoop
    arrived: float
    prompt_tokens: int
    request: Request | None = None
    reused: int = 0
    first: float | None = None  # seconds to the first token
    last: float = 0.0  # when its last token came
    cancelled: bool = False  # nobody waits for it any more
    drop: Callable[[], None] = lambda: None  # has whose it is end it
    ended: set[int] = field(default_factory=set)  # completions whose last piece was made
    _came: float = 0.0  # the last piece, by the loop's clock
    _looking: asyncio.TimerHandle | None = None
    _queue: asyncio.Queue[Item | None] = field(default_factory=asyncio.Queue)
    _shown: dict[int, tuple[int, int]] = field(default_factory=dict)  # characters and tokens, by completion
    _counted: dict[int, int] = field(default_factory=dict)  # tokens, by completion

    async def pieces(self, every: float) -> AsyncGenerator[Piece | Prefill | None]:
        """What comes, until all completions have ended; None after `every` seconds in which nothing came.

        Raises what ended the request early.
        """
        left = self.request.params.n if self.request is not None else 1
        self._look(every)
        try:
            while left:
                item = await self._queue.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Piece) and item.finish_reason is not None:
                    left -= 1
                yield item
        finally:
            if self._looking is not None:
                self._looking.cancel()

    def _look(self, every: float) -> None:
        """Says that nothing came, if that is so; and looks again. A timeout for each piece would cost a fifth of what
        sending it does."""
        quiet = self.loop.time() - self._came
        if self._looking is not None and quiet >= every:
            self.put(None)
        self._looking = self.loop.call_later(every - quiet if 0 < quiet < every else every, self._look, every)

    def cancel(self) -> None:
        """Nobody waits for it any more. For any thread, also where another replica is about to get it."""
        self.cancelled = True  # first: whoever gets it says where it is, and then looks at that
        self.drop()

    def put(self, item: Item | None) -> None:
        """On the event loop's thread."""
        self._came = self.loop.time()
        self._queue.put_nowait(item)

    def grown(self, sequence: Sequence, completion: Completion) -> Piece:
        """What this completion has more than when it was asked last."""
        if sequence.finish_reason is not None:
            self.ended.add(sequence.index)
        begun = sequence.index in self._shown
        shown, first = self._shown.get(sequence.index, (0, 0))
        self._shown[sequence.index] = completion.settled, len(completion.offsets)
        tokens = map(Token, completion.chosen[first:], completion.offsets[first:])
        scores = [] if begun else [completion.scores[position] for position in sorted(completion.scores)]
        return Piece(
            sequence.index, completion.text.text[shown : completion.settled], list(tokens), scores,
            sequence.finish_reason, completion.stop_reason, completion.embedding,
        )  # fmt: skip

    @property
    def over(self) -> bool:
        """Nothing more is to come of it."""
        return self.request is not None and (bool(self.request.error) or len(self.ended) == self.request.params.n)

    @property
    def tokens(self) -> int:
        """Of all its completions so far."""
        return sum(self._counted.values())

    def count(self, sequence: Sequence) -> int:
        """How many tokens a completion got since this was asked last."""
        before = self._counted.get(sequence.index, 0)
        self._counted[sequence.index] = sequence.produced
        return sequence.produced - before


def post(items: Iterable[tuple[Ticket, Item]]) -> None:
    """To each loop in one go."""
    items = list(items)
    for loop in {ticket.loop for ticket, _ in items}:
        on_loop(loop, partial(_hand_out, [(ticket, item) for ticket, item in items if ticket.loop is loop]))


def _hand_out(items: list[tuple[Ticket, Item]]) -> None:
    for ticket, item in items:
        ticket.put(item)


def on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Has the loop do it; a loop that has ended has nobody left who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
