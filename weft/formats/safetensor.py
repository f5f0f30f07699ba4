"""Safetensors: a directory's files, read lazily. Knows files and tensor names. Pickle is never read."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weft.errors import InputError
from weft.formats.checkpoint import Bring, counted
from weft.formats.fingerprint import INDEX, SINGLE, Wanted
from weft.formats.json_files import read_json
from weft.formats.packed import Plain

# How names begin here, and in files: without a head, and as the text part of a larger model.
ALIASES = (("model.", ""), ("model.", "model.language_model."), ("model.", "language_model.model."),
           ("lm_head.", "language_model.lm_head."))  # fmt: skip
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
          "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip


class SafetensorsCheckpoint:
    """See `Checkpoint`. Names may begin otherwise in files: a decoder that was saved without a head has its names
    without "model." in front, one that is a part of a larger model has more there. `aliases`: further ones.

    Raises `InputError` on opening if there is no safetensors file, if a file that the index names is missing,
    or if a file is truncated or corrupt.
    """

    def __init__(self, path: Path, bring: Bring | None = None, aliases: Sequence[tuple[str, str]] = ()) -> None:
        self.path, self._bring = path, bring
        self._file_of = self._find()
        self._begins = [alias for alias in (*ALIASES, *aliases) if any(n.startswith(alias[1]) for n in self._file_of)]
        self._open: tuple[Path, Any] | None = None
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}

    def _find(self) -> dict[str, Path]:
        single = self.path / SINGLE
        if single.is_file():  # first, as in transformers: an index beside it may be of other files
            return dict.fromkeys(_names(single), single)
        index = self.path / INDEX
        if index.is_file():
            return self._from_index(index)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise InputError(
                f"{self.path} has its weights as pickle (.bin) only, which can run code when it is read; "
                "weft reads safetensors: convert with transformers' save_pretrained"
            )
        raise InputError(f"{self.path} has no {SINGLE} and no {INDEX}")

    def _from_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map: dict[str, str] = read_json(index)["weight_map"]
            names = sorted(set(weight_map.values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("weight_map names no files")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index} can't be read ({error!r}); download the file again") from None
        for name in names:
            if Path(name).name != name or not name:
                raise InputError(f"{index} names {name!r}, which is not a file of this directory")
            if not (self.path / name).is_file():
                raise InputError(f"{self.path / name} is missing, but {index.name} names it; download it again")
            _names(self.path / name)
        return {tensor: self.path / name for tensor, name in weight_map.items()}

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._file_of

    def _stored(self, name: str) -> str:
        """What it is called in the file."""
        if name in self._file_of:
            return name
        others = (theirs + name.removeprefix(ours) for ours, theirs in self._begins if name.startswith(ours))
        return next((other for other in others if other in self._file_of), name)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Plain:
        """See `Checkpoint`."""
        path = self._place(name)
        if self._bring is not None:
            self._open = None  # a file that is mapped need not show what is written then
            self._bring(self._wanted(path, self._stored(name), rows, columns))
        try:
            part: Any = self._slice(path, name)
            if rows is None and columns is None:
                return Plain(part[...])
            first = slice(rows.start, rows.stop) if rows is not None else slice(None)
            values: torch.Tensor = part[first] if columns is None else part[first, columns.start : columns.stop]
            return Plain(values)
        except SafetensorError as error:
            raise InputError(f"{path}: {name} can't be read ({error}); download the file again") from None

    def shape(self, name: str) -> list[int]:
        """See `Checkpoint`."""
        return list(self._slice(self._place(name), name).get_shape())

    def stored(self, name: str) -> int:
        """See `Checkpoint`."""
        found = self._slice(self._place(name), name)
        return int(prod(found.get_shape())) * _BYTES.get(found.get_dtype(), 1)

    def kinds(self) -> dict[str, tuple[int, int]]:
        """See `Checkpoint`."""
        slices = {name: self._slice(path, name) for name, path in self._file_of.items()}
        return counted((part.get_dtype(), self.stored(name)) for name, part in slices.items())

    def unexpected(self, known: Collection[str]) -> list[str]:
        """Nothing: as in transformers, what the configuration doesn't call for is left alone."""
        return []

    def _place(self, name: str) -> Path:
        if name not in self:
            raise InputError(f"{self.path} has no tensor {name!r}, which config.json calls for; download it again")
        return self._file_of[self._stored(name)]

    def _slice(self, path: Path, name: str) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = (path, _opened(path))
        try:
            return self._open[1].get_slice(self._stored(name))
        except SafetensorError as error:
            raise InputError(f"{path}: {name} can't be read ({error}); download the file again") from None

    def _wanted(self, path: Path, stored: str, rows: range | None, columns: range | None) -> Wanted:
        """Where those parts of a tensor are. What this can't tell is taken whole."""
        if path not in self._headers:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + length, json.loads(file.read(length))
        first, header = self._headers[path]
        begin, end = header[stored]["data_offsets"]
        start, size, shape = first + begin, end - begin, header[stored]["shape"]
        element = _BYTES.get(header[stored]["dtype"], 0)
        row = size // shape[0] if size else 0
        if columns is not None and size and len(shape) == 2 and element:
            rows = range(shape[0]) if rows is None else rows
            start += rows.start * row + columns.start * element
            return Wanted(path.name, start, len(columns) * element, row, len(rows))
        if rows is not None and size:
            return Wanted(path.name, start + rows.start * row, len(rows) * row, len(rows) * row, 1)
        return Wanted(path.name, start, size, size, 1)

    def forget(self) -> None:
        """See `Checkpoint`."""
        self._open = None

    def close(self) -> None:
        """See `Checkpoint`."""
        self.forget()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or corrupt ({error}); download the file again") from None


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())
