"""A machine that joins an engine, whose side is hub.py: waits to be told, has one worker, and says when that ended.

Knows processes and addresses; knows nothing of models: whether this machine has what it must have, `check` says.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import zmq

from weft.errors import InputError
from weft.launch.addresses import endpoint, parse_address, resolved
from weft.launch.hub import (
    EVERY,
    SILENT,
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
from weft.launch.launcher import TOKEN_VARIABLE, VERSION
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
        self._checked: SimpleQueue[tuple[int, str, str]] = SimpleQueue()  # of terms: how they are met, or why not
        self._unsaid, self._since = "", time.monotonic()  # why nobody answers, as it was said last, and since when

    def serve(self) -> None:
        """Until it is interrupted; then the worker is ended. Raises `InputError` if the engine doesn't want it."""
        sent = 0.0
        try:
            while True:
                now = time.monotonic()
                if now - sent >= EVERY:
                    self._say(Here(socket.gethostname(), self.address, VERSION))
                    sent = now
                self._say_why_nobody_answers(self._attempts.last())
                if self._socket.poll(LOOK_MILLISECONDS):
                    self._obey(_decode(self._socket.recv()))
                self._look()
        finally:
            self._children.stop()
            self._say(WorkerEnded("weft worker was ended", self._number))
            self._socket.close(500)  # milliseconds for the last words
            self._attempts.close()
            self._context.term()

    def _say_why_nobody_answers(self, attempt: str) -> None:
        """Once for each reason."""
        if self._known is not None or time.monotonic() - self._since < UNANSWERED:
            return
        why = {
            "accepted": f"{self._hub} has taken the token and doesn't answer: it is busy, or another version of weft",
            "refused": f"{self._hub} can be reached but takes no hand-shake: {TOKEN_VARIABLE} is not the one that weft "
            "serve has printed there (new at each start, unless it was given a secret), or something else listens",
            "reached": f"something listens at {self._hub} that is no weft serve's --join-address: is the port right?",
            "": f"no server answers at {self._hub} yet: is weft serve running there with --join-address?",
        }[attempt]
        if why != self._unsaid:
            self._unsaid = why
            self._told(f"{why} Waiting" if why.endswith("?") else f"{why}. Waiting")

    def _obey(self, message: ToMachine) -> None:
        if self._known is None:
            self._unsaid = ""
            self._told(f"joined {self._hub} as {self.address}; waiting for work")
        self._known = time.monotonic()
        match message:
            case Terms():  # a thread that may be kept for ever, by a disk that is gone, must not keep the process
                threading.Thread(target=self._look_at, args=(message,), name="weft-check", daemon=True).start()
            case Say():
                self._told(message.line)
            case Begin():
                self._begin(message)
            case End():
                if self._children.pids() and message.number == self._number:
                    self._children.stop()
                    self._told("the rank has ended, as the server asked; waiting for work")
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
            self._children.start(message.threads, message.address, [message.token])
        except OSError as error:  # no memory for one more process, say: that may pass
            self._say(WorkerEnded(f"no rank could be started ({error.strerror or error})", message.number))

    def _look(self) -> None:
        """Tells the engine of a lost worker, and of what was checked; ends one whose engine is gone."""
        if lines := self._children.dead():
            crashed, words = self._children.crashed(), self._children.last_words()
            self._children.stop()
            self._say(WorkerEnded("; ".join(lines), self._number, crashed))
            self._told("; ".join(lines + words))
        with suppress(Empty):
            self._answer(*self._checked.get_nowait())
        if self._known is not None and time.monotonic() - self._known > SILENT:
            self._known, self._since = None, time.monotonic()
            if self._children.pids():
                self._children.stop()
            self._told(f"{self._hub} has gone silent; waiting for it to come back")

    def _look_at(self, terms: Terms) -> None:
        try:
            self._checked.put((terms.number, self._check(terms.data), ""))
        except InputError as error:
            self._checked.put((terms.number, "", str(error)))
        except Exception as error:  # whatever it is, both sides should know
            self._checked.put((terms.number, "", f"its model can't be looked at ({type(error).__name__}: {error})"))

    def _answer(self, number: int, how: str, why_not: str) -> None:
        if why_not:
            self._say(Unfit(why_not))
            raise InputError(why_not)
        self._told(how)
        self._say(Agreed(number))

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
