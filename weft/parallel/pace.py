"""A link that is slower, and longer, than the one that is there: a token bucket and a delay line, without privileges.

Nothing is held back where it is sent. Each message says when it may be had, by a clock that all ranks of this machine
read, and who receives it waits until then: so bytes cost what they cost on any link, and a second thread isn't needed.
Bytes are counted as Ethernet would carry them. What a rank sends shares one bucket, whatever the lane; a shared link
has one for all ranks, in memory that they map. Knows bytes and seconds; knows nothing of what they mean. No torch.
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


class Pace:
    """Of one rank's sending. `rate`: bits a second, or None; `delay`: seconds; `shared`: a file that all ranks map, for
    a link whose rate they share."""

    def __init__(self, rate: float | None, delay: float, shared: str = "") -> None:
        self._second = rate / 8 if rate is not None else None  # bytes of one
        self._delay, self._lock = delay, allocate_lock()
        self._idle = 0.0  # when the bucket is full again, if nothing more is sent
        self._map: mmap.mmap | None = None
        if shared:
            self._file = os.open(shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, mmap.PAGESIZE)
            self._map = mmap.mmap(self._file, mmap.PAGESIZE)

    def due(self, size: int) -> float:
        """When a message that is sent now may be had: seconds, monotonic."""
        with self._lock:
            now = time.monotonic()
            if self._second is None:
                return now + self._delay
            if self._map is None:
                self._idle = leaves = self._filled(self._idle, now, size)
            else:
                fcntl.flock(self._file, fcntl.LOCK_EX)
                leaves = self._filled(_IDLE.unpack_from(self._map)[0], now, size)
                _IDLE.pack_into(self._map, 0, leaves)
                fcntl.flock(self._file, fcntl.LOCK_UN)
            return max(now, leaves - BURST / self._second) + self._delay

    def _filled(self, idle: float, now: float, size: int) -> float:
        assert self._second is not None
        return max(idle, now) + on_the_wire(size) / self._second

    def close(self) -> None:
        """Lets go of what is shared."""
        if self._map is not None:
            self._map.close()
            os.close(self._file)
            self._map = None


def wake_on_time() -> None:
    """Has the system wake this thread within microseconds of when it asks to be: usually it takes 50 more."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
