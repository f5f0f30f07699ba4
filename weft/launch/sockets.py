"""Sockets between processes of one group: encrypted, and authenticated by a token (keys.py).

Who doesn't have the token can't say a word. Knows ZeroMQ; knows nothing of what is said.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from weft.errors import InputError
from weft.launch.keys import EngineKey, engine_of

LARGEST = 256 << 20  # bytes of a message: logits of a prompt
HANDSHAKE_MILLISECONDS = 5000


def engine_socket(context: zmq.Context[Any], key: EngineKey, largest: int = LARGEST) -> zmq.Socket[bytes]:
    """The engine's end: talks to many others, by identity. `largest`: bytes of a message, also of a stranger's, who may
    announce any length before it has proved anything."""
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.maxmsgsize, socket.handshake_ivl = largest, HANDSHAKE_MILLISECONDS
    socket.curve_secretkey, socket.curve_publickey, socket.curve_server = key.secret, key.public, True
    socket.linger = 0
    socket.router_mandatory = True
    return socket


def worker_socket(context: zmq.Context[Any], token: str) -> zmq.Socket[bytes]:
    """Another's end, with keys of its own. Only the engine of this token can read it. Raises `InputError`."""
    engine = engine_of(token)
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = engine
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
    """What came of a worker's socket's attempts to connect. Made before it connects, and asked again and again: what
    nobody takes from ZeroMQ's monitor would in the end hold up its traffic."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._last = ""
        refused = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
        turns = zmq.Event.CONNECTED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        self._events = socket.get_monitor_socket(turns | refused)

    def last(self) -> str:
        """Whether it was "accepted", or "refused" by whoever listens there, or only "reached" somebody who says
        nothing; empty, as long as nobody listens."""
        while self._events.poll(0):
            event = recv_monitor_message(self._events)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._last = "accepted"
            elif event == zmq.Event.CONNECTED:
                self._last = self._last or "reached"
            elif event != zmq.Event.DISCONNECTED:
                self._last = "refused"
            elif self._last == "accepted":  # one that was refused is disconnected too
                self._last = ""
        return self._last

    def close(self) -> None:
        """After the socket was closed."""
        self._events.close(0)


class TurnedAway:
    """Whether somebody tried to reach an engine's socket with another token.

    A thread of its own takes what ZeroMQ's monitor tells, which else would in the end hold up its traffic. It ends when
    the socket is closed; to end the monitor before that could wait for the traffic, and for ever.
    """

    CRYPTOGRAPHIC = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._seen = threading.Event()
        self._events = socket.get_monitor_socket(zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.MONITOR_STOPPED)
        self._thread = threading.Thread(target=self._watch, name="weft-turned-away", daemon=True)
        self._thread.start()

    def any(self) -> bool:
        """Since this was asked last."""
        seen = self._seen.is_set()
        self._seen.clear()
        return seen

    def _watch(self) -> None:
        try:
            while (message := recv_monitor_message(self._events))["event"] != zmq.Event.MONITOR_STOPPED:
                if message["value"] == self.CRYPTOGRAPHIC:
                    self._seen.set()
        finally:
            self._events.close(0)

    def ended(self) -> None:
        """Waits until it has, after the socket was closed."""
        self._thread.join()
