"""What a checkpoint's files hold, as one hash: found once, and remembered for as long as no file changes.

Knows files; knows nothing of tensors. No torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from weft.errors import InputError
from weft.formats.fingerprint import weight_files
from weft.locks import locked

MOST = 1000  # files that are remembered


class _Hashed(msgspec.Struct, frozen=True):
    """A file as it was when it was hashed."""

    path: str
    device: int
    inode: int
    size: int
    modified: int  # in nanoseconds
    hash: str


def content_of(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The hash of all weights of a checkpoint, whatever it is called and wherever it is. Who asks for one that is being
    found waits for it. `progress(done, total)` is called in bytes. Raises `InputError` for a file that can't be read.
    """
    folder, total, done = user_cache_path("weft"), 0, 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    with locked(folder / f"{combined([str(path.resolve())])[:20]}.lock"):
        known, found = _recall(folder), []
        before = {msgspec.structs.replace(each, hash=""): each for each in known}
        now = [_stamp(file) for file in weight_files(path)]
        total = sum(each.size for each in now if each not in before)
        for each in now:
            found.append(before.get(each) or msgspec.structs.replace(each, hash=_hash_of(Path(each.path), tick)))
        if fresh := [each for each in found if each not in known]:
            paths = {each.path for each in fresh}
            _keep(folder, [*(each for each in known if each.path not in paths), *fresh])
    return combined([each.hash for each in found])


def combined(parts: Sequence[str]) -> str:
    """One hash of many texts."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _stamp(path: Path) -> _Hashed:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    return _Hashed(str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, "")


def _hash_of(path: Path, tick: Callable[[int], None]) -> str:
    hashed = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                tick(len(chunk))
                hashed.update(chunk)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    return hashed.hexdigest()


def _recall(folder: Path) -> list[_Hashed]:
    with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode((folder / "hashes.json").read_bytes(), type=list[_Hashed])
    return []


def _keep(folder: Path, hashes: list[_Hashed]) -> None:
    """Where that can't be written, the next start hashes again."""
    with suppress(OSError):
        fresh = folder / f"hashes.{os.getpid()}"
        fresh.write_bytes(msgspec.json.encode(hashes[-MOST:]))
        fresh.replace(folder / "hashes.json")
