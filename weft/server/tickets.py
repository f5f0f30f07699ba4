"""The tickets of one engine: whom what a batch gave belongs to, and what is counted of it.

Knows tickets, completions and metrics; knows nothing of the engine's loop. Only the engine's thread changes anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

from weft.batching.request import Request, Sequence
from weft.errors import RequestFailed
from weft.requests import Requests
from weft.routing import Backlog
from weft.server.lately import Live
from weft.server.metrics import Metrics
from weft.server.ticket import Item, Prefill, Ticket, on_loop, post

SEEN = 60.0  # seconds of finished requests, from which the wait of a refused one is estimated


class Tickets:
    """Those that are under way, by their requests."""

    def __init__(self, metrics: Metrics, live: Live) -> None:
        self.metrics, self.live = metrics, live
        self._there: dict[Request, Ticket] = {}
        self._finished: deque[float] = deque(maxlen=1000)

    def __len__(self) -> int:
        return len(self._there)

    def __iter__(self) -> Iterator[Ticket]:
        """Of those that are there now, also where others come and go meanwhile."""
        return iter(list(self._there.values()))

    def add(self, ticket: Ticket) -> None:
        """One that has its request."""
        assert ticket.request is not None, "the engine has made a request of it"
        self._there[ticket.request] = ticket

    def take(self, ticket: Ticket) -> Request | None:
        """Its request, which gets nothing any more; None if it isn't there."""
        if ticket.request is None or self._there.pop(ticket.request, None) is None:
            return None
        return ticket.request

    def abort(self, error: Exception) -> None:
        """Tells all that they can't be finished."""
        for ticket in self:
            on_loop(ticket.loop, partial(ticket.put, error))

    def left(self, slots: int) -> Backlog:
        """What is yet to do of them."""
        requests = [ticket.request for ticket in self if ticket.request is not None]
        left = [[s.left - 1 for s in request.sequences if s.finish_reason is None] for request in requests]
        return Backlog(sum(max(each, default=0) for each in left), sum(map(len, left)), slots)

    def retry_after(self, waiting: int) -> int:
        """Seconds after which there should be room, by how many were finished of late."""
        since = time.monotonic() - SEEN
        lately = sum(then > since for then in self._finished.copy())
        return max(1, min(60, round(waiting * SEEN / lately / 2))) if lately else 5

    def deliver(self, grown: Iterable[Sequence], requests: Requests) -> None:
        """Hands out what a batch gave."""
        now, tokens, out = time.monotonic(), 0, list[tuple[Ticket, Item]]()
        for sequence in grown:
            ticket = self._there.get(sequence.request)
            if ticket is None or sequence.index in ticket.ended:  # cancelled, or told already
                continue
            if sequence.request.error:
                out.append((ticket, RequestFailed(sequence.request.error)))
            else:
                out.append((ticket, ticket.grown(sequence, requests.completions[sequence])))
            tokens += self._count(ticket, sequence, now)
        if tokens:
            self.live.tokens.append((now, tokens))
        # Not by what has finished: of some that have, the last piece may still be to come.
        over = {ticket.request for ticket, _ in out if ticket.request is not None and ticket.over}
        for request in over & self._there.keys():
            ticket = self._there.pop(request)
            requests.settle(request)
            self._finished.append(now)
            self.metrics.finished(str(request.sequences[0].finish_reason), now - ticket.arrived)
        post(out)

    def under_way(self, running: Iterable[Sequence]) -> Iterator[tuple[Ticket, Prefill]]:
        """Prompts that are not yet computed to their end."""
        now = time.monotonic()
        for sequence in running:
            ticket = self._there.get(sequence.request)
            if ticket is not None and sequence.left > 1 and sequence.index == 0:
                total = len(sequence.request.prompt)
                yield ticket, Prefill(min(sequence.computed, total), sequence.reused, total, now - ticket.arrived)

    def _count(self, ticket: Ticket, sequence: Sequence, now: float) -> int:
        """How many tokens a completion got; and when."""
        tokens = ticket.count(sequence)
        computed = sequence.produced > 0 or sequence.finish_reason in ("length", "stop")
        if ticket.first is None and computed:
            ticket.first, ticket.reused = now - ticket.arrived, sequence.reused
            self.metrics.prompt(ticket.prompt_tokens)
            if sequence.produced:  # an embedding has no tokens, nor has a prompt that is only scored
                self.live.first.append(ticket.first)
                self.metrics.first_token(ticket.first)
        elif tokens and sequence.index == 0:
            self.metrics.next_token(now - ticket.last)
        self.metrics.tokens(tokens)
        if sequence.index == 0:
            ticket.last = now
        return tokens
