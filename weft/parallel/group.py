"""A group of ranks: point-to-point messages and one gathering primitive, with every sent byte counted.

Knows torch.distributed; knows nothing of what is sent or why. A group is an object of its own, not the process's
default group: tests run several ranks as threads of one process.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import LinkLost
from weft.program.stages import NETWORK

TIMEOUT = timedelta(minutes=10)  # a safety net only: the engine notices a lost or hung rank long before


class Transfer:
    """A message on its way."""

    def __init__(self, work: dist.Work, rank: int) -> None:
        self._work, self._rank = work, rank

    def wait(self) -> None:
        """Returns when it was sent, or has come. Raises `LinkLost`."""
        with _link(self._rank):
            self._work.wait()


@contextmanager
def _link(rank: int) -> Iterator[None]:
    """What torch says of a connection is for people who know its sources."""
    try:
        yield
    except RuntimeError as error:
        raise LinkLost(f"rank {rank} lost its connection to another rank") from error


class Group:
    """`rank` of `world`; use from one thread at a time, in the same order on every rank.

    Lanes that communicate at once have groups of their own: `lane` is this one's, `on` gives those of others, and those
    of some of the ranks.
    """

    def __init__(self, rank: int, world: int, store: Any | None, lane: str = NETWORK) -> None:
        self.rank, self.world, self.lane, self._store = rank, world, lane, store
        self._sent = 0
        self._others: dict[tuple[str, tuple[int, ...]], Group] = {}
        # One for messages to higher ranks, one for those to lower ones. A connection of gloo has one lock for both
        # ways, and its receiving thread spins while a send holds it: on a rank's only core that took turns of 3 ms.
        # torch has no types for its process groups: Any here, checked by the tests.
        self._up: Any = None
        self._down: Any = None
        if world > 1:
            assert store is not None, "more than one rank needs a store to meet at"
            with _link(rank):
                self._up, self._down = (
                    dist.ProcessGroupGloo(dist.PrefixStore(f"{lane} {way}", store), rank, world, TIMEOUT)  # type: ignore[attr-defined]
                    for way in ("up", "down")
                )

    def on(self, lane: str, ranks: tuple[int, ...] = ()) -> Group:
        """These ranks on a lane, counted from 0; without any, all. Each of them asks for it, all in the same order."""
        if lane == self.lane and not ranks:
            return self
        if (lane, ranks) not in self._others:
            some, store = ranks or tuple(range(self.world)), self._store
            if ranks and store is not None:
                store = dist.PrefixStore(f"ranks {ranks}", store)  # type: ignore[attr-defined]
            self._others[lane, ranks] = Group(some.index(self.rank), len(some), store, lane)
        return self._others[lane, ranks]

    @property
    def bytes_sent(self) -> int:
        """So far, on all lanes."""
        return self._sent + sum(group.bytes_sent for group in self._others.values())

    @property
    def peers(self) -> list[int]:
        """All other ranks, those after this one first, so that not all ranks send to rank 0 at once."""
        return [(self.rank + step) % self.world for step in range(1, self.world)]

    def send(self, tensor: Tensor, to: int) -> Transfer:
        """Starts sending; the tensor must stay untouched until `.wait()` returned. Raises `LinkLost`, as all here."""
        self._sent += tensor.nbytes
        with _link(self.rank):
            return Transfer(self._towards(to > self.rank).send([tensor], to, 0), self.rank)

    def receive(self, tensor: Tensor, source: int) -> Transfer:
        """Starts receiving into `tensor`; messages of one sender arrive in the order of their sending."""
        with _link(self.rank):
            return Transfer(self._towards(source < self.rank).recv([tensor], source, 0), self.rank)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor` (all of one shape), in rank order."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        self._sent += tensor.nbytes * (self.world - 1)
        with _link(self.rank):
            self._towards(up=True).allgather([gathered], [tensor]).wait()
        return gathered

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        if self.world > 1:
            with _link(self.rank):
                self._towards(up=True).barrier().wait()

    def _towards(self, up: bool) -> Any:
        """What carries messages to higher ranks, or to lower ones."""
        assert self._up is not None, "a group of one rank sends nothing"
        return self._up if up else self._down


def gloo_available() -> bool:
    """True if torch was built with gloo, which ranks on CPUs talk through."""
    return dist.is_gloo_available()


def wait_all(transfers: Sequence[Transfer]) -> None:
    """Waits for every message. Raises `LinkLost` if a peer went away."""
    for transfer in transfers:
        transfer.wait()


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
