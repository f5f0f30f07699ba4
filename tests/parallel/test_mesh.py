"""Who is let into a group, how its ranks notice that one is gone, and that nothing of it is left."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import Threads, grouped, meshes
from weft.errors import InputError, LinkLost
from weft.parallel import handshake as h
from weft.parallel import mesh as module
from weft.parallel import ring
from weft.parallel.direct import Direct
from weft.parallel.group import Group
from weft.parallel.listening import Place, of_system
from weft.parallel.mesh import Mesh

WAYS = ["shm", "tcp", "tls"]


def joined(*, memory: bool = False, world: int = 2) -> tuple[Threads, list[Mesh]]:
    threads = Threads(world)
    return threads, meshes(threads, memory)


@pytest.fixture
def two() -> Iterator[list[Mesh]]:
    threads, made = joined()
    yield made
    for mesh in made:
        mesh.close()
    threads.close()


def connected(place: Place, local: bool = False) -> socket.socket:
    kind = socket.AF_UNIX if local else socket.AF_INET
    guest = socket.socket(kind)
    guest.settimeout(5)
    guest.connect(of_system(place.name) if local else (place.address, place.port))
    return guest


def answered(mesh: Mesh, hello: bytes, proof: Callable[[bytes], bytes], local: bool = False) -> bytes:
    """What a guest hears after its proof: nothing, as the connection is closed."""
    with connected(mesh.place, local) as guest:
        guest.sendall(hello)
        challenge = guest.recv(h.CHALLENGE_BYTES)
        if challenge:
            guest.sendall(proof(challenge))
        return guest.recv(1)


def sent_away(guest: socket.socket) -> bool:
    """Its connection is closed, or reset where not all was read that it said."""
    try:
        return guest.recv(1) == b""
    except ConnectionError:
        return True


def soon(true: Callable[[], bool]) -> bool:
    """Within five seconds."""
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def still_works(made: list[Mesh]) -> None:
    """And is over then."""
    threads, transports = Threads(len(made)), [Direct(mesh) for mesh in made]
    groups = threads.each(lambda r: Group(transports[r], range(len(made))))
    threads.each(lambda r: groups[r].barrier())
    for transport in transports:
        transport.close()
    threads.close()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n" + b"x" * 100, b"\xff" * h.HELLO_BYTES, bytes(4096)])
def test_a_stranger_that_says_anything_is_sent_away(two: list[Mesh], said: bytes, local: bool) -> None:
    with connected(two[0].place, local) as guest:
        guest.sendall(said)
        assert sent_away(guest)
    still_works(two)


@pytest.mark.parametrize("local", [False, True])
def test_another_groups_member_gets_nowhere(two: list[Mesh], local: bool) -> None:
    other = h.pair_key(h.new_key(), 0, 1)
    hello = h.hello(1, 0, h.label_of("for anything"))
    heard = answered(two[0], hello, lambda challenge: h._mac(other, b"connecting" + hello + challenge[:32]), local)
    assert heard == b"" and not two[0]._arrived
    with pytest.raises(h.NotAMember):  # nor does a member believe another group's rank
        h.proof(other, hello, h.challenge(two[0]._keys[1], hello))
    still_works(two)


def test_a_member_under_a_wrong_rank_gets_nowhere() -> None:
    threads, made = joined(world=3)
    hello = h.hello(1, 0, h.label_of("for anything"))  # says rank 2, which has the key of 0 and 2
    key = made[2]._keys[0]
    heard = answered(made[0], hello, lambda challenge: h._mac(key, b"connecting" + hello + challenge[:32]))
    assert heard == b"" and not made[0]._arrived
    for wrong in (h.hello(1, 2, h.label_of("a")), h.hello(0, 0, h.label_of("a")), h.hello(9, 0, h.label_of("a"))):
        with connected(made[0].place) as guest:
            guest.sendall(wrong)
            assert guest.recv(1) == b"", "wants another rank, is this one, or is none"
    still_works(made)
    threads.close()


def test_what_was_heard_is_of_no_use_again(two: list[Mesh]) -> None:
    hello, key = h.hello(1, 0, h.label_of("for anything")), two[1]._keys[0]
    first = b""

    def proof(challenge: bytes) -> bytes:
        nonlocal first
        first = first or h.proof(key, hello, challenge)
        return first

    with connected(two[0].place) as guest:
        guest.sendall(hello)
        guest.sendall(proof(guest.recv(h.CHALLENGE_BYTES)))
        two[0]._await(1, h.label_of("for anything"))[0].close()
    assert answered(two[0], hello, proof) == b"" and not two[0]._arrived


def test_guests_who_say_nothing_keep_nobody_out(two: list[Mesh], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GUEST_SECONDS", 0.5)
    idle = [connected(two[0].place) for _ in range(3 * module.GUESTS)]
    still_works(two)
    assert len(two[0]._guests) <= module.GUESTS
    assert all(guest.recv(1) == b"" for guest in idle), "each is sent away in the end"
    for guest in idle:
        guest.close()


def test_who_listens_in_a_ranks_place_is_not_believed(two: list[Mesh]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def impostor() -> None:
            with server.accept()[0] as guest:
                guest.recv(h.HELLO_BYTES)
                guest.sendall(bytes(h.CHALLENGE_BYTES))
                guest.recv(1)

        threading.Thread(target=impostor, daemon=True).start()
        two[1]._places = [Place("127.0.0.1", server.getsockname()[1], ""), two[1].place]
        with pytest.raises(LinkLost, match="what listens there is another one, it has another key"):
            two[1]._connect(0, h.label_of("for anything"))


def test_memory_that_is_not_whole_is_refused() -> None:
    threads, made = joined(memory=True)
    key, hello = made[1]._keys[0], h.hello(1, 0, h.label_of("for anything"))
    small = os.memfd_create("small", os.MFD_ALLOW_SEALING)
    os.ftruncate(small, 4096)
    with connected(made[0].place, local=True) as guest:
        guest.sendall(hello)
        socket.send_fds(guest, [h.proof(key, hello, guest.recv(h.CHALLENGE_BYTES))], [small])
        assert guest.recv(1) == b"" and not made[0]._arrived
    os.close(small)
    for mesh in made:
        mesh.close()
    threads.close()


def test_memory_is_this_users_alone_and_stays_as_large_as_it_is() -> None:
    handle = ring.new_region()
    assert os.fstat(handle).st_mode & 0o777 == 0o600 and os.fstat(handle).st_blocks * 512 >= ring.REGION
    with pytest.raises(PermissionError):
        os.ftruncate(handle, 4096)
    os.close(handle)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_ends_is_noticed_at_once(way: str) -> None:
    with grouped(2, way) as (threads, groups):
        told: list[str] = []

        def rank(r: int) -> float:
            if r == 1:
                time.sleep(0.3)
                groups[1]._transport.close()  # type: ignore[union-attr]
                return 0.0
            groups[0]._transport._mesh._tell = lambda peer, reason, ended: told.append(reason)  # type: ignore[union-attr]
            begin = time.monotonic()
            with pytest.raises(LinkLost, match="the connection to rank 1"):
                groups[0].receive(torch.empty(4), 1).wait()
            return time.monotonic() - begin

        seconds = threads.each(rank)[0]
        assert 0.2 < seconds < 1.0
        assert soon(lambda: told == ["the connection to rank 1 has ended"])


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_hangs_is_noticed(way: str) -> None:
    with grouped(2, way) as (threads, groups):
        mesh = groups[1]._transport._mesh  # type: ignore[union-attr]

        def rank(r: int) -> float:
            if r == 1:
                time.sleep(0.5)
                mesh._beat = lambda: None  # says nothing any more
                time.sleep(3.8)
                return 0.0
            begin = time.monotonic()
            with pytest.raises(LinkLost, match=r"rank 0 heard nothing from rank 1 for 3\.\d s"):
                groups[0].receive(torch.empty(4), 1).wait()
            return time.monotonic() - begin

        assert 3.0 < threads.each(rank)[0] < 4.0  # half a second of which it still lived


@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_are_busy_are_not_lost(way: str) -> None:
    with grouped(3, way) as (_, groups):
        time.sleep(2.2)
        assert not any(group._transport._mesh.lost for group in groups)  # type: ignore[union-attr]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str) -> None:
    def left() -> tuple[int, int, int]:
        mapped = Path("/proc/self/maps").read_text().count("memfd:weft")
        threads = sum(thread.name.startswith("weft-") for thread in threading.enumerate())
        return len(os.listdir("/proc/self/fd")), threads, mapped

    with grouped(3, way):  # whatever is opened once
        pass
    before = left()
    for _ in range(3):
        with grouped(3, way) as (threads, groups):
            threads.each(lambda r, groups=groups: groups[r].on("network2").barrier())
    assert soon(lambda: left() == before), "threads of the tests' own end when they get to it"


def test_an_address_that_is_not_here_is_said() -> None:
    with pytest.raises(InputError, match="192.0.2.1 port 0 can't be listened on"):
        Mesh("192.0.2.1")


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ranks_meet_over_ipv6() -> None:
    threads = Threads(2)
    try:
        made = meshes(threads, memory=False, address="::1")
    except InputError as error:
        pytest.skip(f"no IPv6 here: {error}")
    still_works(made)
    threads.close()
