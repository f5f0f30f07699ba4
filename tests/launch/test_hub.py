"""The hub lives on, whatever comes: from machines with the token, and from strangers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import zmq

from tests.processes import free_port
from weft.launch.hub import LARGEST, VERSION, Agreed, Here, Hub, Unfit, encode
from weft.launch.keys import key_of
from weft.launch.sockets import Attempts, worker_socket

SECRET = "a secret between us"
TOKEN = key_of(SECRET).token


class Tried:
    """A hub, what it said, and machines that talk to it as they like."""

    def __init__(self) -> None:
        self.port, self.said = free_port(), list[str]()
        self.hub = Hub(f"127.0.0.1:{self.port}", SECRET, self.said.append)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def machine(self) -> zmq.Socket[bytes]:
        made = worker_socket(self.context, TOKEN)
        made.linger = 0
        made.connect(f"tcp://127.0.0.1:{self.port}")
        return made

    def until(self, what: str) -> None:
        end = time.monotonic() + 5
        while not any(what in line for line in self.said):
            self.hub.listen(20)
            assert time.monotonic() < end, (what, self.said)


@pytest.fixture
def tried() -> Iterator[Tried]:
    made, before = Tried(), threading.active_count()
    yield made
    made.hub.close()
    made.context.destroy(0)
    assert threading.active_count() < before, "the hub's own thread has ended"


def test_what_is_no_message_is_said_once_and_hurts_nobody(tried: Tried) -> None:
    with closing(tried.machine()) as junk, closing(tried.machine()) as frames, closing(tried.machine()) as good:
        junk.send(b"\xc1 what is this")
        frames.send_multipart([encode(Here("a", "b", VERSION)), b"more"])
        tried.until("another version")
        tried.hub.demand(b"terms")
        for _ in range(3):
            good.send(encode(Here("good", "10.0.0.2", VERSION)))
            junk.send(b"\xc1")
        good.send(encode(Agreed(1)))
        tried.until("good (10.0.0.2) has joined")
        assert [str(machine) for machine in tried.hub.there(0.0)] == ["good (10.0.0.2)"]
    assert sum("another version" in line for line in tried.said) == 2, "one line for each"


def test_a_machine_that_never_reads_holds_nobody_up(tried: Tried) -> None:
    with closing(tried.machine()) as mute:
        for _ in range(20_000):
            mute.send(encode(Here("mute", "10.0.0.3", VERSION)))
            if mute.getsockopt(zmq.EVENTS) & zmq.POLLOUT == 0:
                break
        begin = time.monotonic()
        for _ in range(60):
            tried.hub.listen(0)
        assert time.monotonic() - begin < 5.0


def test_a_machine_writes_no_lines_of_its_own_on_the_terminal(tried: Tried) -> None:
    with closing(tried.machine()) as sly:
        sly.send(encode(Here("sly\n\x1b[2Jall is well", "x", VERSION)))
        sly.send(encode(Unfit("bad\nthe server ends")))
        tried.until("is not used")
    [line] = tried.said
    assert line == "sly??[2Jall is well (x) is not used: bad?the server ends"


def test_a_stranger_that_announces_much_is_cut_off(tried: Tried) -> None:
    """Before it has proved anything: what it announces is not taken in."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with socket.create_connection(("127.0.0.1", tried.port), timeout=5) as stranger:
        stranger.sendall(greeting)
        stranger.sendall(b"\x06" + (1000 * LARGEST).to_bytes(8, "big") + b"x" * LARGEST)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                stranger.sendall(b"x" * LARGEST)


def test_attempts_know_that_a_server_is_gone() -> None:
    tried = Tried()
    made = worker_socket(tried.context, TOKEN)
    made.linger = 0
    attempts = Attempts(made)
    made.connect(f"tcp://127.0.0.1:{tried.port}")

    def until(what: str) -> None:
        end = time.monotonic() + 5
        while attempts.last() != what:
            assert time.monotonic() < end, attempts.last()
            time.sleep(0.02)

    until("accepted")
    tried.hub.close()
    until("")
    made.close(0)
    attempts.close()
    tried.context.destroy(0)
