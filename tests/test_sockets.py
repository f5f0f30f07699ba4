"""Who may listen: beyond loopback only the API's port, and what joined machines need."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.processes import Command, free_port
from weft.launch.keys import key_of
from weft.parallel.gloo import host_store, join_store


def listening(process: psutil.Process) -> Iterator[tuple[str, int]]:
    """Addresses and ports of a process and its children: TCP that listens, UDP that is bound."""
    for one in (process, *process.children(recursive=True)):
        for connection in one.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                yield connection.laddr.ip, connection.laddr.port


def own_address() -> str:
    """This machine's, not loopback's; skips where there is none."""
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    there = [e.address for e in entries if e.family == socket.AF_INET and not ip_address(e.address).is_loopback]
    if not there:
        pytest.skip("this machine has loopback only")
    return str(there[0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_one_machine_meet_on_loopback(packaged: Path, ranks: int) -> None:
    port = free_port()
    options = "--tp", str(ranks), "--threads", "1", "--overlap", "serial", "--host", "0.0.0.0", "--allow-anyone"
    with Command("serve", *options, "--port", str(port)) as server:
        server.until("for OpenAI's clients", 120)
        found = set(listening(psutil.Process(server.child.pid)))
        beyond = {(host, number) for host, number in found if not ip_address(host).is_loopback}
        assert beyond == {("0.0.0.0", port)}
        assert len(found) > ranks, "the ranks' own are among those that were looked at"


def test_machines_that_join_meet_at_the_address_that_was_given(packaged: Path) -> None:
    address, hub, port = own_address(), free_port(), free_port()
    secret = "a secret between us"
    serve = "--tp", "2", "--threads", "1", "--overlap", "serial", "--port", str(port)
    with (
        Command("worker", "--join", f"{address}:{hub}", WEFT_TOKEN=key_of(secret).token) as machine,
        Command("serve", *serve, "--join-address", f"{address}:{hub}", WEFT_TOKEN=secret) as server,
    ):
        server.until("for OpenAI's clients", 120)
        for process in (server, machine):
            found = set(listening(psutil.Process(process.child.pid)))
            assert {host for host, _ in found} <= {address, "127.0.0.1"}, found
        assert ("127.0.0.1", port) in set(listening(psutil.Process(server.child.pid)))


def test_a_meeting_point_listens_where_it_is_said_to() -> None:
    store, port = host_store("127.0.0.1")
    mine = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == port and not c.raddr]
    assert mine == ["127.0.0.1"]
    store.set("a", b"1")
    assert join_store("127.0.0.1", port).get("a") == b"1"


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_a_meeting_point_of_an_ipv6_address() -> None:
    try:
        store, port = host_store("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    store.set("a", b"1")
    assert join_store("::1", port).get("a") == b"1"
