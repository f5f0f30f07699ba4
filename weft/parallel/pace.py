"""A link that is slower, and longer, than the one that is there: token buckets and a delay line, without privileges.

Nothing is held back where it is sent. Each message says when it may be had, by a clock that all ranks of this machine
read, and who receives it waits until then: so bytes cost what they cost on any link, and a second thread isn't needed.
Bytes are counted as Ethernet would carry them. What a rank sends shares one bucket, whatever the lane, and what it
receives another one; a shared link has one for all ranks, in memory that they map. Knows bytes and seconds; knows
nothing of what they mean. No torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time
from _thread import allocate_lock
from contextlib import suppress

from weft.links import BURST

SEGMENT = 1448  # bytes of a TCP segment with timestamps
HEADERS = 66  # Ethernet, IPv4, TCP and its timestamps
_IDLE = struct.Struct("<d")
_PR_SET_TIMERSLACK = 29


def on_the_wire(size: int) -> int:
    """Bytes of a message with the headers of its packets."""
    return size + HEADERS * -(-size // SEGMENT)


class Bucket:
    """Of `rate` bytes a second: what has passed. It is full, and lets BURST bytes by at once, `idle` seconds on."""

    def __init__(self, rate: float, shared: str = "") -> None:
        self.rate, self._idle, self._lock = rate, 0.0, allocate_lock()
        self._map: mmap.mmap | None = None
        if shared:  # by all ranks that map this file
            self._file = os.open(shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, mmap.PAGESIZE)
            self._map = mmap.mmap(self._file, mmap.PAGESIZE)

    def passes(self, size: int, first: float, last: float) -> float:
        """When so many bytes have passed, of which the first one comes then, and the last one then."""
        with self._lock:
            if self._map is None:
                self._idle = idle = max(self._idle, first) + size / self.rate
            else:
                fcntl.flock(self._file, fcntl.LOCK_EX)
                before: float = _IDLE.unpack_from(self._map)[0]
                idle = max(before, first) + size / self.rate
                _IDLE.pack_into(self._map, 0, idle)
                fcntl.flock(self._file, fcntl.LOCK_UN)
            return max(last, idle - BURST / self.rate)

    def close(self) -> None:
        """Lets go of what is shared."""
        if self._map is not None:
            self._map.close()
            os.close(self._file)
            self._map = None


class Pace:
    """Of one rank's port. `rate`: bits a second each way, or None; `delay`: seconds; `shared`: a file that all ranks
    map, for a link whose rate they share."""

    def __init__(self, rate: float | None, delay: float, shared: str = "") -> None:
        self._delay = delay
        self._out = Bucket(rate / 8, shared) if rate is not None else None
        self._in = Bucket(rate / 8) if rate is not None and not shared else None

    def leaves(self, size: int) -> float:
        """When a message that is sent now may be had: seconds, monotonic."""
        now = time.monotonic()
        return (self._out.passes(on_the_wire(size), now, now) if self._out is not None else now) + self._delay

    def arrives(self, due: float, size: int) -> float:
        """The same, once it has gone through this port, with what others sent."""
        if self._in is None:
            return due
        size = on_the_wire(size)
        return self._in.passes(size, due - size / self._in.rate, due)

    def close(self) -> None:
        """Lets go of what is shared."""
        if self._out is not None:
            self._out.close()


class Pacing:
    """The pace of a transport's channels, which may change."""

    def __init__(self) -> None:
        self._pace: Pace | None = None

    def by(self, pace: Pace | None) -> None:
        """From now on."""
        if self._pace is not None:
            self._pace.close()
        self._pace = pace

    def leaves(self, size: int) -> float:
        """See `Pace`; 0: at once."""
        return self._pace.leaves(size) if self._pace is not None else 0.0

    def arrives(self, due: float, size: int) -> float:
        """See `Pace`."""
        return self._pace.arrives(due, size) if self._pace is not None and due else due


def wake_on_time() -> None:
    """Has the system wake this thread within microseconds of when it asks to be: usually it takes 50 more."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
