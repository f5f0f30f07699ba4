"""A line for each request, for whoever runs the server: JSON, without a word of what was asked or answered unless that
is wished for. And an id that each answer has, so that a line can be found again. Plain ASGI.

Knows HTTP; knows of what is computed only what is left in the scope.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from weft.server.guard import OWNER, App, Message, Receive, Scope, Send

HEADER = b"x-request-id"
SOUND = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # an id that is taken as it is; another one would forge lines
TOKENS = "weft.tokens"  # in the scope: what counts them, once there is something to count
MOST_TEXT = 10_000  # characters of a body


class Logged:
    """`tell`: takes a line; None: nothing is told. `text`: what was asked is told too."""

    def __init__(self, app: App, tell: Callable[[str], None] | None, text: bool) -> None:
        self.app, self.tell, self.text = app, tell, text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name.lower() == HEADER), b"")
        name = given if SOUND.fullmatch(given) else f"req_{secrets.token_hex(12)}".encode()
        begin, status, body = time.monotonic(), 0, bytearray()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, name)]}
            await send(message)

        async def heard() -> Message:
            message = await receive()
            if self.text and len(body) < MOST_TEXT:
                body.extend(message.get("body", b""))
            return message

        try:
            await self.app(scope, heard, named)
        finally:
            if self.tell is not None:
                self.tell(json.dumps(self._line(scope, name, status, begin, body)))

    def _line(self, scope: Scope, name: bytes, status: int, begin: float, body: bytearray) -> dict[str, Any]:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": name.decode(),
            "client": (scope.get("client") or ("",))[0], "key": scope.get(OWNER), "method": scope["method"],
            "path": scope["path"], "status": status, "ms": round((time.monotonic() - begin) * 1e3, 1),
        }  # fmt: skip
        if (count := scope.get(TOKENS)) is not None:
            line |= count()
        return line | ({"body": body[:MOST_TEXT].decode(errors="replace")} if self.text and body else {})
