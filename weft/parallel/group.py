"""A group of ranks: messages to and from each, with every sent byte counted.

Knows ranks and tensors; knows nothing of how messages travel, of what is sent or why. A group is an object of its own,
not the process's default group: tests run several ranks as threads of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from weft.parallel.transport import Transfer, Transport, Wired
from weft.program.stages import NETWORK


class Group:
    """`ranks` of those that a transport reaches, counted from 0; alone without one. Use from one thread at a time, in
    the same order on every rank.

    Lanes that communicate at once have groups of their own: `lane` is this one's, `on` gives those of others, and those
    of some of the ranks. `machines`: where each rank is, a number each. Whatever sends or receives raises `LinkLost`.
    """

    def __init__(
        self, transport: Transport | None, ranks: Sequence[int] = (0,), lane: str = NETWORK,
        machines: Sequence[int] = (), to: Mapping[int, Wired] | None = None,
    ) -> None:  # fmt: skip
        self.lane, self._transport, self._ranks = lane, transport, tuple(ranks)
        self._places = tuple(machines) or (0,) * len(ranks)
        own = transport.rank if transport is not None else self._ranks[0]
        self.rank, self.world = self._ranks.index(own), len(ranks)
        self._sent = 0
        self._others: dict[tuple[str, tuple[int, ...]], Group] = {}
        self._among: dict[tuple[int, ...], Group] = {}
        peers = [rank for rank in self._ranks if rank != own]
        if to is None and peers:
            assert transport is not None, "ranks don't reach each other without a transport"
            to = transport.open(f"{lane} {self._ranks}", peers)
        self._to = {self._ranks.index(rank): to[rank] for rank in peers} if to else {}

    def on(self, lane: str, ranks: tuple[int, ...] = ()) -> Group:
        """These ranks on a lane, counted from 0; without any, all. Each of them asks for it, all in the same order."""
        if lane == self.lane and not ranks:
            return self
        if (lane, ranks) not in self._others:
            some = ranks or tuple(range(self.world))
            self._others[lane, ranks] = Group(
                self._transport, [self._ranks[rank] for rank in some], lane, [self._places[rank] for rank in some]
            )
        return self._others[lane, ranks]

    def among(self, ranks: Sequence[int]) -> Group:
        """Some of the ranks, this one among them, over this group's own connections."""
        some = tuple(ranks)
        if some not in self._among:
            to = {self._ranks[rank]: wired for rank, wired in self._to.items()}
            self._among[some] = Group(
                self._transport, [self._ranks[rank] for rank in some], self.lane,
                [self._places[rank] for rank in some], to,
            )  # fmt: skip
        return self._among[some]

    @cached_property
    def machines(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each machine, in the order of their first ones."""
        by_machine: dict[int, list[int]] = {}
        for rank, machine in enumerate(self._places):
            by_machine.setdefault(machine, []).append(rank)
        return tuple(map(tuple, by_machine.values()))

    @cached_property
    def nested(self) -> bool:
        """True if several ranks share one of several machines."""
        return 1 < len(self.machines) < self.world

    @property
    def bytes_sent(self) -> int:
        """So far, on all lanes."""
        return self._sent + sum(group.bytes_sent for group in (*self._others.values(), *self._among.values()))

    @property
    def peers(self) -> list[int]:
        """All other ranks, those after this one first, so that not all ranks send to rank 0 at once."""
        return [(self.rank + step) % self.world for step in range(1, self.world)]

    def send(self, tensor: Tensor, to: int) -> Transfer:
        """Starts sending; the tensor must stay untouched until `.wait()` returned."""
        self._sent += tensor.nbytes
        return self._to[to].send(tensor)

    def receive(self, tensor: Tensor, source: int) -> Transfer:
        """Starts receiving into `tensor`; messages of one sender arrive in the order of their sending."""
        return self._to[source].receive(tensor)

    def exchange(self, tensor: Tensor, into: Tensor, peer: int) -> None:
        """Sends one and receives the other."""
        self._sent += tensor.nbytes
        self._to[peer].exchange(tensor, into)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor` (all of one shape), in rank order; the own one is itself."""
        gathered = [tensor if rank == self.rank else torch.empty_like(tensor) for rank in range(self.world)]
        transfers = [self.receive(gathered[peer], peer) for peer in self.peers]
        wait_all(transfers + [self.send(tensor, peer) for peer in self.peers])
        return gathered

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))


def wait_all(transfers: Sequence[Transfer]) -> None:
    """Waits for every message. Raises `LinkLost` if a peer went away."""
    for transfer in transfers:
        transfer.wait()
