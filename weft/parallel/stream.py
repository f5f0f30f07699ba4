"""Messages over TCP: one connection for what is sent and one for what is received.

Two because sending and receiving on one hold its lock, and are slower by half for large messages. Each message goes
with a header: its bytes, and when it may be had, where the link is paced. Connections may be encrypted (tls.py). Knows
sockets; knows nothing of who is on the other side.
"""

from __future__ import annotations

import select
import socket
import struct
import time

import torch

from weft.parallel import tls
from weft.parallel.channel import LOOK, Channel, Parcel, Pump
from weft.parallel.pace import Pacing

HEADER = struct.Struct("<Qd")  # a message's bytes, and when it may be had (seconds, monotonic; 0: at once)


class StreamChannel(Channel):
    """`out`, `into`: connected to the peer. `pacing`: of the link that messages seem to travel."""

    def __init__(self, peer: int, pump: Pump, out: socket.socket, into: socket.socket, pacing: Pacing) -> None:
        super().__init__(peer, pump)
        self._out, self._in, self._pacing = out, into, pacing
        self._begun: Parcel | None = None  # what is being sent
        self._sending = b""  # its header
        self._due, self._through = 0.0, False  # when what has come may be had, and whether the port has had it
        self._header = bytearray(HEADER.size)  # of what comes
        for each in (out, into):
            each.setblocking(False)

    def push(self) -> bool:
        moved = False
        while self.outgoing:
            parcel = self.outgoing[0]
            if not self._give(parcel):
                break
            moved = True
            if parcel.moved == parcel.size + HEADER.size:
                parcel.over = True
                self.outgoing.popleft()
        return moved

    def _give(self, parcel: Parcel) -> bool:
        """What can be sent of it now; False if nothing can."""
        if parcel is not self._begun:
            self._begun, due = parcel, self._pacing.leaves(HEADER.size + parcel.size)
            self._sending = HEADER.pack(parcel.size, due)
        try:
            parcel.moved += tls.send(self._out, _rest(memoryview(self._sending), parcel))
        except tls.WAITS:
            return False
        except OSError:
            raise self.gone() from None
        return True

    def pull(self) -> bool:
        moved = False
        while self.incoming:
            parcel = self.incoming[0]
            if parcel.moved < parcel.size + HEADER.size:
                if not self._take(parcel):
                    break
            elif self._held():
                break
            else:
                parcel.over = True
                self.incoming.popleft()
            moved = True
        return moved

    def _take(self, parcel: Parcel) -> bool:
        """What has come of it; False if nothing has."""
        headed = parcel.moved >= HEADER.size
        try:
            count = tls.receive(self._in, _rest(memoryview(self._header), parcel))
        except tls.WAITS:
            return False
        except OSError:
            raise self.gone() from None
        if not count:
            raise self.gone()
        parcel.moved += count
        if not headed and parcel.moved >= HEADER.size:
            self._begin(parcel, *HEADER.unpack(self._header))
        return True

    def _begin(self, parcel: Parcel, size: int, due: float) -> None:
        self.demand_size(parcel, size)
        self._due, self._through = due, False

    def _held(self) -> float:
        """Seconds until what is here may be had; 0 if it may."""
        if not self._due:
            return 0.0
        seconds = self._due - time.monotonic()
        if seconds <= 0 and not self._through:
            self._through = True  # not sooner: this rank's port takes what comes in the order of its coming
            self._due = self._pacing.arrives(self._due, self.incoming[0].moved)
            seconds = self._due - time.monotonic()
        return max(0.0, seconds)

    def arm(self, poll: select.poll) -> float:
        if self.outgoing:
            poll.register(self._out, select.POLLOUT)
        if not self.incoming:
            return LOOK
        if self.incoming[0].moved == self.incoming[0].size + HEADER.size:
            return min(LOOK, self._held())
        if tls.pending(self._in):
            return 0.0
        poll.register(self._in, select.POLLIN)
        return LOOK

    def close(self) -> None:
        self._out.close()
        self._in.close()


def _rest(header: memoryview, parcel: Parcel) -> list[memoryview]:
    """What is left of both."""
    if parcel.data is None:
        parcel.data = memoryview(parcel.tensor.view(torch.uint8).numpy().data).cast("B")
    moved = parcel.moved
    return [header[moved:], parcel.data] if moved < HEADER.size else [parcel.data[moved - HEADER.size :]]
