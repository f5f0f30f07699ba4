"""Sockets between processes of one group: encrypted, and authenticated by a token.

Both ends derive the same keys from the token, and who doesn't have it can't say a word. Knows ZeroMQ; knows nothing of
what is said.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import zmq
from zmq.utils import z85

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


def _keys(token: str, role: str) -> tuple[bytes, bytes]:
    """A CURVE key pair (public, secret) that follows from the token."""
    secret: bytes = z85.encode(hashlib.sha256(f"weft/{role}/{token}".encode()).digest())
    return zmq.curve_public(secret), secret
