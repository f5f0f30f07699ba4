"""Messages over TCP: one connection for what is sent and one for what is received.

Two because sending and receiving on one hold its lock, and are slower by half for large messages. Each message goes
with a header: its bytes, and when it may be had, where the link is paced. Knows sockets; knows nothing of who is on the
other side.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING

import torch

from weft.parallel.channel import LOOK, Channel, Pump

if TYPE_CHECKING:
    from torch import Tensor

HEADER = struct.Struct("<Qd")  # a message's bytes, and when it may be had (seconds, monotonic; 0: at once)


class StreamChannel(Channel):
    """`out`, `into`: connected to the peer."""

    def __init__(self, peer: int, pump: Pump, out: socket.socket, into: socket.socket) -> None:
        super().__init__(peer, pump)
        self._out, self._in = out, into
        self._header = bytearray(HEADER.size)  # of what comes
        for each in (out, into):
            each.setblocking(False)

    def push(self) -> bool:
        moved = False
        while self.outgoing:
            message = self.outgoing[0]
            header, data = HEADER.pack(message.size, 0.0), _bytes_of(message.tensor)
            try:
                count = self._out.sendmsg(_rest(memoryview(header), data, message.moved))
            except BlockingIOError:
                break
            except OSError:
                raise self.gone() from None
            moved = True
            message.moved += count
            if message.moved == message.size + HEADER.size:
                message.over = True
                self.outgoing.popleft()
        return moved

    def pull(self) -> bool:
        moved = False
        while self.incoming:
            message = self.incoming[0]
            header, data = memoryview(self._header), _bytes_of(message.tensor)
            try:
                count = self._in.recvmsg_into(_rest(header, data, message.moved))[0]
            except BlockingIOError:
                break
            except OSError:
                raise self.gone() from None
            if not count:
                raise self.gone()
            moved = True
            message.moved += count
            if message.moved >= HEADER.size:
                self.demand_size(message, HEADER.unpack(self._header)[0])
            if message.moved == message.size + HEADER.size:
                message.over = True
                self.incoming.popleft()
        return moved

    def arm(self, poll: select.poll) -> float:
        if self.incoming:
            poll.register(self._in, select.POLLIN)
        if self.outgoing:
            poll.register(self._out, select.POLLOUT)
        return LOOK

    def close(self) -> None:
        self._out.close()
        self._in.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


def _rest(header: memoryview, data: memoryview, moved: int) -> list[memoryview]:
    """What is left of both."""
    if moved < HEADER.size:
        return [header[moved:], data]
    return [data[moved - HEADER.size :]]
