"""Messages through memory that two ranks of one machine share.

Each direction is a ring of bytes with two counters: its writer counts what it wrote, its reader what it has taken. Who
finds nothing to do says that it sleeps, and is woken by a byte on a socket, whose end also tells that the peer has
ended. The memory has no name, belongs to this user alone, and is allocated before it is used: a full system says so
there, and not with a signal later. Knows memory and counters; knows nothing of who is on the other side. No torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import select
import socket
import struct
import tempfile
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from weft.errors import InputError
from weft.parallel.channel import LOOK, Channel, Parcel, Pump

if TYPE_CHECKING:
    from torch import Tensor

RING = 1 << 20  # bytes of one direction, a power of two
SPINS = 4000  # looks at a counter before all that is under way is looked at: some 100 µs
PIECE = 1 << 16  # bytes after which the other side may go on
CONTROL = 512  # bytes before a ring's data: its counters, each in a cache line of its own
WRITTEN, TAKEN, READER_SLEEPS, WRITER_SLEEPS = 0, 16, 32, 48  # counters' places, in words of 8 bytes
HEADER = struct.Struct("<Q8x")  # before each message: its bytes; where it begins there is room for it in one piece
REGION = 2 * (CONTROL + RING)
SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, _SHRINK, _GROW: nobody can take pages away under the other

_memmove = ctypes.memmove


def _fence_of_this_processor() -> threading.Lock | None:
    """Where a lock's compare-and-swap is a full barrier and stores and loads keep their order otherwise."""
    return threading.Lock() if platform.machine().lower() in ("x86_64", "amd64") else None


_lock = _fence_of_this_processor()
available = _lock is not None and hasattr(socket, "SCM_RIGHTS")


def _fence() -> None:
    """What was stored before is seen before what is loaded after."""
    assert _lock is not None, "shared memory was used on a processor whose order isn't known"
    _lock.acquire()
    _lock.release()


def new_region() -> int:
    """Memory for both directions, as a file descriptor. Raises `InputError` if there is none."""
    handle = _nameless()
    try:
        os.fchmod(handle, 0o600)
        os.posix_fallocate(handle, 0, REGION)
        if hasattr(os, "memfd_create"):
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(handle)
        raise InputError(
            f"there is no {REGION >> 20} MiB of memory for two ranks to share ({error.strerror}); give --transport tcp"
        ) from None
    return handle


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("weft", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def sound(handle: int) -> bool:
    """Whether what another rank gave is such memory."""
    try:
        sealed = not hasattr(os, "memfd_create") or fcntl.fcntl(handle, fcntl.F_GET_SEALS) == SEALS
        return sealed and os.fstat(handle).st_size == REGION
    except OSError:
        return False


class _Ring:
    """One direction, as one of its sides sees it. `at`: bytes that this side has written or taken."""

    __slots__ = ("at", "data", "view", "words")

    def __init__(self, region: mmap.mmap, start: int) -> None:
        self.words = memoryview(region)[start : start + CONTROL].cast("Q")
        self.view = memoryview(region)[start + CONTROL : start + CONTROL + RING]
        self.data = ctypes.addressof(ctypes.c_char.from_buffer(region, start + CONTROL))
        self.at = 0

    def put(self, source: int, size: int) -> None:
        """Writes bytes from an address; there must be room."""
        start = self.at & (RING - 1)
        first = min(size, RING - start)
        _memmove(self.data + start, source, first)
        if first < size:
            _memmove(self.data, source + first, size - first)
        self.at += size

    def take(self, target: int, size: int) -> None:
        """Reads bytes to an address; they must be there."""
        start = self.at & (RING - 1)
        first = min(size, RING - start)
        _memmove(target, self.data + start, first)
        if first < size:
            _memmove(target + first, self.data, size - first)
        self.at += size

    def release(self) -> None:
        self.words.release()
        self.view.release()


class RingChannel(Channel):
    """Through a region that `new_region` made; `first`: of the two ranks the lower one. `bell`: wakes the other."""

    def __init__(self, peer: int, pump: Pump, handle: int, bell: socket.socket, first: bool) -> None:
        super().__init__(peer, pump)
        try:
            self._region = mmap.mmap(handle, REGION)
        finally:
            os.close(handle)
        ways = [_Ring(self._region, start) for start in (0, CONTROL + RING)]
        self._out, self._in = ways if first else ways[::-1]
        self._bell = bell
        bell.setblocking(False)
        self._ended = False

    def exchange(self, tensor: Tensor, into: Tensor) -> None:
        """As it is for a few rows, where nothing is under way: whole, at once, with no parcel made."""
        size, out, ring = tensor.nbytes, self._out, self._in
        start, whole = out.at & (RING - 1), HEADER.size + size + -size % HEADER.size
        if (
            not 0 < size == into.nbytes <= PIECE
            or RING - out.at + out.words[TAKEN] < whole
            or self.outgoing
            or self.incoming
        ):
            super().exchange(tensor, into)
            return
        HEADER.pack_into(out.view, start, size)
        address, here = tensor.data_ptr(), RING - start - HEADER.size  # until where the ring begins anew
        _memmove(out.data + start + HEADER.size, address, size if size < here else here)
        if size > here:
            _memmove(out.data, address + here, size - here)
        out.at += whole
        self._publish(out, WRITTEN, READER_SLEEPS)
        words, start, end = ring.words, ring.at & (RING - 1), ring.at + whole
        for _ in range(SPINS if self.pump.may_spin() else 0):
            if words[WRITTEN] >= end:
                break
        if words[WRITTEN] < end or HEADER.unpack_from(ring.view, start) != (size,):
            self.receive(into).wait()
            return
        address, here = into.data_ptr(), RING - start - HEADER.size
        _memmove(address, ring.data + start + HEADER.size, size if size < here else here)
        if size > here:
            _memmove(address + here, ring.data, size - here)
        ring.at = end
        if end - words[TAKEN] > RING // 4:  # what was taken need not be told before the other side wants for room
            self._publish(ring, TAKEN, WRITER_SLEEPS)

    @property
    def _room(self) -> int:
        """Bytes that may be written now."""
        return RING - (self._out.at - self._out.words[TAKEN])

    def push(self) -> bool:
        before, ring, taken = self._out.at, self._out, self._out.words[TAKEN]
        while self.outgoing:
            parcel = self.outgoing[0]
            if not parcel.moved:
                if RING - (ring.at - taken) < HEADER.size:
                    break
                self._put_header(ring, parcel)
            sent = parcel.moved - HEADER.size
            part = min(parcel.size - sent, RING - (ring.at - taken), PIECE)
            ring.put(parcel.tensor.data_ptr() + sent, part)
            parcel.moved += part
            if sent + part == parcel.size:
                ring.at += -parcel.size % HEADER.size
                parcel.over = True
                self.outgoing.popleft()
            elif not part and taken == (taken := ring.words[TAKEN]):
                break
            self._publish(ring, WRITTEN, READER_SLEEPS)
        return ring.at != before

    def pull(self) -> bool:
        before, ring, written = self._in.at, self._in, self._in.words[WRITTEN]
        while self.incoming and ring.at < written:
            parcel = self.incoming[0]
            if not parcel.moved:
                self._take_header(ring, parcel)
            come = parcel.moved - HEADER.size
            part = min(parcel.size - come, written - ring.at, PIECE)
            ring.take(parcel.tensor.data_ptr() + come, part)
            parcel.moved += part
            if come + part == parcel.size:
                ring.at += -parcel.size % HEADER.size
                parcel.over = True
                self.incoming.popleft()
            self._publish(ring, TAKEN, WRITER_SLEEPS)
            written = ring.words[WRITTEN]
        return ring.at != before

    def _take_header(self, ring: _Ring, parcel: Parcel) -> None:
        self.demand_size(parcel, *HEADER.unpack_from(ring.view, ring.at & (RING - 1)))
        ring.at += HEADER.size
        parcel.moved = HEADER.size

    def _put_header(self, ring: _Ring, parcel: Parcel) -> None:
        HEADER.pack_into(ring.view, ring.at & (RING - 1), parcel.size)
        ring.at += HEADER.size
        parcel.moved = HEADER.size

    def _publish(self, ring: _Ring, counter: int, sleeps: int) -> None:
        """Tells how far this side has come, and wakes the other one if it sleeps for that."""
        words = ring.words
        words[counter] = ring.at
        _fence()
        if words[sleeps]:
            words[sleeps] = 0  # before it is woken: what it says after that is not to be lost
            with suppress(BlockingIOError):  # it has bells enough
                try:
                    self._bell.send(b"!")
                except OSError:
                    self._ended = True

    def arm(self, poll: select.poll) -> float:
        poll.register(self._bell, select.POLLIN)
        taken, written = self._out.words[TAKEN], self._in.words[WRITTEN]
        self._in.words[READER_SLEEPS], self._out.words[WRITER_SLEEPS] = bool(self.incoming), bool(self.outgoing)
        _fence()
        same = (taken, written) == (self._out.words[TAKEN], self._in.words[WRITTEN])
        waits = not (self.outgoing and self._room >= HEADER.size) and not (self.incoming and written != self._in.at)
        return LOOK if same and waits else 0.0

    def wake(self) -> None:
        self._in.words[READER_SLEEPS] = self._out.words[WRITER_SLEEPS] = 0
        with suppress(BlockingIOError):
            try:
                self._ended = not self._bell.recv(256) or self._ended
            except ConnectionError:
                self._ended = True
        if self._ended and not (self.incoming and self.pull()):
            raise self.gone()

    def close(self) -> None:
        self._bell.close()
        for ring in (self._out, self._in):
            ring.release()
        self._region.close()
