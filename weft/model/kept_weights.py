"""Weights of few bits in the user's cache: a start that finds them there need not make them from the checkpoint again.

One file for each content of a checkpoint, part of it and way to round: tensors one after the other, an index, and the
index's length. It is written while weights are loaded, matrix after matrix, and gets its name once it is whole. Only
the user who wrote it can read it. Knows codes and files; knows nothing of checkpoints.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO

import msgspec
import torch
from platformdirs import user_cache_path
from torch import Tensor

from weft.formats.content import combined
from weft.formats.packed import Codes

FORMAT = 1  # counts what of the files, or of how weights are rounded, was given another meaning
ALIGNED = 64  # bytes on whose multiples tensors begin
FORGOTTEN = 60 * 24 * 3600.0  # seconds after which a file that was not used goes
PARTS = ("codes", "scales", "offsets")


class _Spot(msgspec.Struct, frozen=True):
    """Where a tensor is; `halves`: two numbers in a byte."""

    start: int
    dtype: str
    shape: list[int]
    halves: bool


def folder() -> Path:
    """Where they are."""
    return user_cache_path("weft") / "weights"


class KeptWeights:
    """One shard's. `key`: all that it depends on. What isn't there is `put`, and kept once all is there, if what it was
    made from then is the `same` as in the beginning."""

    def __init__(self, key: list[str], same: Callable[[], bool] = lambda: True) -> None:
        self._same = same
        self._path = folder() / f"{combined([str(FORMAT), *key])[:32]}.weights"
        self._index: dict[str, dict[str, _Spot]] = {}
        self._map: mmap.mmap | None = None
        self._fresh: BinaryIO | None = None
        self._temporary: Path | None = None
        self._over = False  # nothing is kept any more
        self._open()

    @property
    def found(self) -> bool:
        """An earlier start has left them."""
        return self._map is not None

    def _open(self) -> None:
        """What can't be read, or isn't this user's, is as if it were not there."""
        with suppress(OSError, ValueError, msgspec.MsgspecError), self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(mapped[-8:], "little")
            self._index = msgspec.json.decode(mapped[-8 - length : -8], type=dict[str, dict[str, _Spot]])
            self._map = mapped
            os.utime(self._path)

    def _create(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = mkstemp(".new", self._path.stem, self._path.parent)  # only this user may read it
        self._temporary = Path(name)
        return os.fdopen(descriptor, "wb")

    def get(self, name: str, like: Codes) -> Codes | None:
        """A weight that was kept, in the form that this one has; it lies in the file."""
        places = self._index.get(name)
        if self._map is None or not places:
            return None
        try:
            found = [self._tensor(places[part]) if part in places else None for part in PARTS]
        except (ValueError, RuntimeError, AttributeError):  # places that aren't in the file
            return None
        wanted = [like.codes, like.scales, like.offsets]
        for one, other in zip(found, wanted, strict=True):
            if (one is None) != (other is None) or (one is not None and other is not None and one.shape != other.shape):
                return None
        return Codes(*found)  # type: ignore[arg-type]

    def _tensor(self, place: _Spot) -> Tensor:
        assert self._map is not None, "there is a file"
        dtype, count = getattr(torch, place.dtype), 1
        for side in place.shape:
            count *= side
        stored = torch.frombuffer(self._map, dtype=dtype, count=count // (1 + place.halves), offset=place.start)
        if place.halves:
            stored = torch.stack([stored & 15, stored >> 4], dim=1)
        return stored.view(place.shape)

    def too_few(self, name: str) -> bool:
        """Whether this was found to lose too much in the form that was tried."""
        return self.found and self._index.get(name) == {}

    def put(self, name: str, weight: Codes | None) -> None:
        """For the next start; None for one that loses too much."""
        if self.found or self._over:
            return
        places = {}
        try:
            self._fresh = self._fresh or self._create()
            for part in PARTS if weight is not None else ():
                if (tensor := getattr(weight, part)) is not None:
                    halves = part == "codes" and weight is not None and weight.offsets is not None
                    places[part] = self._written(self._fresh, tensor, halves)
        except OSError:  # the disk is full, say
            self._give_up()
            return
        self._index[name] = places

    def _written(self, file: BinaryIO, tensor: Tensor, halves: bool) -> _Spot:
        start = -(-file.tell() // ALIGNED) * ALIGNED
        file.seek(start)
        flat = tensor.contiguous().view(-1)
        packed = flat[0::2] | flat[1::2] << 4 if halves else flat
        file.write(packed.numpy().data)
        return _Spot(start, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), halves)

    def _give_up(self) -> None:
        self._over = True
        with suppress(OSError):
            if self._fresh is not None:
                self._fresh.close()
        self._fresh = None
        with suppress(OSError):
            if self._temporary is not None:
                self._temporary.unlink()

    def close(self, whole: bool = False) -> None:
        """Lets go of the file; a new one is kept if it is `whole`."""
        self._map = None  # it is unmapped with the last tensor that lies in it
        if self._fresh is None or self._temporary is None or not (whole and self._same()):
            self._give_up()
            return
        try:
            index = msgspec.json.encode(self._index)
            self._fresh.write(index + len(index).to_bytes(8, "little"))
            self._fresh.flush()
            os.fsync(self._fresh.fileno())
            self._fresh.close()
            self._temporary.replace(self._path)
        except OSError:
            self._give_up()
        self._fresh = None
        _forget_old()


def _forget_old() -> None:
    """Files that nobody used for long, and what starts that were ended have left."""
    now = time.time()
    with suppress(OSError):
        for path in folder().iterdir():
            unused = now - path.stat().st_mtime
            if unused > FORGOTTEN or (path.suffix == ".new" and unused > 24 * 3600):
                path.unlink(missing_ok=True)
