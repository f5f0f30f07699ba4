"""Safetensors checkpoints, read lazily: only the rows and columns that are asked for leave the disk.

Knows files and tensor names; knows nothing of ranks or of what the tensors are for. Pickle is never read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weft.errors import InputError

PREFIX = "model."


class Checkpoint:
    """The tensors of a directory, by name. A decoder that was saved without a head has its names without "model." in
    front; they are read as if they had it.

    Raises `InputError` on opening if there is no safetensors file, if a file that the index names is missing,
    or if a file is truncated or corrupt.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = self._find()
        self._bare = not any(name.startswith(PREFIX) for name in self._file_of)
        self._open: tuple[Path, Any] | None = None

    def _find(self) -> dict[str, Path]:
        single = self.directory / "model.safetensors"
        if single.is_file():  # first, as in transformers: an index beside it may be of other files
            return dict.fromkeys(_names(single), single)
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            return self._from_index(index)
        if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt*")):
            raise InputError(
                f"{self.directory} has its weights as pickle (.bin) only, which can run code when it is read; "
                "weft reads safetensors: convert with transformers' save_pretrained"
            )
        raise InputError(f"{self.directory} has no model.safetensors and no model.safetensors.index.json")

    def _from_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("weight_map names no files")
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise InputError(f"{index} can't be read ({error!r}); download the file again") from None
        for name in names:
            if Path(name).name != name or not name:
                raise InputError(f"{index} names {name!r}, which is not a file of this directory")
            if not (self.directory / name).is_file():
                raise InputError(f"{self.directory / name} is missing, but {index.name} names it; download it again")
            _names(self.directory / name)
        return {tensor: self.directory / name for tensor, name in weight_map.items()}

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._file_of

    def _stored(self, name: str) -> str:
        """What it is called in the file."""
        return name.removeprefix(PREFIX) if self._bare else name

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor:
        """A tensor, or these rows or columns of it, in the stored dtype; it may be a view of the mapped file."""
        path, stored = self._place(name), self._stored(name)
        if self._open is None or self._open[0] != path:
            self._open = (path, _opened(path))
        try:
            part: Any = self._open[1].get_slice(stored)
            first = slice(rows.start, rows.stop) if rows is not None else slice(None)
            values: torch.Tensor = part[first] if columns is None else part[first, columns.start : columns.stop]
            return values
        except SafetensorError as error:
            raise InputError(f"{path}: {name} can't be read ({error}); download the file again") from None

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, from the header alone."""
        with _opened(self._place(name)) as file:
            return list(file.get_slice(self._stored(name)).get_shape())

    def _place(self, name: str) -> Path:
        if name not in self:
            raise InputError(f"{self.directory} has no tensor {name!r}, which config.json calls for")
        return self._file_of[self._stored(name)]

    def forget(self) -> None:
        """Closes the file that is mapped, so that its pages stop counting as this process's memory."""
        self._open = None

    def close(self) -> None:
        """The same, for good."""
        self.forget()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or corrupt ({error}); download the file again") from None


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())
