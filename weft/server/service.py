"""The engine's loop on a thread of its own, and its requests as streams for asyncio.

Knows the engine and asyncio; knows nothing of HTTP. Everything that touches the engine while it runs happens on its
thread: requests and cancellations reach it between two batches, and what a batch gave leaves it in one go.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from weft.about import About, Figures
from weft.batching.params import SamplingParams
from weft.batching.request import Request, Sequence
from weft.engine import Engine
from weft.errors import Busy, GivenUp, InputError, Interrupted, Unavailable, told
from weft.grammar import Grammar
from weft.requests import Handed
from weft.routing import Backlog
from weft.server.client import State
from weft.server.lately import Live
from weft.server.metrics import Metrics
from weft.server.ticket import Ticket, Wishes, on_loop, post
from weft.server.tickets import Tickets
from weft.text import Tokenizer
from weft.workers import Progress

SETTLED_SECONDS = 0.05  # how often it is looked whether the model is there
YIELD_SECONDS = 1e-4  # that the loop has to take up a first token: else it waits until this thread does
IDLE_SECONDS = 0.1  # how often workers are looked at while nothing is to do


class Service:
    """Runs an engine. `make`: builds it, told of progress; on the service's thread, so that others go on meanwhile.

    `most_waiting`: completions that may wait for a slot; more are refused with `Busy`. `interrupt`: ends a start of
    workers that waits for something. `told`: what whoever runs the server should see, a line each. `metrics` and
    `live`: those of others, where this is one of several.
    """

    def __init__(
        self, make: Callable[[Progress], Engine], most_waiting: int = 256, interrupt: Callable[[], None] = lambda: None,
        told: Callable[[str], None] = lambda line: None, metrics: Metrics | None = None, live: Live | None = None,
    ) -> None:  # fmt: skip
        self._make, self.most_waiting, self._interrupt, self._told = make, most_waiting, interrupt, told
        self.state, self.reason, self.loaded = State.LOADING, "", 0.0
        self.metrics, self.live = metrics or Metrics(), live or Live()
        self._engine: Engine | None = None
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._grown: list[Sequence] = []  # by the last batch, and not delivered yet
        self._mistake: Exception | None = None
        self.tickets = Tickets(self.metrics, self.live)
        self._submitted = 0  # sequences that the engine's thread has not yet seen
        self._closing = False
        self.missing: float | None = None  # since when its ranks are, by the monotonic clock
        # Called again and again meanwhile, and when it gives up (True), on this service's thread.
        self.relieve: Callable[[bool], None] = lambda over: None
        self._settled = threading.Event()
        self._after: Callable[[], None] = lambda: None
        self.error: BaseException | None = None  # what ended the loop, if anything did
        self._thread = threading.Thread(target=self._run, name="weft-engine")
        self._compiling = ThreadPoolExecutor(1, "weft-grammar")

    def start(self, after: Callable[[], None] = lambda: None) -> None:
        """Starts loading; returns at once. `after`: returns when it may begin, or raises what keeps it from that."""
        self._after = after
        self._thread.start()

    def wait(self) -> None:
        """Returns when the engine is loaded. Raises what kept it from that."""
        self._settled.wait()
        if self.error is not None:
            raise self.error

    async def loaded_or_failed(self) -> None:
        """The same for asyncio, which can give up waiting."""
        while not self._settled.is_set():
            await asyncio.sleep(SETTLED_SECONDS)
        self.wait()

    @property
    def engine(self) -> Engine:
        """Raises `Unavailable` while it is not there."""
        if self._engine is None or self.state is State.FAILED:
            if self.state is State.FAILED:
                raise Unavailable(f"the server has given up: {self.reason}; it has to be started again")
            raise Unavailable(f"the model is {self.state}{': ' + self.reason if self.reason else ''}; try again later")
        return self._engine

    @property
    def about(self) -> About:
        """What is served. Raises `Unavailable` while it is not there."""
        return About.of(self.engine)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, if it has one. Raises `Unavailable` while the model is not there."""
        return self.engine.tokenizer

    @property
    def figures(self) -> Figures | None:
        """How the engine stands, if there is one, in whatever state."""
        return Figures.of(self._engine) if self._engine is not None else None

    @property
    def load(self) -> Backlog:
        """What it has yet to do, for who chooses among several."""
        return self.tickets.left(self._engine.config.max_sequences if self._engine is not None else 0)

    @property
    def waiting(self) -> int:
        """Completions that wait for a slot."""
        return self._submitted + (self.figures.waiting if self.figures else 0)

    @property
    def running(self) -> int:
        """Completions that have one."""
        return self.figures.running if self.figures else 0

    def kept_grammar(self, schema: str) -> Grammar | None:
        """A schema's, if it is there already."""
        return self.engine.requests.kept_grammar(schema)

    async def grammar(self, schema: str) -> Grammar:
        """A schema's grammar; on a thread of its own, because compiling it may take a while. Raises `InputError`."""
        engine, loop = self.engine, asyncio.get_running_loop()
        return await loop.run_in_executor(self._compiling, lambda: engine.requests.grammars.grammar(schema))

    async def submit(
        self, prompt: list[int], params: SamplingParams, wishes: Wishes, grammar: Grammar | None = None
    ) -> Ticket:
        """Queues a request. `grammar`: of its schema. Raises `InputError` if it can't run, `Busy` if too many wait,
        `Unavailable`."""
        engine = self.engine
        if self.state is State.DRAINING:
            raise Unavailable("the server is shutting down; ask another one")
        engine.requests.check(prompt, params)
        free = max(0, engine.config.max_sequences - self.running)
        if self.waiting + params.n > self.most_waiting + free:
            raise Busy(f"{self.waiting} completions wait already; try again later", self.retry_after())
        ticket = Ticket(asyncio.get_running_loop(), wishes.arrived or time.monotonic(), len(prompt))
        self._submitted += params.n
        self._own(ticket)
        ready: asyncio.Future[None] = ticket.loop.create_future()
        self._commands.put(lambda: self._add(ticket, ready, prompt, params, wishes, grammar))
        try:
            await ready
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def _own(self, ticket: Ticket) -> None:
        """From now on this service ends it, should nobody wait for it any more."""
        ticket.drop = lambda: self._commands.put(lambda: self._drop(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for any more; its slot is free before the next batch. Safe to repeat."""
        ticket.cancel()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    @property
    def busy(self) -> bool:
        """Whether requests are under way, or wait."""
        return len(self.tickets) > 0

    def abort(self, reason: str = "the server is shutting down") -> None:
        """Tells all requests under way that they can't be finished."""
        self.tickets.abort(Unavailable(reason))

    def end(self) -> None:
        """Has the loop and the workers end, and waits for nothing."""
        self._closing = True
        self._interrupt()
        self._commands.put(lambda: None)
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends the loop and the workers; requests under way are told so."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join()

    def check_integrity(self) -> None:
        """Asserts that slots and prefixes are in order, between two batches."""
        outcome: SimpleQueue[AssertionError | None] = SimpleQueue()

        def look() -> None:
            try:
                self.engine.batcher.check_integrity()
                outcome.put(None)
            except AssertionError as error:
                outcome.put(error)

        self._commands.put(look)
        if (error := outcome.get(timeout=60)) is not None:
            raise error

    def retry_after(self) -> int:
        """Seconds after which there should be room, by how many were finished of late."""
        return self.tickets.retry_after(self.waiting)

    # What follows runs on the service's own thread.

    def _run(self) -> None:
        try:
            self._load()
            self._settled.set()
            while not self._closing:
                self._turn()
            self._obey(wait=False)  # what others handed on
            self._hand_over()
            self.abort()
        except BaseException as error:  # what kept it from loading; workers that can't be kept alive; our mistakes
            if isinstance(error, GivenUp):
                self.relieve(True)
            self.state, self.reason, self.error = State.FAILED, str(error) or type(error).__name__, error
            if self._settled.is_set() and not self._closing:  # else it ends the command, which says so itself
                self._told(f"the engine has failed: {self.reason}")
            self._settled.set()
            self.abort(f"the engine has failed: {self.reason}")
        finally:
            if self._engine is not None:
                self._engine.close()
        while not self._closing:  # who still asks is told what happened
            self._obey(wait=True)

    def _load(self) -> None:
        def tell(what: str, share: float) -> None:
            if self._closing:
                raise Interrupted("interrupted while the model was loaded")
            self.reason, self.loaded = what, share

        self._after()
        engine = self._make(tell)
        with suppress(InputError):  # of a model that can't follow any schema
            _ = engine.requests.grammars  # a table of the vocabulary: made later, it would halt the loop for so long
        engine.workers.on_lost = self._lost
        engine.workers.meanwhile = partial(self._meanwhile, engine)
        self._engine, self.state, self.reason, self.loaded = engine, State.READY, "", 1.0

    def _turn(self) -> None:
        """What was asked meanwhile, then one batch."""
        engine = self.engine
        self._obey(wait=engine.batcher.idle)
        if engine.batcher.idle:
            engine.look()
        else:
            self._step(engine)
        if self._mistake is not None:
            raise self._mistake
        if self.missing is not None:
            self.missing = None
            if self.state is State.RESTARTING:
                self.state, self.reason = State.READY, ""
            self._told("the ranks are there again")
        if engine.flights or engine.batcher.idle:
            self._hand_over()

    def _step(self, engine: Engine) -> None:
        before = engine.last_turn
        try:
            grown = engine.step(timeline=self.live.wanted, meanwhile=self._hand_over)
        finally:
            self._hand_over()  # what no batch came after
        # Who waits for a first token gets it at once. For the others it is best while the next batch is computed: the
        # loop that writes to clients keeps this thread from anything else.
        self._grown = [sequence for sequence in grown if sequence.produced != 1]
        if first := [sequence for sequence in grown if sequence.produced == 1]:
            self.tickets.deliver(first, engine.requests)
            time.sleep(YIELD_SECONDS)
        post(self.tickets.under_way(engine.batcher.running))
        if engine.last_turn is not before and engine.last_turn is not None:
            self.metrics.turn(engine.last_turn)
            if engine.last_turn.result.timeline is not None:
                self.live.drawn, self.live.number = engine.last_turn, self.live.number + 1
                self.live.wanted = False

    def _hand_over(self) -> None:
        """Delivers what is left of what the last batch gave."""
        engine, grown, self._grown = self._engine, self._grown, []
        assert engine is not None, "what was given was given by an engine"
        try:
            self.tickets.deliver(grown, engine.requests)
        except Exception as error:  # our mistake, and nothing of the batch that is computed
            self._mistake = error

    def _lost(self, error: Exception) -> None:
        self.missing = self.missing or time.monotonic()
        if self.state is State.READY:
            self.state = State.RESTARTING
        self.tell(f"the ranks are started again: {error}", f"the ranks are started again: {told(error)}")

    def tell(self, line: str, more: str = "") -> None:
        """Says what goes on: to whoever runs the server, and, while it is not ready, to whoever asks for its state.
        `more`: what the former alone should see."""
        if self.state in (State.LOADING, State.RESTARTING, State.DRAINING):
            self.reason = line
        self._told(more or line)

    def _meanwhile(self, engine: Engine) -> None:
        """While workers are started again, which may take as long as a machine is missing."""
        if self._closing:
            raise Interrupted("interrupted while ranks were started")
        self._obey(wait=False)
        self._hand_over()
        self.tickets.deliver(engine.expire(), engine.requests)
        self.relieve(False)

    def _obey(self, wait: bool) -> None:
        """Does what was asked meanwhile."""
        with suppress(Empty):
            while True:
                self._commands.get(block=wait, timeout=IDLE_SECONDS)()
                wait = False

    def _add(
        self, ticket: Ticket, ready: asyncio.Future[None], prompt: list[int], params: SamplingParams, wishes: Wishes,
        grammar: Grammar | None,
    ) -> None:  # fmt: skip
        self._submitted -= params.n
        error: Exception | None = None
        deadline = ticket.arrived + wishes.timeout if wishes.timeout is not None else None
        try:
            asked = wishes.priority, wishes.owner, deadline, grammar, wishes.salt
            ticket.request = self.engine.add(prompt, params, *asked)
            self.tickets.add(ticket)
        except Exception as reason:  # whatever it is, it is one request's
            error = reason

        def answer() -> None:
            if not ready.done():
                ready.set_result(None) if error is None else ready.set_exception(error)

        on_loop(ticket.loop, answer)

    def takes(self, ticket: Ticket, later: bool) -> bool:
        """Whether it could go on with another one's request at once, or `later`. For any thread."""
        engine, request = self._engine, ticket.request
        if engine is None or request is None or self.missing is not None or self.state is State.FAILED:
            return False
        free = engine.config.max_sequences - self.running - self.waiting + (self.most_waiting if later else 0)
        return free >= request.params.n and engine.requests.can_run(request)

    def hand_on(self, ticket: Ticket, other: Service) -> None:
        """Its request goes on there, from the tokens that it has; while this one's ranks are missing."""
        request, engine = self.tickets.take(ticket), self.engine
        assert request is not None, "it is this one's"
        engine.forget([sequence for sequence in request.sequences if sequence.finish_reason is None])
        handed = engine.requests.give(request)
        other._submitted += request.params.n
        other._commands.put(lambda: other._adopt(ticket, request, handed))

    def _adopt(self, ticket: Ticket, request: Request, handed: Handed) -> None:
        self._submitted -= request.params.n
        self._own(ticket)
        if ticket.cancelled:  # before it was here
            self.metrics.finished("abort", time.monotonic() - ticket.arrived)
        elif self._engine is None or self.state is State.FAILED:
            on_loop(ticket.loop, partial(ticket.put, Unavailable(f"the engine has failed: {self.reason}")))
        else:
            self._engine.requests.have(request, handed)
            self._engine.batcher.add(request)
            self.tickets.add(ticket)

    def _drop(self, ticket: Ticket) -> None:
        request = self.tickets.take(ticket)
        if request is None or self._engine is None:
            return
        on_loop(ticket.loop, partial(ticket.put, Unavailable("the request was cancelled")))  # whoever still reads it
        if self.state is not State.FAILED:
            self._engine.forget([s for s in request.sequences if s.finish_reason is None])
        self._engine.requests.settle(request)
        self.metrics.finished("abort", time.monotonic() - ticket.arrived)
