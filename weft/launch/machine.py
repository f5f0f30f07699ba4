"""A machine that joins an engine, whose side is hub.py: waits to be told, has one worker, and says when that ended.

Knows processes and addresses; knows nothing of models: whether this machine has what it must have, `check` says.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import zmq

from weft.errors import InputError
from weft.launch.addresses import endpoint, parse_address, resolved
from weft.launch.hub import (
    EVERY,
    SILENT,
    VERSION,
    Agreed,
    Begin,
    End,
    Here,
    Known,
    Refuse,
    Say,
    Terms,
    ToHub,
    ToMachine,
    Unfit,
    WorkerEnded,
    encode,
)
from weft.launch.joined import LOOK_MILLISECONDS, Placed
from weft.launch.launcher import TOKEN_VARIABLE
from weft.launch.sockets import Attempts, worker_socket

UNANSWERED = 1.0  # seconds after which it is said why nobody has answered

_decode = msgspec.msgpack.Decoder(ToMachine).decode


class Machine:
    """One of an engine's. `told`: what happens, in words. `check` is given the engine's terms, on a thread of its own:
    how this machine meets them, in words, or an `InputError`."""

    def __init__(
        self, address: str, token: str, own_address: str | None, told: Callable[[str], None],
        check: Callable[[bytes], str], port: int = 0,
    ) -> None:  # fmt: skip
        host, join_port = parse_address(address, "--join")
        host = resolved(host, "--join")
        self.address = resolved(own_address, "--address") if own_address else _towards(host, join_port)
        self._children, self._told, self._check = Placed(self.address, port), told, check
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = worker_socket(self._context, token)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in host
        self._attempts = Attempts(self._socket)
        self._socket.connect(endpoint(host, join_port))
        self._hub = address.removeprefix("tcp://")
        self._known: float | None = None  # when the engine was heard last
        self._number = 0  # of the group that the worker is in
        self._checking: tuple[int, Future[str]] | None = None  # the terms' number, and what comes of it
        self._checks = ThreadPoolExecutor(1, "weft-check")

    def serve(self) -> None:
        """Until it is interrupted; then the worker is ended. Raises `InputError` if the engine doesn't want it."""
        sent, unanswered, begin = 0.0, "", time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now - sent >= EVERY:
                    self._say(Here(socket.gethostname(), self.address, VERSION))
                    sent = now
                if self._known is None and now - begin > UNANSWERED and (why := self._unanswered()) != unanswered:
                    unanswered = why
                    self._told(why)
                if self._socket.poll(LOOK_MILLISECONDS):
                    self._obey(_decode(self._socket.recv()))
                self._look()
        finally:
            self._children.stop()
            self._say(WorkerEnded("weft worker was ended", self._number))
            self._checks.shutdown(wait=False, cancel_futures=True)
            self._attempts.close()
            self._socket.close(500)  # milliseconds for the last words
            self._context.term()

    def _unanswered(self) -> str:
        """Why nobody has answered so far."""
        match self._attempts.last():
            case "accepted":
                return f"{self._hub} has taken the token, and is busy. Waiting"
            case "refused":
                return (
                    f"{self._hub} can be reached but takes no hand-shake: {TOKEN_VARIABLE} is not the one that weft "
                    "serve has there, or something else listens. Waiting"
                )
        return f"no server answers at {self._hub} yet: is weft serve running there with --join-address? Waiting"

    def _obey(self, message: ToMachine) -> None:
        if self._known is None:
            self._told(f"joined {self._hub} as {self.address}; waiting for work")
        self._known = time.monotonic()
        match message:
            case Terms():
                self._checking = message.number, self._checks.submit(self._check, message.data)
            case Say():
                self._told(message.line)
            case Begin():
                self._begin(message)
            case End():
                self._children.stop()
                self._told("the worker has ended, as it was told to; waiting for work")
            case Refuse():
                raise InputError(f"{self._hub} doesn't use this machine: {message.reason}")
            case Known():
                pass

    def _begin(self, message: Begin) -> None:
        self._children.stop()
        self._number = message.number
        self._told(f"starting rank {message.place}")
        self._children.first_place = message.place
        try:
            self._children.start(1, message.threads, message.address, message.token)
        except OSError as error:  # no memory for one more process, say: that may pass
            self._say(WorkerEnded(f"no rank could be started ({error.strerror or error})", message.number))

    def _look(self) -> None:
        """Tells the engine of a lost worker, and of what was checked; ends one whose engine is gone."""
        if lines := self._children.dead():
            crashed, words = self._children.crashed(), self._children.last_words()
            self._children.stop()
            self._say(WorkerEnded("; ".join(lines), self._number, crashed))
            self._told("; ".join(lines + words))
        if self._checking is not None and self._checking[1].done():
            self._answer(*self._checking)
            self._checking = None
        if self._known is not None and time.monotonic() - self._known > SILENT:
            self._known = None
            if self._children.pids():
                self._children.stop()
            self._told(f"{self._hub} has gone silent; waiting for it to come back")

    def _answer(self, number: int, checked: Future[str]) -> None:
        try:
            self._told(checked.result())
            self._say(Agreed(number))
        except InputError as error:
            self._say(Unfit(str(error)))
            raise

    def _say(self, message: ToHub) -> None:
        with suppress(zmq.ZMQError):
            self._socket.send(encode(message), zmq.NOBLOCK)


def _towards(host: str, port: int) -> str:
    """This machine's address on the way to another. Raises `InputError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"there is no way from this machine to {host} ({error}); check --join") from None
