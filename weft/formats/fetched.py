"""Files of a model that another machine has: what of them is read here comes from there, once, and is kept.

Files are as large as there, and mostly holes. A part that is here is in a journal beside them, so that a fetch that was
interrupted goes on where it was, and another share of the model fetches only what it lacks. Knows files and a callback;
knows nothing of how bytes travel, or of what is in them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
from platformdirs import user_cache_path

from weft.errors import InputError
from weft.formats.fingerprint import MOST_RUNS, Wanted, WeightFile

PIECE = 4 << 20  # bytes that are asked for at a time
JOURNAL = "here.txt"


Fetch = Callable[[Wanted], bytes]  # brings all of them, one run behind the other


class FetchedFiles:
    """`files`: as the other machine has them, which are then in `directory`. Raises `InputError` for a disk that can't
    take them."""

    def __init__(self, files: Sequence[WeightFile], fetch: Fetch, cache: Path | None = None) -> None:
        name = hashlib.sha256(msgspec.json.encode(files)).hexdigest()[:20]
        self.directory = (cache or user_cache_path("weft") / "checkpoints") / name
        if any(Path(file.name).name != file.name for file in files):
            raise InputError("the engine's machine names files that are none of a directory")
        self._fetch, self._journal = fetch, self.directory / JOURNAL
        self._lock: BinaryIO | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # another rank of this machine may be fetching
            self._here = set(self._journal.read_text("utf-8").splitlines()) if self._journal.is_file() else set()
            for file in files:
                path = self.directory / file.name
                if not (path.is_file() and path.stat().st_size == file.size):
                    self._begin(path, file)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise self._full(error) from None
            raise

    def _full(self, error: OSError) -> InputError:
        return InputError(f"{self.directory} can't hold the fetched weights ({error.strerror})")

    def _begin(self, path: Path, file: WeightFile) -> None:
        """Makes a file of the right size with its header."""
        header = b"".join(map(self._fetch, _pieces(Wanted(file.name, 0, file.before, file.before, 1))))
        if hashlib.sha256(header).hexdigest() != file.header:
            raise InputError(f"{file.name} has changed on the engine's machine; start again")
        with path.with_suffix(".new").open("wb") as made:
            made.write(header)
            made.truncate(file.size)
        self._here = {line for line in self._here if not line.startswith(f"{file.name} ")}
        self._journal.write_text("".join(f"{line}\n" for line in self._here), "utf-8")  # before it is believed
        path.with_suffix(".new").replace(path)

    def close(self) -> None:
        """Lets other ranks of this machine fetch."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def bring(self, wanted: Wanted) -> None:
        """Sees that those bytes are here."""
        if (line := " ".join(map(str, wanted))) in self._here or not wanted.length * wanted.times:
            return
        try:
            with (self.directory / wanted.file).open("r+b") as file:
                for part in _pieces(wanted):
                    _write(file, part, memoryview(self._fetch(part)))
                file.flush()
                os.fsync(file.fileno())  # before the journal says so
            self._here.add(line)
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(line + "\n")
        except OSError as error:
            raise self._full(error) from None


def _write(file: BinaryIO, part: Wanted, data: memoryview) -> None:
    if len(data) != part.length * part.times:
        raise InputError(f"the engine's machine sent {len(data)} bytes of {part.file} where {part} was asked for")
    for number in range(part.times):
        file.seek(part.start + number * part.stride)
        file.write(data[number * part.length : (number + 1) * part.length])


def _pieces(wanted: Wanted) -> list[Wanted]:
    """The same in parts that are not too large to be asked for."""
    if wanted.times > 1:
        many = min(max(1, PIECE // wanted.length), MOST_RUNS)
        return [
            wanted._replace(start=wanted.start + first * wanted.stride, times=min(many, wanted.times - first))
            for first in range(0, wanted.times, many)
        ]
    return [
        wanted._replace(start=wanted.start + first, length=(length := min(PIECE, wanted.length - first)), stride=length)
        for first in range(0, wanted.length, PIECE)
    ]
