"""Key/value memory of one rank: one virtual slab per sequence slot.

A slab's addresses are reserved at full length; the operating system commits pages as they are touched and gets
them back when the slot is released (vAttention's idea, arXiv 2405.04437). So a sequence's keys are contiguous,
plain attention kernels work on them, and only what is used costs memory. Knows slots and layers; knows nothing of
requests or of who uses a slot.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Slabs:
    """Keys and values [layers, 2 * G, length, D] for each of `slots` sequences (G key/value heads of this rank)."""

    def __init__(
        self, slots: int, layers: int, kv_heads: int, length: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.shape = (layers, 2 * kv_heads, length, head_dim)
        self.dtype, self.device = dtype, device
        size = math.prod(self.shape) * dtype.itemsize
        self._bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._filled = [0] * slots  # positions written, from 0
        self._memory: mmap.mmap | None = None
        if device == "cpu" and size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self._memory = mmap.mmap(-1, self._bytes * slots, flags=flags)
            # Every layer and head has a stretch of its own: huge pages would commit 128 MiB for 16 tokens.
            with suppress(OSError, AttributeError):  # a kernel without them
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._slabs = [self._slab(slot) for slot in range(slots)]
        # Views for every slot and layer, made once: a decoding step takes them a few times a layer.
        self._layers = [list(slab.unbind(0)) for slab in self._slabs]
        self._pairs = [[(layer[:kv_heads], layer[kv_heads:]) for layer in layers] for layers in self._layers]

    def _slab(self, slot: int) -> Tensor:
        if self._memory is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        count, offset = math.prod(self.shape), slot * self._bytes
        return torch.frombuffer(self._memory, dtype=self.dtype, count=count, offset=offset).view(self.shape)

    def write(self, slot: int, layer: int, start: int, keys_values_n2GD: Tensor) -> None:
        """Stores the keys and then values of the tokens at positions start, start + 1, …"""
        count = keys_values_n2GD.shape[0]
        self._layers[slot][layer].narrow(1, start, count).copy_(keys_values_n2GD.transpose(0, 1))
        self._filled[slot] = max(self._filled[slot], start + count)

    def read(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, length, D] of one layer: views, valid up to what was written."""
        return self._pairs[slot][layer]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot become those of another too."""
        self._slabs[target][:, :, :length] = self._slabs[source][:, :, :length]
        self._filled[target] = max(self._filled[target], length)

    def release(self, slot: int) -> None:
        """Forgets a sequence and gives its pages back."""
        self._filled[slot] = 0
        if self._memory is not None and hasattr(self._memory, "madvise"):
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self._bytes, self._bytes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one sequence, all layers."""
        layers, heads, _, width = self.shape
        return layers * heads * width * self.dtype.itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of the positions written so far; what the system committed, up to whole pages."""
        return sum(self._filled) * self.bytes_per_token

    def check_integrity(self) -> None:
        """Asserts that slots lie apart, and that nothing is said to be filled beyond a slab."""
        begins = sorted(slab.data_ptr() for slab in self._slabs if slab.numel())
        assert all(b - a >= self._bytes for a, b in pairwise(begins)), "slabs overlap"
        assert all(0 <= filled <= self.shape[2] for filled in self._filled), "a slab is fuller than it is long"
