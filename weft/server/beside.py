"""Reads requests' bodies: what takes a moment on the server's loop, what may take longer in processes beside it.

There are three such processes, each with a queue of its own: for bodies of usual size, whose templates may take long
all the same, for large ones, and for schemas, so that nobody with a short question waits for somebody's book. In each
queue owners take turns, and who goes away leaves it. A process that takes too long, or too much memory, is killed with
the request that it was at, and started again for the next.

Knows processes and the service; what a body means is `reading`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import msgspec

from weft.errors import Busy, Unavailable
from weft.execute.process import free_memory
from weft.model.description import pooling_of
from weft.opening import default_params
from weft.server.asked import Answered, Asked, Facts
from weft.server.child import SCHEMA, WIDTH, Job, Reply, Told, framed
from weft.server.client import EngineClient, State
from weft.server.reading import Reader, parsed, rendered, takes_long
from weft.server.refused import Refused

SMALL = 16 << 10  # bytes that are read on the loop: a few milliseconds at most
USUAL = 128 << 10  # bytes of a body that need not wait for large ones
SECONDS, LARGE_SECONDS = 5.0, 60.0  # that reading a body may take, or trying a schema; large ones
START_SECONDS = 60.0  # that a process may take to get ready
MEMORY_MIB, MIB_PER_MIB, LEAST_MIB = 512, 256, 64  # that reading may take; and for every one that a body may have
SCHEMA_MIB = 256  # that one schema may take: the server takes as much once more, for as long as it is followed
GRACE_SECONDS = 1.0  # that a body may take whose client has gone: a new process would take as long
MOST_WAITING, MOST_OWN = 64, 32  # bodies in one queue; of one owner

_log = logging.getLogger("weft")


class Beside:
    """Reads bodies for a service. `name`: the model's, as clients call it. `most`: bytes of a body."""

    def __init__(self, service: EngineClient, name: str, most: int) -> None:
        self.service, self.name = service, name
        memory = MEMORY_MIB + MIB_PER_MIB * most // (1 << 20)
        self.usual, self.schemas = Helper(SECONDS, memory), Helper(SECONDS, SCHEMA_MIB)
        self.large = Helper(LARGE_SECONDS, memory)

    @cached_property
    def facts(self) -> Facts:
        """Of the model. Raises `Unavailable` until it is loaded."""
        about = self.service.about
        proposed = default_params(about.path)
        return Facts(
            str(about.path), self.name, about.vocabulary, about.max_length, about.end_ids,
            {field.name: getattr(proposed, field.name) for field in fields(proposed)},
            about.width, pooling_of(about.path),
        )  # fmt: skip

    @cached_property
    def _here(self) -> Reader:
        return Reader(self.facts, self.service.tokenizer)

    def at_once(self, path: str, body: bytes) -> Asked | Answered | None:
        """What a small body asks for; None for one that may take long. Raises what it is refused for."""
        here = self._here
        if len(body) > SMALL or rendered(path):
            return None
        small = parsed(path, body)
        return None if takes_long(small) else here.read(small)

    async def read(self, path: str, body: bytes, owner: str) -> Asked | Answered:
        """What any other body asks for. Raises `Refused`, `Busy` and `Unavailable`."""
        helper = self.usual if len(body) <= USUAL else self.large
        return await helper.read(self.facts, Job(path, body), owner)

    async def try_schema(self, schema: str, owner: str) -> None:
        """Raises `Refused` if it can't be followed, or not found out in time; `Busy` and `Unavailable`."""
        await self.schemas.read(self.facts, Job(SCHEMA, schema.encode()), owner)

    async def warm(self) -> None:
        """Has the process for usual bodies ready before somebody needs it."""
        while self.service.state is State.LOADING and not self.usual.closed:
            await asyncio.sleep(0.1)
        with suppress(Unavailable):
            await self.usual.prepare(self.facts)

    async def close(self) -> None:
        """Ends all for good."""
        await asyncio.gather(*(helper.close() for helper in (self.usual, self.schemas, self.large)))


class Turns:
    """Lets one at a time; owners take turns, and each owner's come in their order."""

    def __init__(self) -> None:
        self.taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def waiting(self, owner: str | None = None) -> int:
        """How many wait; of one owner."""
        if owner is not None:
            return len(self._waiting.get(owner, ()))
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """This owner's turn, once it comes; whoever is cancelled while waiting leaves the queue."""
        if self.taken:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(owner, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                self._leave(owner, mine)
                raise
        self.taken = True
        try:
            yield
        finally:
            self._next()

    def _leave(self, owner: str, mine: asyncio.Future[None]) -> None:
        if not mine.cancelled():  # its turn had come just then
            self._next()
        elif mine in (queue := self._waiting.get(owner, deque())):
            queue.remove(mine)
            if not queue:
                del self._waiting[owner]

    def _next(self) -> None:
        self.taken = False
        while self._waiting and not self.taken:
            owner, queue = self._waiting.popitem(last=False)
            first = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind all others
            if not first.cancelled():  # else it is about to leave
                self.taken = True
                first.set_result(None)


class Helper:
    """One process, for one body after the other. `seconds`: that one may take; `memory`: MiB, likewise."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self.turns, self.closed = Turns(), False
        self._process: asyncio.subprocess.Process | None = None
        self._fresh = True  # it has read nothing yet

    async def prepare(self, facts: Facts) -> None:
        """Starts the process, if there is none."""
        async with self.turns.turn(""):
            await self._ready(facts)

    async def read(self, facts: Facts, job: Job, owner: str) -> Asked | Answered:
        """Has a body read, when it is its turn."""
        if self.turns.waiting() >= MOST_WAITING or self.turns.waiting(owner) >= MOST_OWN:
            raise Busy(f"{self.turns.waiting()} requests wait to be read; try again later", retry_after=5)
        begun: list[float] = []
        reading = asyncio.ensure_future(self._in_turn(facts, job, owner, begun))
        try:
            reply = await asyncio.shield(reading)
        except asyncio.CancelledError:
            # Killing the process for a client that has gone would cost the next one more than what was left to do.
            rest = GRACE_SECONDS - (time.monotonic() - begun[0]) if begun else 0.0
            asyncio.get_running_loop().call_later(max(0.0, rest), reading.cancel)
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it
            raise
        if isinstance(reply, Told):
            raise Refused(reply.status, reply.message, reply.field, reply.code)
        return reply

    async def _in_turn(self, facts: Facts, job: Job, owner: str, begun: list[float]) -> Reply:
        async with self.turns.turn(owner):
            begun.append(time.monotonic())
            return await self._told(facts, job)

    async def _told(self, facts: Facts, job: Job) -> Reply:
        """What the process says of a body. One that ends at it may have had others before, or been killed: then a new
        one is asked too."""
        while True:
            process, fresh = await self._ready(facts), self._fresh
            self._fresh = False
            try:
                async with asyncio.timeout(self.seconds):
                    reply: Reply = msgspec.msgpack.decode(
                        await _exchanged(process, msgspec.msgpack.encode(job)), type=Reply
                    )
            except TimeoutError:
                await self._kill()
                message = f"reading this request takes longer than {self.seconds:g} s; send less in one"
                return Told(400, message)
            except (OSError, EOFError):
                await self._kill()
                if not fresh or self.closed:  # then it is said that the server ends
                    continue
                _log.error("the process that reads requests ended at one of %d bytes", len(job.body))
                return Told(400, "reading this request takes more than one may take; send less in one")
            except BaseException:  # whoever waited is gone: what the process says next is not the next one's
                await self._kill()
                raise
            if not (isinstance(reply, Told) and reply.last):
                return reply
            await self._kill()
            if fresh:
                return reply

    async def _ready(self, facts: Facts) -> asyncio.subprocess.Process:
        """The process; started now if there is none, or if it ended meanwhile."""
        if self.closed:
            raise Unavailable("the server is shutting down; ask another one")
        if self._process is not None and self._process.returncode is None:
            return self._process
        memory = max(LEAST_MIB, min(self.memory, free_memory() >> 21))  # half of what is free, at most
        try:
            async with asyncio.timeout(START_SECONDS):
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "weft.server.child", str(memory),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=4 << 20,
                    env=_environment(), start_new_session=True,  # Ctrl-C is the server's
                )  # fmt: skip
                await _exchanged(self._process, msgspec.msgpack.encode(facts))
        except (TimeoutError, OSError, EOFError) as error:
            await self._kill()
            if not self.closed:
                _log.error("the process that reads requests does not start: %s", _why(error))
            raise Unavailable("requests of this kind can't be read now; the server's log says why") from None
        except BaseException:
            await self._kill()
            raise
        self._fresh = True
        return self._process

    async def close(self) -> None:
        """Ends the process, also one that is being started; there will be no other."""
        self.closed = True
        await self._kill()
        async with self.turns.turn(""):
            await self._kill()

    async def _kill(self) -> None:
        """Ends the process, if there is one; another one is started when it is needed."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    """The process's: this package, and none of the server's keys."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


def _why(error: TimeoutError | OSError | EOFError) -> str:
    """In words."""
    if isinstance(error, EOFError):
        return "it ended by itself; its last words stand above"
    return f"it said nothing for {START_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)


async def _exchanged(process: asyncio.subprocess.Process, message: bytes) -> bytes:
    """The answer to one frame. Raises `OSError` and `EOFError` if the process ends."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(framed(message))
    await process.stdin.drain()
    head = await process.stdout.readexactly(WIDTH)  # IncompleteReadError is an EOFError
    return await process.stdout.readexactly(int.from_bytes(head, "little"))
