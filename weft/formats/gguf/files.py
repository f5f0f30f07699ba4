"""The files of one GGUF model: one, or a few whose names and headers say that they belong together. No torch."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from weft.errors import InputError
from weft.formats.gguf.architectures import Architecture, configuration
from weft.formats.gguf.header import GgufTensor, header_of

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
MOST_FILES = 1000
MOST_FACTORS = 4096


class Located(NamedTuple):
    """A tensor, in a file."""

    path: Path
    tensor: GgufTensor


class GgufFiles:
    """Of a model whose first file, or any other, is `path`. Raises `InputError` for files that are missing, or don't
    belong together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers = [header_of(part) for part in parts_of(path)]
        first = self.header = self.headers[0]
        count = first.get("split.count", int, 0) or 1
        if count != len(self.headers):
            raise InputError(f"{first.path} is one of {count} files, by what it says, and named as one of "
                             f"{len(self.headers)}; give them the names that they had")  # fmt: skip
        self.tensors: dict[str, Located] = {}
        for number, header in enumerate(self.headers):
            if count > 1 and header.get("split.no", int) != number:
                raise InputError(f"{header.path} says that it is not part {number + 1} of {count}; download it again")
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise InputError(f"{header.path}: {name} is in {self.tensors[name].path} too; download them again")
                self.tensors[name] = Located(header.path, tensor)
        promised = first.get("split.tensors.count", int, len(self.tensors))
        if promised != len(self.tensors):
            raise InputError(f"{path}: {promised} tensors are promised and {len(self.tensors)} there; download again")

    def configuration(self, architecture: Architecture) -> dict[str, Any]:
        """As a config.json would have it. Raises `InputError`."""
        shapes = {name: found.tensor.shape for name, found in self.tensors.items()}
        lists = {name: self._numbers(name) for name in architecture.lists if name in self.tensors}
        return configuration(self.header, architecture, shapes, lists)

    def _numbers(self, name: str) -> list[float]:
        """What the configuration needs, and is a tensor in GGUF."""
        path, tensor = self.tensors[name]
        if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MOST_FACTORS:
            raise InputError(f"{path}: {name} is {list(tensor.shape)} in {tensor.type.name}, not a list of F32")
        with path.open("rb") as file:
            file.seek(tensor.start)
            return list(struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.bytes)))


def is_gguf(path: Path) -> bool:
    """By its name, unless that is a directory's: what is in it is looked at later."""
    return path.suffix.lower() == ".gguf" and not os.path.isdir(path)


def parts_of(path: Path) -> list[Path]:
    """All files of a model of which one is given, in their order. Raises `InputError` for one that is missing."""
    split = SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    stem, _, count = split.groups()
    if not 0 < int(count) <= MOST_FILES:
        raise InputError(f"{path} is named as one of {int(count)} files; give them the names that they had")
    end = path.suffix
    parts = [path.with_name(f"{stem}-{number:05}-of-{count}{end}") for number in range(1, int(count) + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError(f"{part} is missing, and {path.name} is a part of the same model; download it too")
    return parts
