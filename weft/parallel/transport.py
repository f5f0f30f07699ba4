"""What a group needs of whatever carries its messages. NCCL would be one more. Knows no implementation. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Transfer(Protocol):
    """A message on its way."""

    def wait(self) -> None:
        """Returns when it was sent, or has come. Raises `LinkLost`."""
        ...


class Wired(Protocol):
    """To and from one peer; messages arrive in the order of their sending. All raises `LinkLost`."""

    def send(self, tensor: Tensor) -> Transfer:
        """Starts sending a contiguous tensor, which stays untouched until it was sent."""
        ...

    def receive(self, tensor: Tensor) -> Transfer:
        """Starts receiving into a contiguous tensor of the size that is sent."""
        ...

    def exchange(self, tensor: Tensor, into: Tensor) -> None:
        """Sends one and receives the other."""
        ...


class Transport(Protocol):
    """One rank's way to all others."""

    rank: int

    def open(self, purpose: str, peers: Sequence[int]) -> dict[int, Wired]:
        """Something to each of these ranks, which ask for the same purpose, all in the same order."""
        ...

    def close(self) -> None:
        """Lets go of all that was opened."""
        ...
