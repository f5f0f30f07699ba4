"""A checkpoint that another machine has: what of it is read here comes from there, once, and is kept.

Files are as large as there, and mostly holes. A part that is here is in a journal beside them, so that a fetch that was
interrupted goes on where it was, and another share of the model fetches only what it lacks. Knows files and a callback;
knows nothing of how bytes travel.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from platformdirs import user_cache_path

from weft.errors import InputError
from weft.model.checkpoint import Checkpoint
from weft.model.fingerprint import MOST_RUNS, Wanted, WeightFile

PIECE = 4 << 20  # bytes that are asked for at a time
JOURNAL = "here.txt"
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
          "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip


Fetch = Callable[[Wanted], bytes]  # brings all of them, one run behind the other


class FetchedCheckpoint(Checkpoint):
    """`files`: as the other machine has them. Raises `InputError` for a disk that can't take them."""

    def __init__(self, files: Sequence[WeightFile], fetch: Fetch, cache: Path | None = None) -> None:
        name = hashlib.sha256(msgspec.json.encode(files)).hexdigest()[:20]
        directory = (cache or user_cache_path("weft") / "checkpoints") / name
        if any(Path(file.name).name != file.name for file in files):
            raise InputError("the engine's machine names files that are none of a directory")
        self._fetch, self._journal = fetch, directory / JOURNAL
        self._lock: BinaryIO | None = None
        self._tensors: dict[str, tuple[str, int, dict[str, Any]]] = {}  # file, where its tensors begin, what it says
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # another rank of this machine may be fetching
            self._here = set(self._journal.read_text("utf-8").splitlines()) if self._journal.is_file() else set()
            for file in files:
                self._headed(directory / file.name, file)
            super().__init__(directory)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise InputError(f"{directory} can't hold the fetched weights ({error.strerror})") from None
            raise

    def _find(self) -> dict[str, Path]:
        return {tensor: self.directory / file for tensor, (file, _, _) in self._tensors.items()}

    def _headed(self, path: Path, file: WeightFile) -> None:
        """Makes a file of the right size with its header, and reads that."""
        if not (path.is_file() and path.stat().st_size == file.size):
            self._begin(path, file)
        with path.open("rb") as there:
            length = int.from_bytes(there.read(8), "little")
            said = json.loads(there.read(length))
        for name, what in said.items():
            if name != "__metadata__":
                self._tensors[name] = (file.name, 8 + length, what)

    def _begin(self, path: Path, file: WeightFile) -> None:
        length = int.from_bytes(self._fetch(Wanted(file.name, 0, 8, 8, 1)), "little")
        header = self._fetch(Wanted(file.name, 8, length, length, 1))
        if hashlib.sha256(header).hexdigest() != file.header:
            raise InputError(f"{file.name} has changed on the engine's machine; start again")
        with path.with_suffix(".new").open("wb") as made:
            made.write(length.to_bytes(8, "little") + header)
            made.truncate(file.size)
        self._here = {line for line in self._here if not line.startswith(f"{file.name} ")}
        self._journal.write_text("".join(f"{line}\n" for line in self._here), "utf-8")  # before it is believed
        path.with_suffix(".new").replace(path)

    def close(self) -> None:
        """Closes the mapped file, and lets other ranks of this machine fetch."""
        self.forget()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor:
        """See `Checkpoint`; what isn't here comes first."""
        if name in self:
            self._bring(self._wanted(self._stored(name), rows, columns))
        return super().read(name, rows, columns)

    def _wanted(self, stored: str, rows: range | None, columns: range | None) -> Wanted:
        """Where those parts of a tensor are. What this can't tell is taken whole."""
        file, first, what = self._tensors[stored]
        begin, end = what["data_offsets"]
        start, size, shape, element = first + begin, end - begin, what["shape"], _BYTES.get(what["dtype"], 0)
        if size and rows is not None:
            row = size // shape[0]
            return Wanted(file, start + rows.start * row, len(rows) * row, len(rows) * row, 1)
        if size and columns is not None and len(shape) == 2 and element:
            return Wanted(file, start + columns.start * element, len(columns) * element, shape[1] * element, shape[0])
        return Wanted(file, start, size, size, 1)

    def _bring(self, wanted: Wanted) -> None:
        if (line := " ".join(map(str, wanted))) in self._here or not wanted.length * wanted.times:
            return
        self.forget()  # a file that is mapped need not show what is written then
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
            raise InputError(f"{self.directory} can't hold the fetched weights ({error.strerror})") from None


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
