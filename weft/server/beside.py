"""Reads requests' bodies: what takes a moment on the server's loop, what may take longer in a process beside it.

There are two such processes, each with a queue of its own: one for bodies of usual size, whose templates and schemas
may take long all the same, and one for large ones, so that nobody with a short question waits for somebody's book. A
process that takes too long, or too much memory, is killed with the request that it was at, and started again for the
next. Knows processes and the service; what a body means is `reading`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import msgspec

from weft.errors import Busy, Unavailable
from weft.llm import default_params
from weft.server.child import WIDTH, Job, Reply, Told, framed
from weft.server.reading import Answered, Asked, Facts, Reader, parsed, takes_long
from weft.server.refused import Refused
from weft.server.service import Service, State

SMALL = 16 << 10  # bytes that are read on the loop: a few milliseconds at most
USUAL = 128 << 10  # bytes of a body that need not wait for large ones
SECONDS, LARGE_SECONDS = 10.0, 60.0  # that reading a body may take; large ones
START_SECONDS = 60.0  # that a process may take to get ready
MEMORY_MIB, MIB_PER_MIB = 512, 256  # that reading may take; and for every one that a body may have
MOST_WAITING = 64  # bodies of one kind; more are refused

_log = logging.getLogger("weft")


class Beside:
    """Reads bodies for a service. `name`: the model's, as clients call it. `most`: bytes of a body."""

    def __init__(self, service: Service, name: str, most: int) -> None:
        self.service, self.name = service, name
        memory = MEMORY_MIB + MIB_PER_MIB * most // (1 << 20)
        self.usual, self.large = Helper(SECONDS, memory), Helper(LARGE_SECONDS, memory)

    @cached_property
    def facts(self) -> Facts:
        """Of the model. Raises `Unavailable` until it is loaded."""
        engine = self.service.engine
        proposed = default_params(engine.directory)
        return Facts(
            str(engine.directory), self.name, engine.model.vocabulary, engine.config.max_length,
            tuple(sorted(engine.end_ids)), {field.name: getattr(proposed, field.name) for field in fields(proposed)},
        )  # fmt: skip

    @cached_property
    def _here(self) -> Reader:
        return Reader(self.facts, self.service.engine.tokenizer)

    async def read(self, path: str, body: bytes) -> Asked | Answered:
        """What a body asks for. Raises `Refused`, `InputError`, `Busy` and `Unavailable`."""
        facts = self.facts
        if len(body) <= SMALL:
            small = parsed(path, body)
            if not takes_long(small):
                return self._here.read(small)
        helper = self.usual if len(body) <= USUAL else self.large
        return await helper.read(facts, Job(path, body))

    async def warm(self) -> None:
        """Has the process for usual bodies ready before somebody needs it."""
        while self.service.state is State.LOADING and not self.usual.closed:
            await asyncio.sleep(0.1)
        with suppress(Unavailable):
            await self.usual.prepare(self.facts)

    async def close(self) -> None:
        """Ends both for good."""
        await asyncio.gather(self.usual.close(), self.large.close())


class Helper:
    """One process, for one body after the other. `seconds`: that one may take; `memory`: MiB, likewise."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self.waiting, self.closed = 0, False
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def prepare(self, facts: Facts) -> None:
        """Starts the process, if there is none."""
        async with self._turn:
            await self._ready(facts)

    async def read(self, facts: Facts, job: Job) -> Asked | Answered:
        """Has a body read, when it is its turn."""
        if self.waiting >= MOST_WAITING:
            raise Busy(f"{self.waiting} requests wait to be read; try again later", retry_after=5)
        self.waiting += 1
        try:
            async with self._turn:
                reply = await self._asked(await self._ready(facts), job)
        finally:
            self.waiting -= 1
        if isinstance(reply, Told):
            raise Refused(reply.status, reply.message, reply.field, reply.code)
        return reply

    async def _ready(self, facts: Facts) -> asyncio.subprocess.Process:
        """The process; started now if there is none, or if it was killed meanwhile."""
        if self._process is not None and self._process.returncode is None:
            return self._process
        if self.closed:
            raise Unavailable("the server is shutting down; ask another one")
        package = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            async with asyncio.timeout(START_SECONDS):
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "weft.server.child", str(self.memory),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=4 << 20,
                    env=os.environ | {"PYTHONPATH": paths}, start_new_session=True,  # Ctrl-C is the server's
                )  # fmt: skip
                await _exchanged(self._process, msgspec.msgpack.encode(facts))
        except (TimeoutError, OSError, EOFError) as error:
            await self._kill()
            _log.error("the process that reads requests does not start: %s", error or type(error).__name__)
            raise Unavailable("requests of this kind can't be read now; the server's log says why") from None
        except BaseException:
            await self._kill()
            raise
        return self._process

    async def _asked(self, process: asyncio.subprocess.Process, job: Job) -> Reply:
        try:
            async with asyncio.timeout(self.seconds):
                found = await _exchanged(process, msgspec.msgpack.encode(job))
            reply: Reply = msgspec.msgpack.decode(found, type=Reply)
        except TimeoutError:
            await self._kill()
            raise Refused(400, f"reading this request takes longer than {self.seconds:g} s; send less in one") from None
        except (OSError, EOFError):
            await self._kill()
            _log.error("the process that reads requests ended at one of %d bytes", len(job.body))
            raise Refused(400, "reading this request takes more than one may take; send less in one") from None
        except BaseException:  # whoever waited is gone: what the process says next is not the next one's
            await self._kill()
            raise
        if isinstance(reply, Told) and reply.last:
            await self._kill()
        return reply

    async def close(self) -> None:
        """Ends the process, also one that is being started; there will be no other."""
        self.closed = True
        await self._kill()
        async with self._turn:
            await self._kill()

    async def _kill(self) -> None:
        """Ends the process, if there is one; another one is started when it is needed."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _exchanged(process: asyncio.subprocess.Process, message: bytes) -> bytes:
    """The answer to one frame. Raises `OSError` and `EOFError` if the process ends."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(framed(message))
    await process.stdin.drain()
    head = await process.stdout.readexactly(WIDTH)  # IncompleteReadError is an EOFError
    return await process.stdout.readexactly(int.from_bytes(head, "little"))
