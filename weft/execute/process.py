"""What a worker asks of its operating system: memory, cores, and an end together with its launcher.

Every function falls back to doing nothing where the system doesn't have what it needs. Knows processes; knows
nothing of models or messages.
"""

from __future__ import annotations

import ctypes
import os
import threading

import psutil


def pin(cores: list[int]) -> None:
    """Keeps every thread of this process to these cores."""
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):  # threads that exist already have a set of their own
            os.sched_setaffinity(int(thread), cores)


def _memory() -> int:
    """Bytes of this process that no file backs: what it takes from others."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


class Peak:
    """The highest memory of this process while the block runs, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.before = self.highest = _memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="weft-peak", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.highest = max(self.highest, _memory())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def taken(self) -> int:
        """Bytes beyond what there was at the beginning."""
        return self.highest - self.before


def give_back_freed_memory() -> None:
    """Has glibc return freed blocks to the system at once: while loading, matrices come and go.

    Else it keeps them for later blocks of the same size, and a third more than the weights stays taken.
    """
    _tune_malloc(mmap_threshold=128 << 10, trim_threshold=128 << 10)


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks of up to 32 MiB for the next allocation: while running, activations come and go.

    Giving them back each time would cost a page fault for every 4 KiB of the next one.
    """
    _tune_malloc(mmap_threshold=32 << 20, trim_threshold=1 << 30)


def _tune_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD, at most 32 MiB
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library
        return


def end_with_launcher() -> None:
    """Ends this process when its launcher is gone, however that died: the pipe that it held then closes."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="weft-lease", daemon=True).start()
