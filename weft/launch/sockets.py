"""Sockets between processes of one group: encrypted, and authenticated by a token.

Both ends derive the same keys from the token, and who doesn't have it can't say a word. Knows ZeroMQ; knows nothing of
what is said.
"""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from weft.errors import InputError


def engine_socket(context: zmq.Context[Any], token: str) -> zmq.Socket[bytes]:
    """The engine's end: talks to many others, by identity."""
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    public, secret = _keys(token, "engine")
    socket.curve_secretkey, socket.curve_publickey, socket.curve_server = secret, public, True
    socket.linger = 0
    socket.router_mandatory = True
    return socket


def worker_socket(context: zmq.Context[Any], token: str) -> zmq.Socket[bytes]:
    """Another's end. Only who knows the token can derive the key that the engine's end answers to."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    public, secret = _keys(token, "worker")
    socket.curve_secretkey, socket.curve_publickey = secret, public
    socket.curve_serverkey = _keys(token, "engine")[0]
    socket.linger = 1000
    return socket


def bind(socket: zmq.Socket[bytes], address: str) -> None:
    """An address that an earlier group has just let go of may take a moment. Raises `InputError`."""
    end = time.monotonic() + 2.0
    while True:
        try:
            socket.bind(address)
            return
        except zmq.ZMQError as error:
            if time.monotonic() > end:
                raise InputError(f"{address} can't be used ({error}); choose other --rank-ports") from None
            time.sleep(0.05)


class Attempts:
    """What came of a worker's socket's attempts to connect. Made before it connects."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket, self._last = socket, ""
        refused = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
        self._events = socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | refused)

    def last(self) -> str:
        """ "accepted"; "refused", by whoever listens there; or "", as long as nobody does."""
        while self._events.poll(0):
            accepted = recv_monitor_message(self._events)["event"] == zmq.Event.HANDSHAKE_SUCCEEDED
            self._last = "accepted" if accepted else "refused"
        return self._last

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self._events.close(0)


class TurnedAway:
    """Whether somebody tried to reach an engine's socket with another token.

    Looked at by a thread of its own: what nobody takes from ZeroMQ's monitor would in the end hold up its traffic.
    """

    CRYPTOGRAPHIC = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket, self._seen = socket, threading.Event()
        self._events = socket.get_monitor_socket(zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.MONITOR_STOPPED)
        self._thread = threading.Thread(target=self._watch, name="weft-turned-away", daemon=True)
        self._thread.start()

    def any(self) -> bool:
        """Since this was asked last."""
        seen = self._seen.is_set()
        self._seen.clear()
        return seen

    def _watch(self) -> None:
        while (message := recv_monitor_message(self._events))["event"] != zmq.Event.MONITOR_STOPPED:
            if message["value"] == self.CRYPTOGRAPHIC:
                self._seen.set()
        self._events.close(0)

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self._thread.join(1.0)


def _keys(token: str, role: str) -> tuple[bytes, bytes]:
    """A CURVE key pair (public, secret) that follows from the token."""
    secret: bytes = z85.encode(hashlib.sha256(f"weft/{role}/{token}".encode()).digest())
    return zmq.curve_public(secret), secret
