"""What a worker asks of its operating system: memory, cores, and an end together with its launcher.

Every function falls back to doing nothing where the system doesn't have what it needs. Knows processes; knows
nothing of models or messages.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # what version 1 writes where there is none is a little above
BOOT = Path("/proc/sys/kernel/random/boot_id")


def pin(cores: list[int]) -> None:
    """Keeps every thread of this process to these cores."""
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):  # threads that exist already have a set of their own
            os.sched_setaffinity(int(thread), cores)


def settle(cores: list[int], others: set[int]) -> None:
    """Moves this thread to one of these cores if it is on one of the others, which are for ranks beside it, and leaves
    it free to go. Ranks that a message woke on one core would take turns there for some ten milliseconds, until the
    system parts them: docs/log.md."""
    if cores and _core() in others:
        allowed = os.sched_getaffinity(0)
        with suppress(OSError):  # somebody has taken them away
            os.sched_setaffinity(0, cores)
            os.sched_setaffinity(0, allowed)


def own_cores(before: int, threads: int) -> list[int]:
    """Of those that this process may use, the ones of a rank before which so many others come."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[before * threads : (before + 1) * threads]


def _core() -> int:
    """Where this thread runs; -1 where the system doesn't say."""
    try:
        return int(_libc().sched_getcpu())
    except (OSError, AttributeError):
        return -1


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def free_memory(own: Path = OWN_GROUPS, groups: Path = GROUPS) -> int:
    """Bytes that this process may still take: what the machine has free, and what the limits of its control groups,
    a container's say, leave of it. Files that are only cached count as free."""
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(left for _, left in _left(own, groups))]))


def machine_name(own: Path = OWN_GROUPS, groups: Path = GROUPS) -> str:
    """Equal for processes that take their memory from the same: a machine, or the outermost group with a limit."""
    boot = BOOT.read_text("ascii").strip() if BOOT.is_file() else ""
    limited = [str(level) for level, _ in _left(own, groups)]
    return " ".join([socket.gethostname(), boot, *limited[-1:]])


def _memory_group(own: Path) -> tuple[str, str]:
    """The hierarchy, "memory" (version 1) or "" (version 2), and the group's path in it."""
    lines = own.read_text("utf-8").splitlines() if own.is_file() else []
    entries = {name: path for _, name, path in (line.split(":", 2) for line in lines)}
    name = next((name for name in entries if "memory" in name.split(",")), "")
    return ("memory" if name else "", entries.get(name, "/"))


def _left(own: Path, groups: Path) -> Iterator[tuple[Path, int]]:
    """Each group with a limit that this process is in, the innermost first, and the bytes that are left of it."""
    version, path = _memory_group(own)
    root = groups / version
    limit, used, stat, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file") if version
        else ("memory.max", "memory.current", "memory.stat", "inactive_file")
    )  # fmt: skip
    group = root / path.lstrip("/")
    if not group.is_dir():  # a container sees its own group as the root, whatever its path says
        group = root
    for level in (group, *group.parents):
        if not level.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # no limit: the file is missing, or says max
            most, taken = (int((level / name).read_text("ascii")) for name in (limit, used))
            if most < NO_LIMIT:
                yield level, most - taken + _cached(level / stat, cached)


def _cached(stat: Path, name: str) -> int:
    """Bytes of a group that are files only, which the system gives back; 0 where it doesn't say."""
    with suppress(OSError, ValueError):
        return int(dict(line.split() for line in stat.read_text("ascii").splitlines()).get(name, 0))
    return 0


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
