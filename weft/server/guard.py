"""What stands before every request: who may ask, how much may be sent, and how slowly. Plain ASGI.

Knows HTTP; knows nothing of models.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from weft.launch.addresses import is_loopback
from weft.server.errors import response
from weft.server.manner import manner_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/app.js", "/health", "/ready", "/metrics"})  # without a key
OWNER = "weft.owner"  # in the scope: which key asked


class Guard:
    """`keys`: who may ask; none: everyone who reaches the server, and then, with `local`, only by a loopback name, so
    that no web page elsewhere can have a browser ask. `most`: bytes of a body. `patience`: seconds to send one, and to
    take a piece of an answer.
    """

    def __init__(self, app: App, keys: Sequence[str], local: bool, most: int, patience: float) -> None:
        self.app, self.local, self.most, self.patience = app, local, most, patience
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refuse(scope, headers) or _no_json(scope, headers)
        if refused is not None:
            await refused(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.patience):
                body = await self._body(headers, receive)
        except TimeoutError:
            await response(manner_of(scope["path"]), 408, f"the body did not come within {self.patience:g} s")(
                scope, receive, send
            )
            return
        if body is None:
            await response(manner_of(scope["path"]), 413, f"the body has more than {self.most} bytes; send less")(
                scope, receive, send
            )
            return
        patient = _Patient(send, self.patience)
        try:
            await self.app(scope, _replayed(body, receive), patient.send)
        finally:
            patient.close()

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes]) -> Any | None:
        manner = manner_of(scope["path"])
        if not self._keys:
            host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")) or "localhost"
            ours = not self.local or is_loopback(host)
            why = f"host {host!r} is not this server's name; give --api-key to allow"
            return None if ours else response(manner, 403, why)
        given = headers.get(b"authorization", b"")
        bearer = given[7:] if given[:7].lower() == b"bearer " else b""
        digest = _digest(bearer or headers.get(b"x-api-key", b""))
        # Every key is compared, each in constant time: how long it takes says nothing of them.
        numbers = [number for number, key in enumerate(self._keys) if hmac.compare_digest(key, digest)]
        if numbers:
            scope[OWNER] = str(numbers[0])
            return None
        if scope["path"] in OPEN:
            return None
        wrong = bearer or headers.get(b"x-api-key")
        why = "the API key that was sent is none of this server's" if wrong else "this server wants an API key"
        return response(
            manner, 401, f"{why}: send it as Authorization: Bearer KEY, or as x-api-key: KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """All of it; None if it is too long."""
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.most:
            return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.most:
                return None
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return bytes(body)


class _Patient:
    """Gives up on who doesn't take what is sent; the request then ends as if the client had gone. One timer looks after
    all that a request sends: one for each message would cost a fifth of what sending it does."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds, self._loop = send, seconds, asyncio.get_running_loop()
        self._since, self._late = 0.0, asyncio.Event()  # when what is being sent was begun
        self._sending: asyncio.Task[Any] | None = None
        self._timer = self._loop.call_later(seconds, self._look)

    async def send(self, message: Message) -> None:
        """ASGI."""
        if self._late.is_set():  # also what would tell the client of that
            raise OSError("the client takes nothing")
        self._since, self._sending = self._loop.time(), asyncio.current_task()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._late.is_set() or self._sending is None:
                raise
            self._sending.uncancel()
            raise OSError("the client takes nothing") from None
        finally:
            self._sending = None

    def _look(self) -> None:
        waited = self._loop.time() - self._since if self._sending is not None else 0.0
        if self._sending is not None and waited >= self._seconds:
            self._late.set()
            self._sending.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)

    def close(self) -> None:
        """Nothing more is sent."""
        self._timer.cancel()


def _no_json(scope: Scope, headers: dict[bytes, bytes]) -> Any | None:
    """What has another type, or none, is not read as JSON: a web page elsewhere may have a browser send that without
    asking, and the server would compute. With a key, right or wrong, a browser asks first, and none will do."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] not in ("POST", "PUT", "PATCH") or kind == b"application/json" or kind.endswith(b"+json"):
        return None
    if not kind and (b"authorization" in headers or b"x-api-key" in headers):
        return None
    given = kind.decode("latin-1")[:100] or "none"
    return response(
        manner_of(scope["path"]),
        415,
        f"the content type is {given}; send JSON with the header Content-Type: application/json",
    )


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what else comes: that the client goes away."""
    first = True

    async def again() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
