"""The hub lives on, whatever comes: from machines with the token, and from strangers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
import zmq

from tests.processes import free_port
from weft.launch.hub import EVERY, LARGEST, VERSION, Agreed, Here, Hub, ToMachine, Unfit, encode
from weft.launch.keys import key_of
from weft.launch.sockets import Attempts, worker_socket

SECRET = "a secret between us"
TOKEN = key_of(SECRET).token
told = msgspec.msgpack.Decoder(ToMachine).decode


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


class Played:
    """A machine whose life the test decides on, and what it was told."""

    def __init__(self, tried: Tried, name: str) -> None:
        self.tried, self.name, self.socket = tried, name, tried.machine()
        self.come()

    def come(self) -> None:
        """Gives a sign of life, and agrees to whatever it is asked for."""
        self.socket.send(encode(Here(self.name, "10.0.0.2", VERSION)))
        for number in range(1, 4):
            self.socket.send(encode(Agreed(number)))

    def heard(self) -> list[str]:
        names = []
        while self.socket.poll(100):
            names.append(type(told(self.socket.recv())).__name__)
        return names

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def claimed(tried: Tried, group: object, count: int, since: float = 0.0) -> list[str]:
    return [machine.name for machine in tried.hub.claim(group, count, since)[0]]


def test_groups_share_machines_and_none_takes_what_another_one_has(tried: Tried) -> None:
    one, other = object(), object()
    for group in (one, other):
        tried.hub.enter(group)
    tried.hub.demand(b"terms")
    with Played(tried, "a") as a, Played(tried, "b"), Played(tried, "c"):
        for name in "abc":
            tried.until(f"{name} (10.0.0.2) has joined")
        assert claimed(tried, one, 2) == ["a", "b"]
        assert not any("stands by" in line for line in tried.said), "another group may want it"
        assert tried.hub.claim(other, 2, 0.0) == ([], 1)
        assert claimed(tried, other, 1) == ["c"]
        with Played(tried, "d"):
            tried.until("d (10.0.0.2) stands by")
            tried.hub.release(one, [machine for machine in tried.hub.there() if machine.group is one])
            assert tried.hub.claim(one, 2, 0.0) == ([], 1), "only one that has given a sign of life since"
            a.come()
            end = time.monotonic() + 2
            while not (names := claimed(tried, one, 2)):
                assert time.monotonic() < end
            assert sorted(names) == ["a", "d"]


def test_a_machine_that_was_heard_long_ago_is_not_claimed(tried: Tried) -> None:
    group = object()
    tried.hub.enter(group)
    tried.hub.demand(b"terms")
    begin = time.monotonic()
    with Played(tried, "a") as a:
        tried.until("a (10.0.0.2) has joined")
        time.sleep(2.5 * EVERY)
        assert tried.hub.claim(group, 1, begin) == ([], 1)
        a.come()
        end = time.monotonic() + 2
        while not claimed(tried, group, 1, begin):
            assert time.monotonic() < end


def test_new_terms_are_for_machines_that_have_no_rank(tried: Tried) -> None:
    """Others are asked when they are let go of: what they run is as it was."""
    one, other = object(), object()
    for group in (one, other):
        tried.hub.enter(group)
    tried.hub.demand(b"terms")
    with Played(tried, "a") as a, Played(tried, "b") as b:
        for name in "ab":
            tried.until(f"{name} (10.0.0.2) has joined")
        assert claimed(tried, one, 1) == ["a"]
        assert [each.heard().count("Terms") for each in (a, b)] == [1, 1]
        tried.hub.demand(b"other terms")
        assert [each.heard().count("Terms") for each in (a, b)] == [0, 1]
        tried.hub.release(one, [machine for machine in tried.hub.there() if machine.group is one])
        assert a.heard().count("Terms") == 1


def test_who_is_told_may_take_their_time(tried: Tried) -> None:
    """A terminal that is stopped holds up nobody who listens."""
    stopped, going_on = threading.Event(), threading.Event()

    def told(line: str) -> None:
        stopped.set()
        assert going_on.wait(10)

    tried.hub.told = told
    tried.hub.demand(b"terms")
    with Played(tried, "a"):
        listening = threading.Thread(target=tried.hub.listen, args=(5000,))
        listening.start()
        assert stopped.wait(5)
        begin = time.monotonic()
        tried.hub.listen(0)
        assert len(tried.hub.there()) == 1 and time.monotonic() - begin < 1
        going_on.set()
        listening.join(10)


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
        assert [str(machine) for machine in tried.hub.there()] == ["good (10.0.0.2)"]
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
