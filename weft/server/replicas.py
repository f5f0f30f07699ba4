"""Several engines of the same model as one, in one server: each request goes to the replica where it costs least.

Knows services and the policy (routing.py); knows nothing of HTTP. A replica whose ranks are lost starts them again and
goes on with its requests, while the others serve; what it has computed is what routing then forgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from itertools import pairwise

from weft.about import About, Figures
from weft.batching.params import SamplingParams
from weft.errors import Busy, InputError, Unavailable
from weft.grammar import Grammar
from weft.routing import Backlog, Router
from weft.server.client import State
from weft.server.service import Service
from weft.server.ticket import Ticket, Wishes
from weft.text import Tokenizer
from weft.units import counted

FIGURES = [field.name for field in fields(Figures)]
MOVES_AFTER = 5.0  # seconds that ranks are missing: others need not pay for one that ends by itself and comes back
QUEUES_AFTER = 20.0  # seconds after which they may also wait elsewhere
FAILURES = 1  # of a request that may move: one that ends ranks wherever it goes stays where it is
COUNTED = ("looked_up", "reused", "preempted", "restarts")  # of what Figures has
PRECEDENCE = (State.DRAINING, State.LOADING, State.READY, State.RESTARTING, State.FAILED)  # of what replicas are


class Replicas:
    """Services of the same model and the same options, which share `metrics` and `live`. They are loaded one after the
    other: each sees what memory the ones before it left, and finds what they measured. `told`: what whoever runs the
    server should see, a line each."""

    def __init__(self, services: Sequence[Service], told: Callable[[str], None] = lambda line: None) -> None:
        self.services, self._told, self._line = list(services), told, ""
        self.metrics, self.live = services[0].metrics, services[0].live
        self._relieve_each(services)
        self._coming = [Backlog() for _ in services]  # given to a service, and not among what it has yet
        self._restarts = [0 for _ in services]

    def add(self, services: Sequence[Service]) -> None:
        """More of them, while those that there are load: the next ones to do so."""
        self._coming += [Backlog() for _ in services]
        self._restarts += [0 for _ in services]
        self._relieve_each(services)
        last = self.services[-1]
        self.services += services
        for before, service in pairwise((last, *services)):
            service.start(before.wait)

    def start(self) -> None:
        """Starts loading; returns at once."""
        self.services[0].start()
        for before, service in pairwise(self.services):
            service.start(before.wait)

    def wait(self) -> None:
        """Returns when all are loaded. Raises what kept one from that."""
        for service in self.services:
            service.wait()

    async def loaded_or_failed(self) -> None:
        """The same for asyncio, which can give up waiting."""
        for service in self.services:
            await service.loaded_or_failed()

    @property
    def state(self) -> State:
        """Ready while one is, once all were loaded."""
        states = {service.state for service in self.services}
        return next(state for state in PRECEDENCE if state in states)

    @property
    def reason(self) -> str:
        """What is to be said of all, or of the replica whose state counts; and of those that have given up."""
        state, each = self.state, list(enumerate(self.services, 1))
        if len(each) == 1:
            return self.services[0].reason
        told = State.RESTARTING if state is State.READY else state  # of those that are missing while others serve, all
        said = [f"replica {number}: {one.reason}" for number, one in each if one.state is told and one.reason]
        gone = [f"replica {number} has given up: {one.reason}" for number, one in each if one.state is State.FAILED]
        if state is State.DRAINING and self._line:
            said = [self._line]
        if state is not State.READY:
            said = said[:1] if state is not State.FAILED else []
        return "; ".join([*said, *gone])

    @property
    def loaded(self) -> float:
        """How much of all is done, 0 to 1."""
        return sum(service.loaded for service in self.services) / len(self.services)

    @property
    def error(self) -> BaseException | None:
        """What ended the last one."""
        errors = [service.error for service in self.services]
        return errors[-1] if all(error is not None for error in errors) else None

    @property
    def about(self) -> About:
        """Of one, with the shortest context and the notices of all. Raises `Unavailable`."""
        each = [service.about for service in self._able()]
        notices = dict.fromkeys(notice for about in each for notice in about.notices)
        length = min(about.max_length for about in each)
        return replace(each[0], replicas=len(self.services), max_length=length, notices=tuple(notices))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, if it has one. Raises `Unavailable`."""
        return self._able()[0].tokenizer

    @property
    def figures(self) -> Figures | None:
        """Sums over those that are there, and of the memory their mean part. Of those that have given up only what was
        counted."""
        each = [(service.state, figures) for service in self.services if (figures := service.figures) is not None]
        if not each:
            return None
        everyone = [figures for _, figures in each]
        alive = [figures for state, figures in each if state is not State.FAILED]
        sums = {name: sum(getattr(one, name) for one in (everyone if name in COUNTED else alive)) for name in FIGURES}
        return Figures(**sums | {"memory": sums["memory"] / max(1, len(alive))})

    @property
    def waiting(self) -> int:
        """Completions that wait for a slot."""
        return sum(service.waiting for service in self.services if service.state is not State.FAILED)

    @property
    def running(self) -> int:
        """Completions that have one."""
        return sum(service.running for service in self.services if service.state is not State.FAILED)

    @property
    def busy(self) -> bool:
        """Whether requests are under way, or wait."""
        return any(service.busy for service in self.services)

    def kept_grammar(self, schema: str) -> Grammar | None:
        """A schema's, if it is there already."""
        return self._able()[0].kept_grammar(schema)

    async def grammar(self, schema: str) -> Grammar:
        """A schema's, compiled once for all. Raises `InputError`."""
        return await self._able()[0].grammar(schema)

    async def submit(
        self, prompt: list[int], params: SamplingParams, wishes: Wishes, grammar: Grammar | None = None
    ) -> Ticket:
        """Queues a request with the replica where it costs least, or with the next one that takes it. Raises as
        `Service.submit` does, where none does."""
        refused: Exception | None = None
        able = self._able()
        self._demand_room(able, params.n)
        self._forget_lost()
        looked_at = prompt[: self._length]  # one that is longer is refused
        for number in self._router.order(looked_at, self._backlogs(able), wishes.salt):
            mine = Backlog(len(prompt), params.n)
            self._coming[number] = _sum(self._coming[number], mine)
            try:
                ticket = await self.services[number].submit(prompt, params, wishes, grammar)
            except (Busy, Unavailable, InputError) as error:  # another one may have more memory
                refused = refused or error
            else:
                self._router.took(number, looked_at, wishes.salt)
                return ticket
            finally:
                self._coming[number] = _sum(self._coming[number], mine, -1)
        assert refused is not None, "one is able"
        raise refused

    def _demand_room(self, able: Sequence[Service], completions: int) -> None:
        """Raises `Busy` if too many wait already, all taken together."""
        free = sum(max(0, service.engine.config.max_sequences - service.running) for service in able)
        if self.waiting + completions > able[0].most_waiting + free:
            retry = min(service.retry_after() for service in able)
            raise Busy(f"{self.waiting} completions wait already; try again later", retry)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for any more; only whose it is knows it."""
        ticket.cancel()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        for service in self.services:
            service.drain()

    def tell(self, line: str, more: str = "") -> None:
        """Says what goes on: to whoever runs the server, and while it ends to whoever asks for its state."""
        if len(self.services) == 1:
            self.services[0].tell(line, more)
            return
        self._line = line
        self._told(more or line)

    def abort(self, reason: str = "the server is shutting down") -> None:
        """Tells all requests under way that they can't be finished."""
        for service in self.services:
            service.abort(reason)

    def close(self) -> None:
        """Ends all, at the same time."""
        for service in self.services:
            service.end()
        for service in self.services:
            service.close()

    def check_integrity(self) -> None:
        """Asserts that slots and prefixes are in order, between two batches, of those that haven't given up."""
        for service in self.services:
            if service.state is not State.FAILED:
                service.check_integrity()

    @cached_property
    def _router(self) -> Router:
        engines = [service.engine for service in self._able()]
        config, memory = engines[0].config, min(engine.batcher.memory for engine in engines)
        return Router(len(self.services), config.slots if config.prefixes else 0, memory)

    @cached_property
    def _length(self) -> int:
        return self.about.max_length

    def _able(self) -> list[Service]:
        """Those that take requests: they are ready, or else keep them until they are. Raises `Unavailable`."""
        states = [(service.state, service) for service in self.services]  # which change meanwhile
        for wanted in (State.READY, State.RESTARTING, State.DRAINING):
            if able := [service for state, service in states if state is wanted and service.figures]:
                return able
        return [service for service in self.services if service.engine]  # none is there, so the first one says why

    def _relieve_each(self, services: Sequence[Service]) -> None:
        for service in services:
            service.relieve = partial(self._relieve, service)

    def _relieve(self, lost: Service, over: bool) -> None:
        """On the thread of one whose ranks are missing: what waits for them goes to those that have slots free, and
        after a while, or where that one gives up (`over`), also to where it has to wait for one."""
        missing = time.monotonic() - lost.missing if lost.missing is not None else 0.0
        if not over and missing < MOVES_AFTER:
            return
        later, moved, given = over or missing > QUEUES_AFTER, 0, dict[Service, int]()
        waiting = [(ticket, ticket.request) for ticket in lost.tickets if ticket.request is not None]
        for ticket, request in sorted(waiting, key=lambda each: (each[1].priority, each[1].arrived)):
            if request.failures > FAILURES or ticket.over:
                continue
            able = [other for other in self.services if other is not lost and other.takes(ticket, later)]
            if able:
                taker = min(able, key=lambda other: other.load.tokens + given.get(other, 0))
                given[taker] = given.get(taker, 0) + Backlog(ticket.prompt_tokens, request.params.n).tokens
                lost.hand_on(ticket, taker)
                moved += 1
        if moved:
            self._told(f"{counted(moved, 'request')} went to other replicas")

    def _backlogs(self, able: Sequence[Service]) -> list[Backlog | None]:
        return [
            _sum(service.load, coming) if service in able else None
            for service, coming in zip(self.services, self._coming, strict=True)
        ]

    def _forget_lost(self) -> None:
        for number, service in enumerate(self.services):
            restarts = service.figures.restarts if service.figures else 0
            if restarts != self._restarts[number]:
                self._restarts[number] = restarts
                self._router.forget(number)


def _sum(one: Backlog, other: Backlog, sign: int = 1) -> Backlog:
    return Backlog(one.prompt + sign * other.prompt, one.completions + sign * other.completions, one.slots)
