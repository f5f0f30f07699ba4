"""The header of a GGUF file: what it says of itself, and where which tensor lies. Read as what a stranger wrote.

Strings and lists are looked at when somebody asks for them: a vocabulary has a hundred thousand, and a rank needs none.
Everything that is wrong is one `InputError`, before memory is taken for it. Knows bytes and their limits; knows nothing
of what keys and tensors mean. No torch.

Source: docs/gguf.md of ggml, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from weft.errors import InputError
from weft.formats.gguf.types import TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_HEADER = 64 << 20  # bytes; those of the largest vocabularies have 10 MB
MOST_KEYS, MOST_TENSORS = 1 << 16, 1 << 17
LONGEST_NAME = 1 << 10  # bytes of a key or a tensor's name
LONGEST_STRING = 4 << 20  # bytes of any other; a chat template has some thousands
MOST_LISTED = 1 << 20  # in one list; the largest vocabularies have a quarter of that, and twice as many merges
MOST_ALIKE = 1 << 14  # in a list that says the same for each layer
KEPT_STRING = 1 << 12  # bytes of a text that is kept; longer ones are read when they are asked for
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # unless the file has another
LARGEST_ALIGNMENT = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """`shape` as torch has it, rows first; it begins at byte `start` of its file, and has `bytes`."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int
    bytes: int


@dataclass(frozen=True)
class _Unread:
    """Where a list lies, or a long text, and how many of what it holds."""

    kind: int
    count: int
    start: int
    listed: bool = True


class GgufHeader:
    """Of one file. `size`: bytes before the tensors' numbers begin. Raises `InputError` for a file that is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _mapped(path) as view:
            reader = _HeaderReader(view, path)
            self._values = reader.values()
            self.alignment = self._aligned()
            self.tensors, self.size = reader.tensors(self.alignment)

    def _aligned(self) -> int:
        found = self._values.get("general.alignment", ALIGNMENT)
        if type(found) is not int or not 8 <= found <= LARGEST_ALIGNMENT or found & (found - 1):
            raise InputError(f"{self.path} is corrupt: its tensors are aligned to {found!r}; download it again")
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of that type; whole numbers are numbers. Raises `InputError` for one of another type."""
        value = self._values.get(key, default)
        if isinstance(value, _Unread) and not value.listed:
            [value] = self._read(value)
        if value is default or type(value) is kind or (kind is float and type(value) is int):
            return value
        raise InputError(f"{self.path}: {key} is {_shown(value)}, not of type {kind.__name__}; download another file")

    def one(self, key: str) -> Any:
        """A value that is one, or a list of equal ones; else what it is, in words."""
        value = self._values[key]
        if not isinstance(value, _Unread):
            return value
        if value.count > MOST_ALIKE or not value.listed:
            return _shown(value)
        found = set(self._read(value))
        return found.pop() if len(found) == 1 else f"{len(found)} different values"

    def count(self, key: str) -> int:
        """How many a list has; none if there is none."""
        value = self._values.get(key)
        return value.count if isinstance(value, _Unread) and value.listed else 0

    def listed(self, key: str) -> list[Any] | None:
        """All of it; None if there is none."""
        value = self._values.get(key)
        if value is None:
            return None
        if not (isinstance(value, _Unread) and value.listed):
            raise InputError(f"{self.path}: {key} is {_shown(value)}, not a list; download another file")
        return self._read(value)

    def _read(self, value: _Unread) -> list[Any]:
        with _mapped(self.path) as view:
            return _HeaderReader(view, self.path).all_of(value)


def header_of(path: Path) -> GgufHeader:
    """Of a file, read once for as long as it doesn't change."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    return _kept(path, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=16)
def _kept(path: Path, stamp: object) -> GgufHeader:
    return GgufHeader(path)


class _mapped:
    """A file's bytes. Only pages that are looked at are read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> memoryview:
        try:
            with self._path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise InputError(f"{self._path} is empty; download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{self._path} can't be read ({error.strerror}); say where it can be") from None
        self._view = memoryview(self._map)
        return self._view

    def __exit__(self, *_: object) -> None:
        self._view.release()
        self._map.close()


class _HeaderReader:
    """Goes through the header, and stays in it."""

    def __init__(self, view: memoryview, path: Path) -> None:
        self._view, self._path, self._at = view, path, 0
        self._end = min(len(view), LONGEST_HEADER)
        self._named = 0  # tensors that are promised

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self._path} is truncated or corrupt: {what}; download it again")

    def _take(self, form: str) -> Any:
        """The next value."""
        size = struct.calcsize(form)
        if self._at + size > self._end:
            raise self._wrong(f"its header ends at byte {self._at}")
        (value,) = struct.unpack_from(form, self._view, self._at)
        self._at += size
        return value

    def _text(self, longest: int) -> str:
        length = self._take("<Q")
        if length > min(longest, self._end - self._at):
            raise self._wrong(f"a text at byte {self._at} is {length} bytes long, and {longest} are the most")
        data = bytes(self._view[self._at : self._at + length])
        self._at += length
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._wrong(f"the text at byte {self._at - length} is no UTF-8") from None

    def _name(self) -> str:
        """A text that is shown, too."""
        name = self._text(LONGEST_NAME)
        if not name.isprintable():
            raise self._wrong(f"the name {name[:40]!r} has characters that none has")
        return name

    def values(self) -> dict[str, Any]:
        """All that the file says; lists as where they are."""
        if len(self._view) < 24 or bytes(self._view[:4]) != MAGIC:
            raise InputError(
                f"{self._path} is no GGUF file, as it does not begin with {MAGIC.decode()}; give another one"
            )
        self._at = 4
        version = self._take("<I")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            why = "it is for big-endian machines" if version & 0xFFFF == 0 else f"its version is {version}"
            raise InputError(f"{self._path}: {why}; weft reads versions {known} of GGUF, little-endian")
        self._named, keys = self._take("<Q"), self._take("<Q")
        for count, most, what in ((self._named, MOST_TENSORS, "tensors"), (keys, MOST_KEYS, "keys")):
            if count > most:
                raise self._wrong(f"it promises {count} {what}, and {most} are the most")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            if key in values:
                raise self._wrong(f"{key} is there twice")
            values[key] = self._value(self._take("<I"))
        return values

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(f"<{_SCALARS[kind]}")
        if kind == _STRING:
            start, text = self._at, self._text(LONGEST_STRING)
            return text if len(text) <= KEPT_STRING else _Unread(kind, 1, start, listed=False)
        if kind != _LIST:
            raise self._wrong(f"a value before byte {self._at} has the unknown type {kind}")
        return self._passed(self._take("<I"), self._take("<Q"))

    def _passed(self, kind: int, count: int) -> _Unread:
        """Goes on to behind a list."""
        start, left = self._at, self._end - self._at
        if kind in _SCALARS:
            self._demand_count(start, count, left // struct.calcsize(_SCALARS[kind]), "numbers")
            self._at += count * struct.calcsize(_SCALARS[kind])
        elif kind == _STRING:
            self._demand_count(start, count, left // 8, "texts")
            self._pass_texts(count)
        else:
            raise self._wrong(f"a list at byte {start} is of type {kind}, which lists can't hold here")
        return _Unread(kind, count, start)

    def _demand_count(self, start: int, count: int, room: int, what: str) -> None:
        if count > min(MOST_LISTED, room):
            why = f"and {MOST_LISTED} are the most" if count > MOST_LISTED else f"and the header ends after {room}"
            raise self._wrong(f"a list at byte {start} promises {count} {what}, {why}")

    def _pass_texts(self, count: int) -> None:
        at, end, view, length = self._at, self._end - 8, self._view, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > end:
                raise self._wrong(f"its header ends at byte {at}, within a list of texts")
            at += 8 + length(view, at)[0]
        if at > self._end:
            raise self._wrong(f"a text before byte {at} is longer than the header")
        self._at = at

    def all_of(self, found: _Unread) -> list[Any]:
        """What a list holds."""
        if found.kind in _SCALARS:
            return list(struct.unpack_from(f"<{found.count}{_SCALARS[found.kind]}", self._view, found.start))
        self._at = found.start
        return [self._text(LONGEST_STRING) for _ in range(found.count)]

    def tensors(self, alignment: int) -> tuple[dict[str, GgufTensor], int]:
        """Where all are, and where the first one may begin."""
        told = [self._tensor() for _ in range(self._named)]
        size = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        free = 0  # the first byte behind all tensors so far
        for name, shape, kind, offset in sorted(told, key=lambda each: each[3]):
            bytes_ = prod(shape) // kind.numbers * kind.bytes
            if name in tensors:
                raise self._wrong(f"the tensor {name} is there twice")
            if offset % alignment or offset < free:
                raise self._wrong(f"the tensor {name} begins within another one, or between two places")
            if size + offset + bytes_ > len(self._view):
                lacks = size + offset + bytes_ - len(self._view)
                raise self._wrong(f"the tensor {name} is not all there, {lacks} bytes or more are missing")
            free = offset + bytes_
            tensors[name] = GgufTensor(name, shape, kind, size + offset, bytes_)
        return tensors, size

    def _tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name, dimensions = self._name(), self._take("<I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise self._wrong(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self._take("<Q") for _ in range(dimensions))[::-1]
        number, offset = self._take("<I"), self._take("<Q")
        if number not in TYPES:
            known = ", ".join(kind.name for kind in TYPES.values())
            raise InputError(f"{self._path}: {name} is of type {number}, which is not known; known are {known}")
        kind = TYPES[number]
        if prod(shape) > len(self._view) * 8 or shape[-1] % kind.numbers:
            raise self._wrong(f"the tensor {name} has the shape {list(shape)}, in {kind.name}")
        return name, shape, kind, offset


def _shown(value: Any) -> str:
    if isinstance(value, _Unread):
        return f"a list of {value.count}" if value.listed else "a long text"
    return repr(value)[:60]
