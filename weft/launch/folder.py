"""Folders of engines under the temporary directory, and what a killed engine has left of them.

A folder's lock is held by the process that owns it, however that ends; so it tells, also between containers, whose
process numbers mean nothing to each other. Knows files; knows nothing of what is kept in them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "weft-engine-"
LOCK = "lock"


class Folder:
    """One of this process's own, readable by its user only. Removes those whose owner is gone."""

    def __init__(self) -> None:
        remove_leftovers()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Locked before it has its name: nobody can find it without an owner.
        self._lock = os.open(self.path / f"{LOCK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / f"{LOCK}.new").rename(self.path / LOCK)

    def remove(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_leftovers() -> None:
    """Removes this user's folders whose owner was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                with _abandoned(folder / LOCK) as abandoned:
                    if abandoned:
                        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _abandoned(lock: Path) -> Iterator[bool]:
    """Whether nobody holds it."""
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
