"""Runs the application with uvicorn: a socket that is bound before the model is loaded, signals, and an orderly end.

Knows uvicorn and signals; knows nothing of models.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.errors import InputError, Interrupted
from weft.launch.addresses import resolved
from weft.server.client import EngineClient

HEADER_SECONDS = 20.0  # to send the head of a request
SETTLE_SECONDS = 5.0  # for who was told that the server ends
MOST_CONNECTIONS = 2048
SWITCH_SECONDS = 0.0003  # after which a thread that computes in Python lets the loop in; usual are 5 ms, for each call
GARBAGE = (10_000, 10, 50)  # objects more than before, and times, after which Python looks for garbage


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `InputError`."""
    address = resolved(host, "--host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Named as TCP, because asyncio turns Nagle's algorithm off only then: else each answer waits 40 ms for an ACK.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"port {port} of {host} can't be used ({reason}); choose another --port or --host") from None
    return listening


class _Protocol(H11Protocol):
    """Closes connections on which the head of a request doesn't come: uvicorn waits for it without an end."""

    _awaited: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._awaited is None:
            self._awaited = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """The first signal lets requests under way end, the second one tells them that they can't, a third ends at once."""

    def __init__(self, app: FastAPI, service: EngineClient, drain: float) -> None:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, http=_Protocol, ws="none", lifespan="on",
            timeout_graceful_shutdown=round(drain + SETTLE_SECONDS), limit_concurrency=MOST_CONNECTIONS,
            server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.service, self.drain, self._signals = service, drain, 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """On the loop; and what called this server is not ended by the same signal once more."""
        if threading.current_thread() is not threading.main_thread():  # signals are for that one
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _signal(self) -> None:
        self._signals += 1
        self.should_exit, self.force_exit = True, self._signals > 2
        if self._signals == 1:
            self.service.drain()
            if self.service.busy:
                self.service.tell(f"ending: requests under way have {self.drain:g} s; one more signal ends them now")
            asyncio.get_running_loop().call_later(self.drain, self.service.abort)
        else:
            self.service.abort()


def serve(
    app: FastAPI, service: EngineClient, listening: socket.socket, drain: float, ready: Callable[[], None]
) -> None:  # fmt: skip
    """Serves until a signal comes; loads the model meanwhile. `ready` is called once, when it is there.

    Raises what kept the model from being loaded.
    """
    server = Server(app, service, drain)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        loading = asyncio.ensure_future(service.loaded_or_failed())
        try:
            await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is None and not server.should_exit:
                _settle()
                ready()
            elif loading.done():
                server.should_exit = True
            await serving
        finally:
            if not loading.done():  # it waits for a machine, say
                loading.cancel()
            elif (error := loading.exception()) is not None:
                raise error

    sys.setswitchinterval(SWITCH_SECONDS)
    service.start()
    try:
        asyncio.run(run())
    finally:
        service.close()
    # It had given up: whoever started it should see that. Who ended it while it loaded knows.
    if service.error is not None and not isinstance(service.error, Interrupted):
        raise service.error


def _settle() -> None:
    """Once everything is loaded: what is there stays, and looking through it for garbage would halt the loop for a
    tenth of a second; looking through a large answer for a third of that, so it is done rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)


@contextmanager
def in_background(app: FastAPI, service: EngineClient) -> Iterator[str]:
    """The same on a thread and a free port of loopback, without signals: for who looks at the service meanwhile.

    Yields the server's address while the model may still be loading; ends everything.
    """
    with bound("127.0.0.1", 0) as listening:
        server = Server(app, service, drain=SETTLE_SECONDS)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), name="weft-http")
        service.start()
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            service.close()
