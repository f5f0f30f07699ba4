"""Messages between two ranks over weft's own transport, moved by the thread that waits for them.

A channel has two queues: what is to be sent, and where what comes is to go, each in order. Nothing runs in the
background: whoever waits moves all that is under way on its lane, so that two ranks that send each other more than
buffers hold don't wait for each other. Knows bytes, addresses and time; knows nothing of what they mean. No torch.
"""

from __future__ import annotations

import os
import select
import time
from _thread import get_ident
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.errors import LinkLost
from weft.parallel.pace import wake_on_time

if TYPE_CHECKING:
    from torch import Tensor

SPIN = 250e-6  # seconds to look again and again before sleeping, where no other rank wants the core: docs/log.md
LOOK = 0.05  # seconds between looks whether a peer is lost


class Parcel:
    """One tensor's bytes on their way. `moved`: of its header and bytes. `over`: sent, or there. `data`: the bytes, for
    channels that want them as Python has them."""

    __slots__ = ("data", "moved", "over", "pump", "size", "tensor")

    def __init__(self, tensor: Tensor, pump: Pump) -> None:
        self.tensor, self.pump, self.size = tensor, pump, tensor.nbytes
        self.moved, self.over = 0, not self.size  # nothing needs no message
        self.data: memoryview | None = None

    def wait(self) -> None:
        """Returns when it was sent, or has come. Raises `LinkLost`."""
        if not self.over:
            self.pump.until(self)


class Channel:
    """To and from one peer. Kinds of it move bytes in `push` and `pull`, which return whether they moved any."""

    def __init__(self, peer: int, pump: Pump) -> None:
        self.peer, self.pump = peer, pump
        self.outgoing: deque[Parcel] = deque()
        self.incoming: deque[Parcel] = deque()
        pump.channels.append(self)

    def send(self, tensor: Tensor) -> Parcel:
        """Starts sending; the tensor, contiguous, stays untouched until it is over."""
        assert tensor.is_contiguous(), "messages are contiguous"
        parcel = Parcel(tensor, self.pump)
        if not parcel.over:
            self.outgoing.append(parcel)
            self.push()
        return parcel

    def receive(self, tensor: Tensor) -> Parcel:
        """Starts receiving into a contiguous tensor."""
        assert tensor.is_contiguous(), "messages are contiguous"
        parcel = Parcel(tensor, self.pump)
        if not parcel.over:
            self.incoming.append(parcel)
        return parcel

    def exchange(self, tensor: Tensor, into: Tensor) -> None:
        """Sends one and receives the other."""
        receiving, sending = self.receive(into), self.send(tensor)
        receiving.wait()
        sending.wait()

    def push(self) -> bool:
        """Sends what can be sent now."""
        raise NotImplementedError

    def pull(self) -> bool:
        """Takes what has come."""
        raise NotImplementedError

    def arm(self, poll: select.poll) -> float:
        """Before sleeping: has `poll` wake up for what this channel waits for. Seconds to sleep at most; 0 if there is
        something already."""
        raise NotImplementedError

    def wake(self) -> None:
        """After sleeping."""

    def close(self) -> None:
        """Lets go of what it holds."""
        raise NotImplementedError

    def demand_size(self, parcel: Parcel, size: int) -> None:
        """Before anything is made of what came; no more of it is taken than was due. Raises `LinkLost`."""
        if parcel.size != size:
            raise LinkLost(f"rank {self.peer} sent {size} bytes where {parcel.size} were due")

    def gone(self) -> LinkLost:
        """What is raised when the peer has closed its end."""
        return LinkLost(f"the connection to rank {self.peer} is lost")


class Pump:
    """All channels of a lane. `lost`: why the group is of no use any more, or None. The thread that makes it is the one
    that computes: when it waits, it may look again and again for `spin` seconds; another one would take its time. When
    it has slept, `woken` is called: a message wakes whom it is for on its sender's core."""

    def __init__(self, lost: Callable[[], str | None], spin: float, woken: Callable[[], None] = lambda: None) -> None:
        self.channels: list[Channel] = []
        self._woken = woken
        self._lost, self._spin, self._computes = lost, spin, get_ident()
        self._on_time: set[int] = set()  # threads that are woken so

    def may_spin(self) -> bool:
        """Whether nothing else wants the core that waiting would keep busy."""
        return self._spin > 0 and get_ident() == self._computes

    def until(self, parcel: Parcel) -> None:
        """Moves everything until this one is over. Raises `LinkLost`."""
        patience = 0.0
        while True:
            moved = self._move()
            if parcel.over:
                return
            now = time.perf_counter()
            if moved or not patience:
                patience = now + (self._spin if self.may_spin() else 0.0)
            if now >= patience:
                self._sleep()
                patience = 0.0
                if self.may_spin():
                    self._woken()
            elif self.may_spin():
                os.sched_yield()  # to a peer that was woken on this core: it would wait for the end of all the looking

    def _move(self) -> bool:
        moved = False
        for channel in self.channels:
            if channel.outgoing and channel.push():
                moved = True
            if channel.incoming and channel.pull():
                moved = True
        return moved

    def _wake_on_time(self) -> None:
        if get_ident() not in self._on_time:
            self._on_time.add(get_ident())
            wake_on_time()

    def _sleep(self) -> None:
        """Until something may have changed."""
        poll, busy = select.poll(), [channel for channel in self.channels if channel.outgoing or channel.incoming]
        seconds = min(channel.arm(poll) for channel in busy)
        if seconds >= LOOK:
            if not poll.poll(LOOK * 1e3) and (reason := self._lost()):
                raise LinkLost(reason)
        elif seconds > 0.002:
            poll.poll(seconds * 1e3 - 1)
        elif seconds > 0:  # a paced message is here, and may be had then
            self._wake_on_time()
            time.sleep(seconds)
        for channel in busy:
            channel.wake()
