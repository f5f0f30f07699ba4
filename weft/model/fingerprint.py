"""Whether two machines hold the same weights: names, sizes, headers and samples of their files, and on request all.

A header names every tensor with its type, shape and place: so checkpoints of other shapes differ there. Those of one
shape differ in their numbers, of which samples from all over a file are compared. Knows files; knows nothing of
tensors. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
from msgspec.structs import replace

from weft.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100 << 20  # bytes, as safetensors itself has it
MOST_RUNS = 1 << 20
LARGEST = 128 << 20  # bytes that may be asked for at once: a header, or a piece
CHUNK = 1 << 20
TOLD = {"header": "tensors", "samples": "numbers", "content": "numbers"}  # what differs where that does
SAMPLES, SAMPLE = 64, 4096  # how many, of so many bytes


class WeightFile(msgspec.Struct, frozen=True):
    """One file. SHA-256 in hexadecimal: `header`, `samples` of the rest, and `content`, which is empty where nobody
    asked for it."""

    name: str
    size: int
    header: str
    samples: str
    content: str = ""


class Held(msgspec.Struct, frozen=True):
    """Where the engine's machine has a checkpoint, and its files."""

    directory: str
    files: list[WeightFile]


def terms_of(held: Held) -> bytes:
    """For `agree`, on another machine. Files are not compared whole before they are loaded, as that takes long."""
    files = [replace(file, content="") for file in held.files]
    return msgspec.msgpack.encode(Held(held.directory, files))


def agree(terms: bytes, given: str | None) -> str:
    """How this machine comes by the model, in words. `given`: its directory, if one was named. Raises `InputError`."""
    directory = held_here(msgspec.msgpack.decode(terms, type=Held), given)
    if directory is None:
        return "no directory of the model here: what is missing of this machine's part comes from the server's, once"
    return f"the model in {directory} is the server's, by its files' sizes, headers and samples"


class Wanted(NamedTuple):
    """Bytes of a file: `times` runs of `length`, one beginning `stride` after the other, from `start` on."""

    file: str
    start: int
    length: int
    stride: int
    times: int


def weight_files(directory: Path) -> list[str]:
    """The files that the index names; without one that can be read, the only one. Others hold the same once more."""
    if not os.path.isfile(directory / SINGLE):  # first, as in transformers
        try:
            named = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"].values()
            return sorted({str(name) for name in named})
        # What is wrong with it, its reader says.
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
    return [SINGLE]


def fingerprint(directory: Path, content: bool = False, tick: Callable[[], None] = lambda: None) -> list[WeightFile]:
    """Of all weights of a checkpoint. `tick` is called again and again meanwhile. Raises `InputError` for a file that
    can't be read."""
    return [_of(directory / name, content, tick) for name in weight_files(directory)]


class Fingerprints:
    """The last one, as long as no file changes: whole files take long to compare."""

    def __init__(self) -> None:
        self._key: object = None
        self._files: list[WeightFile] = []

    def of(self, directory: Path, content: bool, tick: Callable[[], None]) -> list[WeightFile]:
        """See `fingerprint`."""
        key = directory, content, [_stamp(directory / name) for name in weight_files(directory)]
        if key != self._key:
            self._files = fingerprint(directory, content, tick)
            self._key = key
        return self._files


def _stamp(path: Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None  # its reader says why
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def held_here(held: Held, given: str | None) -> Path | None:
    """The directory from which another machine reads the same: the one that it was `given`, or the one of that name;
    None: it has none, and fetches its part. Raises `InputError` if that is another checkpoint, or none."""
    directory = Path(given or held.directory)
    if os.path.isdir(directory):  # False also for one that this user may not look into
        demand_same(directory, held.files)
        return directory
    if given or not held.files:
        raise InputError(
            f"{socket.gethostname()} has no directory {directory}; say where it is, as in weft worker MODEL, or leave "
            "that out: then it comes from the engine's machine"
        )
    return None


def demand_same(directory: Path, files: Sequence[WeightFile]) -> None:
    """Raises `InputError` that names the first file of a directory that is not as another machine has it."""
    for file in files:
        if Path(file.name).name != file.name:
            raise InputError(f"the engine's machine names {file.name!r}, which is no file of a directory")
    here, there = weight_files(directory), [file.name for file in files]
    if files and here != there and os.path.isfile(directory / here[0]):
        raise InputError(
            f"{directory} would be read from {here[0]}, and the engine's machine has {there[0]}; copy that"
        )
    for file in files:
        _demand_equal(directory / file.name, file)


def _demand_equal(path: Path, file: WeightFile) -> None:
    if not os.path.isfile(path):
        raise InputError(f"{path} is missing here, or can't be read; the engine's machine has it: copy it")
    own = _of(path, bool(file.content))
    parts = ("size", "header", "samples", "content")
    what = next((name for name in parts if getattr(own, name) != getattr(file, name)), None)
    if what is not None:
        told = f"{own.size} bytes here, {file.size} there" if what == "size" else f"other {TOLD[what]}"
        raise InputError(f"{path} is not the file that the engine's machine has ({told}); copy that one")


def cut_out(directory: Path, files: Sequence[WeightFile], wanted: Wanted) -> bytes:
    """The other side: these bytes of one of the files. Raises `LookupError` for any that are not in it."""
    size = next((file.size for file in files if file.name == wanted.file), 0)
    last = wanted.start + (wanted.times - 1) * wanted.stride + wanted.length
    whole, least = wanted.length * wanted.times, min(wanted.start, wanted.length - 1, wanted.stride, wanted.times - 1)
    if least < 0 or wanted.times > MOST_RUNS or last > size or whole > LARGEST:
        raise LookupError(f"a rank asked for bytes {wanted.start} to {last} of {wanted.file!r}, which isn't there")
    with (directory / wanted.file).open("rb") as file:
        data = b"".join(_run(file, wanted, number) for number in range(wanted.times))
    if len(data) != whole:
        raise InputError(f"{directory / wanted.file} became shorter while it was read")
    return data


def _run(file: BinaryIO, wanted: Wanted, number: int) -> bytes:
    file.seek(wanted.start + number * wanted.stride)
    return file.read(wanted.length)


def _of(path: Path, content: bool, tick: Callable[[], None] = lambda: None) -> WeightFile:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, LONGEST_HEADER):
                raise InputError(f"{path} is truncated or corrupt; download the file again")
            header = hashlib.sha256(file.read(length)).hexdigest()
            samples = _sampled(file, 8 + length, size, tick)
            whole = _hashed(file, tick) if content else ""
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    return WeightFile(path.name, size, header, samples, whole)


def _sampled(file: BinaryIO, start: int, stop: int, tick: Callable[[], None]) -> str:
    samples = hashlib.sha256()
    for number in range(SAMPLES):
        tick()
        file.seek(start + (stop - start) * number // SAMPLES)
        samples.update(file.read(SAMPLE))
    return samples.hexdigest()


def _hashed(file: BinaryIO, tick: Callable[[], None]) -> str:
    whole = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK):
        tick()
        whole.update(chunk)
    return whole.hexdigest()
