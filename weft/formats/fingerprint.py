"""Whether two machines hold the same weights: names, sizes, headers and samples of their files, and on request all.

A header names every tensor with its type, shape and place: so checkpoints of other shapes differ there. Those of one
shape differ in their numbers, of which samples from all over a file are compared. Knows files; knows nothing of
tensors. No torch.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
from msgspec.structs import replace

from weft.errors import InputError
from weft.formats.gguf.files import is_gguf, parts_of
from weft.formats.gguf.header import header_of
from weft.formats.json_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100 << 20  # bytes, as safetensors itself has it
MOST_RUNS = 1 << 20
LARGEST = 128 << 20  # bytes that may be asked for at once: a header, or a piece
CHUNK = 1 << 20
TOLD = {"header": "tensors", "samples": "numbers", "content": "numbers"}  # what differs where that does
SAMPLES, SAMPLE = 64, 4096  # how many, of so many bytes


class WeightFile(msgspec.Struct, frozen=True):
    """One file. `before`: bytes of its header. SHA-256 in hexadecimal: `header`, `samples` of the rest, and `content`,
    which is empty where nobody asked for it."""

    name: str
    size: int
    before: int
    header: str
    samples: str
    content: str = ""


class Held(msgspec.Struct, frozen=True):
    """Where the engine's machine has a checkpoint, a directory or a .gguf file, and its files."""

    path: str
    files: list[WeightFile]


def terms_of(held: Held) -> bytes:
    """For `agree`, on another machine. Files are not compared whole before they are loaded, as that takes long."""
    files = [replace(file, content="") for file in held.files]
    return msgspec.msgpack.encode(Held(held.path, files))


def agree(terms: bytes, given: str | None) -> str:
    """How this machine comes by the model, in words. `given`: its directory, if one was named. Raises `InputError`."""
    path = held_here(msgspec.msgpack.decode(terms, type=Held), given)
    if path is None:
        return "the model is not here: what is missing of this machine's part comes from the server's, once"
    return f"the model in {path} is the server's, by its files' sizes, headers and samples"


class Wanted(NamedTuple):
    """Bytes of a file: `times` runs of `length`, one beginning `stride` after the other, from `start` on."""

    file: str
    start: int
    length: int
    stride: int
    times: int


def weight_files(path: Path) -> list[Path]:
    """All of a GGUF model; of a directory those that the index names, or without one that can be read the only one.
    Others hold the same once more."""
    if is_gguf(path):
        return parts_of(path)
    if not os.path.isfile(path / SINGLE):  # first, as in transformers
        try:
            named = read_json(path / INDEX)["weight_map"].values()
            return [path / name for name in sorted({str(name) for name in named})]
        # What is wrong with it, its reader says.
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
    return [path / SINGLE]


def fingerprint(path: Path, content: bool = False, tick: Callable[[], None] = lambda: None) -> list[WeightFile]:
    """Of all weights of a checkpoint. `tick` is called again and again meanwhile. Raises `InputError` for a file that
    can't be read."""
    return [_of(file, content, tick) for file in weight_files(path)]


class Fingerprints:
    """The last one, as long as no file changes: whole files take long to compare."""

    def __init__(self) -> None:
        self._key: object = None
        self._files: list[WeightFile] = []

    def of(self, path: Path, content: bool, tick: Callable[[], None]) -> list[WeightFile]:
        """See `fingerprint`."""
        key = path, content, [_stamp(file) for file in weight_files(path)]
        if key != self._key:
            self._files = fingerprint(path, content, tick)
            self._key = key
        return self._files


def _stamp(path: Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None  # its reader says why
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def held_here(held: Held, given: str | None) -> Path | None:
    """From where another machine reads the same: what it was `given`, or what has that name there; None: it has none,
    and fetches its part. Raises `InputError` if that is another checkpoint, or none."""
    path = Path(given or held.path)
    if os.path.isfile(path) if is_gguf(path) else os.path.isdir(path):  # False also for what this user may not see
        demand_same(path, held.files)
        return path
    if given or not held.files:
        raise InputError(
            f"{socket.gethostname()} has no {'file' if is_gguf(path) else 'directory'} {path}; say where it is, as in "
            "weft worker MODEL, or leave that out: then it comes from the engine's machine"
        )
    return None


def demand_same(path: Path, files: Sequence[WeightFile]) -> None:
    """Raises `InputError` that names the first file that is not as another machine has it."""
    for file in files:
        if Path(file.name).name != file.name:
            raise InputError(f"the engine's machine names {file.name!r}, which is no file of a directory")
    here, there = weight_files(path), [file.name for file in files]
    if files and [file.name for file in here] != there and os.path.isfile(here[0]):
        raise InputError(f"{path} would be read from {here[0].name}, and the engine's machine has {there[0]}: copy it")
    for file in files:
        _demand_equal(here[0].parent / file.name, file)


def _demand_equal(path: Path, file: WeightFile) -> None:
    if not os.path.isfile(path):
        raise InputError(f"{path} is missing here, or can't be read; the engine's machine has it: copy it")
    own = _of(path, bool(file.content))
    parts = ("size", "header", "samples", "content")
    what = next((name for name in parts if getattr(own, name) != getattr(file, name)), None)
    if what is not None:
        told = f"{own.size} bytes here, {file.size} there" if what == "size" else f"other {TOLD[what]}"
        raise InputError(f"{path} is not the file that the engine's machine has ({told}); copy that one")


def cut_out(path: Path, files: Sequence[WeightFile], wanted: Wanted) -> bytes:
    """The other side: these bytes of one of the files. Raises `LookupError` for any that are not in it."""
    size = next((file.size for file in files if file.name == wanted.file), 0)
    last = wanted.start + (wanted.times - 1) * wanted.stride + wanted.length
    whole, least = wanted.length * wanted.times, min(wanted.start, wanted.length - 1, wanted.stride, wanted.times - 1)
    if least < 0 or wanted.times > MOST_RUNS or last > size or whole > LARGEST:
        raise LookupError(f"a rank asked for bytes {wanted.start} to {last} of {wanted.file!r}, which isn't there")
    there = (path.parent if is_gguf(path) else path) / wanted.file
    with there.open("rb") as file:
        data = b"".join(_run(file, wanted, number) for number in range(wanted.times))
    if len(data) != whole:
        raise InputError(f"{there} became shorter while it was read")
    return data


def _run(file: BinaryIO, wanted: Wanted, number: int) -> bytes:
    file.seek(wanted.start + number * wanted.stride)
    return file.read(wanted.length)


def _of(path: Path, content: bool, tick: Callable[[], None] = lambda: None) -> WeightFile:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            before = header_of(path).size if is_gguf(path) else 8 + int.from_bytes(file.read(8), "little")
            if before > min(size, LONGEST_HEADER):
                raise InputError(f"{path} is truncated or corrupt; download the file again")
            file.seek(0)
            header = hashlib.sha256(file.read(before)).hexdigest()
            samples = _sampled(file, before, size, tick)
            whole = _hashed(file, tick) if content else ""
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    return WeightFile(path.name, size, before, header, samples, whole)


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
