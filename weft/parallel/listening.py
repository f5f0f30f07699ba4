"""Where a rank listens, and sockets that reach it. Knows addresses; knows nothing of who may connect. No torch."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from weft.errors import InputError

BACKLOG = 32  # connections that wait to be answered


class Place(NamedTuple):
    """Where a rank listens. `name`: its socket on this machine, for those that share its memory; else empty."""

    address: str
    port: int
    name: str


def listen_at(address: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free. Raises `InputError`."""
    try:
        family, *_, sockaddr = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as undone:
            listening = undone.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(sockaddr)
            listening.listen(BACKLOG)
            undone.pop_all()
        return listening
    except OSError as error:
        raise InputError(f"{address} port {port} can't be listened on for the other ranks ({error.strerror})") from None


def towards(place: Place) -> socket.socket:
    """A socket of the kind that reaches it."""
    if place.name:
        return socket.socket(socket.AF_UNIX)
    family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def sockaddr(place: Place) -> tuple[Any, ...] | str:
    """As the system has it."""
    if place.name:
        return of_system(place.name)
    return socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0][4]


def local_name(folder: str | None) -> str:
    """Of a socket for ranks of this machine; empty where there can be none. One without a folder is of a network
    namespace, and says which."""
    unique = secrets.token_hex(16)
    if folder is not None:
        return f"{folder}/rank-{unique}"
    with suppress(OSError):
        return f"@{os.stat('/proc/self/ns/net').st_ino}/{unique}" if sys.platform == "linux" else ""
    return ""


def of_system(name: str) -> str:
    """A local socket's name as the system has it."""
    return "\0weft" + name if name.startswith("@") else name


def is_own(connection: socket.socket) -> bool:
    """Whether a process of the same user is at the other end."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return bool(user == os.getuid())


def where_of(place: Place) -> str:
    """In words."""
    return "a socket of this machine" if place.name else f"{place.address} port {place.port}"


def exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises `ConnectionError` if the other side hangs up before."""
    said = b""
    while len(said) < size:
        part = connection.recv(size - len(said))
        if not part:
            raise ConnectionError("it hung up")
        said += part
    return said
