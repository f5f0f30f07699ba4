"""Key/value memory of one rank: one virtual slab per sequence slot.

A slab's addresses are reserved at full length; the operating system commits pages as they are touched and gets
them back when the slot is released (vAttention's idea, arXiv 2405.04437). So a sequence's keys are contiguous,
plain attention kernels work on them, and only what is used costs memory. Kept in int8, keys and values of each token
and head are whole numbers with a scale; they are made floats a piece at a time where they are attended to. Knows slots
and layers; knows nothing of requests or of who uses a slot.

Shapes: G key/value heads of this rank, n positions, D head width.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from weft.cache.places import Passage, PassagePlaces, Places

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
PIECE = 1024  # positions that are made floats at a time; where pieces begin depends on nothing else
MOST = 127  # of int8


class KeyValues(Protocol):
    """Keys and values of one slot and layer, valid up to what was written."""

    def heads(self, some: slice) -> KeyValues:
        """Of some of the key/value heads."""
        ...

    def span(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, n, D] of positions first, …, end - 1, as what is computed in."""
        ...

    def pieces(self, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of positions 0, …, end - 1, in order, as much at a time as should be there as floats."""
        ...


@dataclass(frozen=True, slots=True)
class PlainKeyValues:
    """As they are: views."""

    keys: Tensor
    values: Tensor

    def heads(self, some: slice) -> PlainKeyValues:
        """See `KeyValues`."""
        return PlainKeyValues(self.keys[some], self.values[some])

    def span(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """See `KeyValues`."""
        return self.keys[:, first:end], self.values[:, first:end]

    def pieces(self, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `KeyValues`."""
        yield self.span(0, end)


@dataclass(frozen=True, slots=True)
class RoundedKeyValues:
    """Whole numbers [2, G, length, D] with scales [2, G, length]: of keys, then of values."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def heads(self, some: slice) -> RoundedKeyValues:
        """See `KeyValues`."""
        return RoundedKeyValues(self.codes[:, some], self.scales[:, some], self.dtype)

    def span(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """See `KeyValues`."""
        keys, values = self.codes[:, :, first:end].to(self.dtype).mul_(self.scales[:, :, first:end, None])
        return keys, values

    def pieces(self, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `KeyValues`."""
        for first in range(0, end, PIECE):
            yield self.span(first, min(end, first + PIECE))


class _Reserved:
    """One array a slot, of addresses that are reserved and not taken."""

    def __init__(self, slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        size = math.prod(shape) * dtype.itemsize
        self.bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory: mmap.mmap | None = None
        if device == "cpu" and size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self._memory = mmap.mmap(-1, self.bytes * slots, flags=flags)
            # Every layer and head has a stretch of its own: huge pages would commit 128 MiB for 16 tokens.
            with suppress(OSError, AttributeError):  # a kernel without them
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.slots = [self._slot(slot) for slot in range(slots)]

    def _slot(self, slot: int) -> Tensor:
        if self._memory is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        count, offset = math.prod(self.shape), slot * self.bytes
        return torch.frombuffer(self._memory, dtype=self.dtype, count=count, offset=offset).view(self.shape)

    def release(self, slot: int) -> None:
        """Gives its pages back."""
        if self._memory is not None and hasattr(self._memory, "madvise"):
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self.bytes, self.bytes)

    def check_integrity(self) -> None:
        """Asserts that slots lie apart."""
        begins = sorted(slot.data_ptr() for slot in self.slots if slot.numel())
        assert all(b - a >= self.bytes for a, b in pairwise(begins)), "slabs overlap"


class Slabs:
    """Keys and values [layers, 2 * G, length, D] for each of `slots` sequences. `rounded`: to int8, with a scale for
    each token and head; what is read is in `dtype` either way."""

    def __init__(
        self, slots: int, layers: int, kv_heads: int, length: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: str = "cpu", rounded: bool = False,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.rounded = (layers, 2 * kv_heads, length, head_dim), dtype, rounded
        self._filled = [0] * slots  # positions written, from 0
        kept = _Reserved(slots, self.shape, torch.int8 if rounded else dtype, device)
        self._arrays = [kept, *([_Reserved(slots, self.shape[:3], torch.float32, device)] if rounded else [])]
        # Views for every slot and layer, made once: a decoding step takes them a few times a layer.
        self._layers = [[list(slot.unbind(0)) for slot in array.slots] for array in self._arrays]
        self._read = [[self._view(slot, layer, kv_heads) for layer in range(layers)] for slot in range(slots)]
        self._places = Places.of(self._layers, kv_heads, dtype)

    def _view(self, slot: int, layer: int, kv_heads: int) -> KeyValues:
        kept = [array[slot][layer] for array in self._layers]
        if self.rounded:
            codes, scales = (torch.unflatten(each, 0, (2, kv_heads)) for each in kept)
            return RoundedKeyValues(codes, scales, self.dtype)
        return PlainKeyValues(kept[0][:kv_heads], kept[0][kv_heads:])

    def write(self, slot: int, layer: int, start: int, keys_values_n2GD: Tensor) -> None:
        """Stores the keys and then values of the tokens at positions start, start + 1, …"""
        count, values = keys_values_n2GD.shape[0], keys_values_n2GD.transpose(0, 1)
        if self.rounded:
            scales = values.abs().amax(2).float().mul_(1 / MOST)
            self._layers[1][slot][layer].narrow(1, start, count).copy_(scales)
            values = torch.div(values, scales.clamp_min_(torch.finfo().tiny)[..., None]).round_()
        self._layers[0][slot][layer].narrow(1, start, count).copy_(values)
        self._filled[slot] = max(self._filled[slot], start + count)

    def places(self, pieces: Sequence[Passage]) -> PassagePlaces | None:
        """Where tokens of some sequences are written and read by weft's own kernels, all pieces at once; None where
        there are none. They count as written."""
        if self._places is None:
            return None
        for piece in pieces:
            assert 0 <= piece.slot < len(self._filled) and 0 <= piece.start <= self.shape[2] - piece.length, (
                "no such place"
            )
            self._filled[piece.slot] = max(self._filled[piece.slot], piece.start + piece.length)
        return PassagePlaces(self._places, pieces)

    def read(self, slot: int, layer: int) -> KeyValues:
        """Keys and values of one layer."""
        return self._read[slot][layer]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot become those of another too."""
        for array in self._arrays:
            array.slots[target][:, :, :length] = array.slots[source][:, :, :length]
        self._filled[target] = max(self._filled[target], length)

    def release(self, slot: int) -> None:
        """Forgets a sequence and gives its pages back."""
        self._filled[slot] = 0
        for array in self._arrays:
            array.release(slot)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one sequence, all layers."""
        return sum(math.prod(array.shape) // array.shape[2] * array.dtype.itemsize for array in self._arrays)

    @property
    def used_bytes(self) -> int:
        """Bytes of the positions written so far; what the system committed, up to whole pages."""
        return sum(self._filled) * self.bytes_per_token

    def check_integrity(self) -> None:
        """Asserts that slots lie apart, and that nothing is said to be filled beyond a slab."""
        for array in self._arrays:
            array.check_integrity()
        assert all(0 <= filled <= self.shape[2] for filled in self._filled), "a slab is fuller than it is long"
