"""Answers that end when their client goes away: whole ones and streams. Plain ASGI.

Knows HTTP and asyncio; knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response

from weft.server import errors
from weft.server.guard import Message, Receive, Scope, Send
from weft.server.manner import Manner
from weft.server.refused import Gone

A = TypeVar("A")
Event = bytes | str  # as it travels; a string is a comment, which clients leave unread


class Watched(Response):
    """Runs `work` while it looks whether the client is still there; cancels it when it is gone. `close`: what is to be
    done in the end, however far the work came."""

    def __init__(self, work: Callable[[Send], Awaitable[None]], close: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.close = work, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        working = asyncio.ensure_future(self.work(send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not working.done():
                working.cancel()
            self.close()
            with suppress(asyncio.CancelledError, OSError):  # OSError: the client went away meanwhile
                await working


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, A]) -> A:
    """What the work gives; it is cancelled, and `Gone` raised, if the client goes away meanwhile."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait((working, watching))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def whole(
    make: Callable[[], Awaitable[bytes | Sequence[bytes]]], manner: Manner, close: Callable[[], None] = lambda: None
) -> Watched:  # fmt: skip
    """One JSON document, in one piece or in several."""

    async def work(send: Send) -> None:
        try:
            made = await make()
            pieces, status, more = [made] if isinstance(made, bytes) else made, 200, dict[str, str]()
        except Exception as error:
            if errors.status_of(error) is None:
                raise
            failed = errors.answer(error, manner)
            pieces, status, more = [bytes(failed.body)], failed.status_code, dict(failed.headers)
        kept = {name: value for name, value in more.items() if name != "content-length"}
        headers = {"content-type": "application/json", **kept, "content-length": str(sum(map(len, pieces)))}
        await _send(send, status, headers, pieces[0], more=len(pieces) > 1)
        for number, piece in enumerate(pieces[1:], start=2):
            await asyncio.sleep(0)  # sending does not wait for anything while the client reads as fast
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    return Watched(work, close)


def events(
    make: Callable[[], AsyncGenerator[Event]], manner: Manner, close: Callable[[], None] = lambda: None
) -> Watched:  # fmt: skip
    """A stream; an error after its beginning is an event of its own."""

    async def work(send: Send) -> None:
        await _send(send, 200, {"content-type": manner.media, "cache-control": "no-cache"}, b"")
        try:
            async with aclosing(make()) as made:
                async for content in made:
                    body = manner.comment(content) if isinstance(content, str) else content
                    if body:
                        await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception as error:
            body = manner.broken(*errors.said(error))
            await send({"type": "http.response.body", "body": body, "more_body": True})
            if errors.status_of(error) is None:
                raise
        await send({"type": "http.response.body", "body": manner.last, "more_body": False})

    return Watched(work, close)


async def _send(send: Send, status: int, headers: dict[str, str], body: bytes, more: bool = True) -> None:
    listed = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    start: Message = {"type": "http.response.start", "status": status, "headers": listed}
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": more})
