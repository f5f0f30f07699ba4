"""gloo as a transport: torch's own, for comparison and where weft's doesn't do.

Its meeting point asks nobody who they are. The only user of torch.distributed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from weft.errors import LinkLost
from weft.parallel.transport import Wired

TIMEOUT = timedelta(minutes=10)  # a safety net only: the engine notices a lost or hung rank long before


class _GlooTransfer:
    """A message on its way."""

    def __init__(self, work: dist.Work, peer: int) -> None:
        self._work, self._peer = work, peer

    def wait(self) -> None:
        """See `Transfer`."""
        with _link(self._peer):
            self._work.wait()


class _Pair:
    """To and from one peer. `out`, `into`: process groups, in which the peer has the number `place`."""

    def __init__(self, peer: int, place: int, out: Any, into: Any) -> None:
        self._peer, self._place, self._out, self._in = peer, place, out, into

    def send(self, tensor: Tensor) -> _GlooTransfer:
        """See `Wired`."""
        with _link(self._peer):
            return _GlooTransfer(self._out.send([tensor], self._place, 0), self._peer)

    def receive(self, tensor: Tensor) -> _GlooTransfer:
        """See `Wired`."""
        with _link(self._peer):
            return _GlooTransfer(self._in.recv([tensor], self._place, 0), self._peer)

    def exchange(self, tensor: Tensor, into: Tensor) -> None:
        """See `Wired`."""
        receiving, sending = self.receive(into), self.send(tensor)
        receiving.wait()
        sending.wait()


class Gloo:
    """`store`: where the ranks find each other."""

    def __init__(self, rank: int, store: Any) -> None:
        self.rank, self._store = rank, store

    def open(self, purpose: str, peers: Sequence[int]) -> dict[int, Wired]:
        """One process group for messages to higher ranks, one for those to lower ones.

        A connection of gloo has one lock for both ways, and its receiving thread spins while a send holds it: on a
        rank's only core that took turns of 3 ms.
        """
        ranks = sorted([*peers, self.rank])
        place = {rank: number for number, rank in enumerate(ranks)}
        up, down = (self._made(f"{purpose} {ranks} {way}", place[self.rank], len(ranks)) for way in ("up", "down"))
        ways = {peer: (up, down) if peer > self.rank else (down, up) for peer in peers}
        return {peer: _Pair(peer, place[peer], *way) for peer, way in ways.items()}

    def _made(self, name: str, rank: int, world: int) -> Any:
        """torch has no types for its process groups: Any here, checked by the tests."""
        store = dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]
        with _link(self.rank):
            return dist.ProcessGroupGloo(store, rank, world, TIMEOUT)

    def close(self) -> None:
        """Nothing is held but by what was opened."""


@contextmanager
def _link(peer: int) -> Iterator[None]:
    """What torch says of a connection is for people who know its sources."""
    try:
        yield
    except RuntimeError as error:
        raise LinkLost(f"the connection to rank {peer} is lost") from error


def available() -> bool:
    """True if torch was built with gloo."""
    return dist.is_gloo_available()


def host_store(address: str) -> tuple[Any, int]:
    """Opens the meeting point of a group on `address`, and on no other, and returns it with its port (chosen free)."""
    # A socket of ours: torch's own would listen on every address of the machine, and it asks nobody who they are.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.bind((address, 0))
    listening.listen()
    port = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60),
        master_listen_fd=listening.detach(),
    )  # fmt: skip
    return store, port


def join_store(address: str, port: int) -> Any:
    """Connects to a meeting point that another rank hosts. Raises `LinkLost`."""
    try:
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise LinkLost(f"the ranks' meeting point, {address} port {port}, can't be reached") from error
