"""The tensors of a GGUF model, by Hugging Face's names and as Hugging Face has them.

Knows files, blocks and names; knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weft.errors import InputError
from weft.formats.checkpoint import Bring, counted
from weft.formats.fingerprint import Wanted
from weft.formats.gguf.architectures import Architecture, architecture_of, heads_of, stored_name
from weft.formats.gguf.blocks import PLAIN, unpacked
from weft.formats.gguf.files import GgufFiles, Located
from weft.formats.gguf.header import GgufTensor
from weft.formats.packed import Packed, Plain, TensorPart

# Numbers that follow from the configuration, and were stored all the same.
IGNORED = (".attn_rot_embd.weight", ".attention.rotary_emb.inv_freq")


class GgufCheckpoint:
    """See `Checkpoint`."""

    def __init__(self, path: Path, architectures: Sequence[Architecture], bring: Bring | None = None) -> None:
        self.path, self._files, self._bring = path, GgufFiles(path), bring
        self._architecture = architecture_of(self._files.header, architectures)
        self._heads = heads_of(self._files.header, self._architecture)

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the file."""
        return stored_name(name, self._architecture)

    def __contains__(self, name: str) -> bool:
        return self.stored_name(name) in self._files.tensors

    def _located(self, name: str) -> Located:
        if name not in self:
            raise InputError(
                f"{self.path} has no tensor {self.stored_name(name)!r}, which its configuration calls for; download "
                "it again"
            )
        return self._files.tensors[self.stored_name(name)]

    def shape(self, name: str) -> list[int]:
        """See `Checkpoint`."""
        return list(self._located(name).tensor.shape)

    def stored(self, name: str) -> int:
        """See `Checkpoint`."""
        return self._located(name).tensor.bytes

    def kinds(self) -> dict[str, tuple[int, int]]:
        """See `Checkpoint`."""
        return counted((found.tensor.type.name, found.tensor.bytes) for found in self._files.tensors.values())

    def unexpected(self, known: Collection[str]) -> list[str]:
        """See `Checkpoint`; here every tensor counts, but those that follow from the configuration."""
        names, ignored = {self.stored_name(name) for name in known}, (*IGNORED, *self._architecture.lists)
        return [name for name in self._files.tensors if name not in names and not name.endswith(ignored)]

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> TensorPart:
        """See `Checkpoint`."""
        found = self._located(name)
        path, tensor = found
        if len(tensor.shape) > 2 or (len(tensor.shape) == 1 and tensor.type.numbers > 1):
            raise InputError(f"{path}: {tensor.name} is {list(tensor.shape)} in {tensor.type.name}; download it again")
        all_rows, width = (*tensor.shape, 1)[:2]
        rows = range(all_rows) if rows is None else rows
        columns = range(width) if columns is None else columns
        if not (rows and columns):
            return Plain(torch.empty((len(rows), len(columns))[: len(tensor.shape)]))
        raw, keep = self._raw(found, rows, columns)
        if tensor.type.name not in PLAIN:
            return Packed(len(rows), keep, lambda some: unpacked(raw[some.start : some.stop], tensor.type))
        values = raw.view(PLAIN[tensor.type.name])
        if self._architecture.more_by_one and name.endswith("norm.weight"):
            values = values.to(torch.float32) - 1
        return Plain(values if len(tensor.shape) > 1 else values.reshape(-1))

    def _raw(self, located: Located, rows: range, columns: range) -> tuple[Tensor, range]:
        """Bytes of whole blocks [rows, …], and which of the blocks' columns are those that are wanted."""
        path, tensor = located
        kind, row = tensor.type, tensor.bytes // max(1, tensor.shape[0])
        first, last = columns.start // kind.numbers, -(-columns.stop // kind.numbers)
        keep = range(columns.start - first * kind.numbers, columns.stop - first * kind.numbers)
        stored, order = self._order(tensor, rows)
        start, length = tensor.start + stored.start * row, (last - first) * kind.bytes
        if self._bring is not None and length == row:
            self._bring(Wanted(path.name, start, row * len(stored), row * len(stored), 1))
        elif self._bring is not None:
            self._bring(Wanted(path.name, start + first * kind.bytes, length, row, len(stored)))
        # A map of its own: it goes with the part. Private, because torch wants what it could write to.
        mapped = torch.from_numpy(np.memmap(path, np.uint8, "c", start, (len(stored), row)))
        raw = mapped[:, first * kind.bytes : last * kind.bytes]
        return (raw if order is None else raw[order]), keep

    def _order(self, tensor: GgufTensor, rows: range) -> tuple[range, Tensor | None]:
        """Which rows to read for these, and in which order they are these; None if that is theirs."""
        part, row = tensor.name.split(".")[-2], self._architecture
        if part not in (*row.interleaved, *row.by_head):
            return rows, None
        count, heads = tensor.shape[0], self._heads[part]
        parts = 3 if part in row.by_head else 2
        width = count // heads
        if width * heads != count or width % parts:
            raise InputError(f"{tensor.name} has {count} rows, which {heads} heads don't divide")
        numbers = torch.arange(count)
        if part in row.by_head:  # [3, heads, D] to [heads, 3, D]
            places = numbers.view(3, heads, -1).transpose(0, 1).reshape(-1)[rows.start : rows.stop]
        else:
            places = numbers.view(heads, -1, 2).transpose(1, 2).reshape(-1)[rows.start : rows.stop]
        first, last = int(places.min()), int(places.max())
        return range(first, last + 1), places - first

    def forget(self) -> None:
        """Nothing is kept mapped."""

    def close(self) -> None:
        """See `Checkpoint`."""
