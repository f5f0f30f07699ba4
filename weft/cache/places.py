"""Where weft's own kernels find keys and values: addresses, by layer and slot; they write and read all at once.

Knows memory that slabs own and its shape; knows nothing of who uses a slot.

Shapes: L layers, S slots, P pieces, T rows of the batch, H query heads, G key/value heads, n H + 2G, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, addressof
from typing import NamedTuple

import torch
from torch import Tensor

from weft.compiled.library import LANES, KeysPlace, library


class Passage(NamedTuple):
    """Consecutive tokens of one sequence: its slot, the first one's position, how many there are."""

    slot: int
    start: int
    length: int


class Places(NamedTuple):
    """Of all slots and layers. `places` is what `addresses` [L, S] point to."""

    library: CDLL
    places: list[list[KeysPlace]]
    addresses: Tensor
    groups: int
    width: int

    @classmethod
    def of(cls, arrays: Sequence[Sequence[Sequence[Tensor]]], groups: int, dtype: torch.dtype) -> Places | None:
        """Of numbers [2 * G, length, D] by slot and layer, and scales [2 * G, length] if they are codes; None where
        nothing is compiled, or for what it doesn't read."""
        found, first = library(), arrays[0][0][0] if arrays[0] and arrays[0][0] else None
        if found is None or first is None or not first.numel() or not first.is_cpu:
            return None
        if dtype is not torch.float32 or first.shape[2] % LANES:
            return None
        by_slot = [[_place(*parts, groups) for parts in zip(*slot, strict=True)] for slot in zip(*arrays, strict=True)]
        places = [list(layer) for layer in zip(*by_slot, strict=True)]
        addresses = torch.tensor([[addressof(place) for place in layer] for layer in places])
        return cls(found, places, addresses, groups, first.shape[2])


def _place(*parts: Tensor | int) -> KeysPlace:
    """Of one slot and layer: numbers, scales if there are, and G."""
    numbers, *scales, groups = parts
    assert isinstance(numbers, Tensor) and isinstance(groups, int)
    scaled = [each for both in scales if isinstance(both, Tensor) for each in (both[:groups], both[groups:])]
    pointers = [each.data_ptr() for each in (numbers[:groups], numbers[groups:], *scaled)]
    shape = groups, numbers.shape[2], numbers.stride(0), numbers.shape[1]
    return KeysPlace(*pointers, *([0] * (4 - len(pointers))), *shape)


class PassagePlaces:
    """Of pieces that lie behind each other in the batch."""

    def __init__(self, places: Places, pieces: Sequence[Passage]) -> None:
        slots, starts, counts = (torch.tensor(each) for each in zip(*pieces, strict=True))
        self._places, self._pointers = places, places.addresses[:, slots].contiguous()
        self._starts, self._counts, self._ends = starts, counts, starts + counts
        self._firsts: dict[int | None, Tensor] = {}
        self._count = len(pieces)

    def write(self, layer: int, heads_TnD: Tensor) -> None:
        """Stores all rows' keys and then values, the last 2G heads of each row."""
        row, skipped = heads_TnD.stride(0), (heads_TnD.shape[1] - 2 * self._places.groups) * self._places.width
        at = heads_TnD.data_ptr() + skipped * heads_TnD.element_size()
        given = self._starts.data_ptr(), self._counts.data_ptr(), self._count, at, row
        self._places.library.weft_keep(self._of(layer), *given)

    def attend(
        self, layer: int, heads_TnD: Tensor, window: int | None, softcap: float | None, sinks_H: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Attention of single tokens, whose queries are the first H heads of each row, over all up to themselves or a
        `window`, as `attention.Scoring` says: [T, H * D]. Raises MemoryError."""
        places, heads = self._places, heads_TnD.shape[1] - 2 * self._places.groups
        where = self._of(layer), self._first(window).data_ptr(), self._ends.data_ptr(), self._count
        queries = heads_TnD.data_ptr(), heads_TnD.stride(0), heads
        scoring = softcap or 0.0, 0 if sinks_H is None else sinks_H.data_ptr()
        out = heads_TnD.new_empty(self._count, heads * places.width)
        if not places.library.weft_attend(*where, *queries, *scoring, out.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"attention of {self._count} tokens")
        return out

    def attend_whole(
        self, layer: int, stage: int, window: int | None, angles_T1h: Tensor | None, hidden_TM: Tensor, out_TM: Tensor
    ) -> None:  # fmt: skip
        """All that a layer's attention does with single tokens, into `out_TM`. `stage`: where what it is made of is, a
        `WholeAttention`. Raises MemoryError."""
        where = (each.data_ptr() for each in (self._first(window), self._starts, self._counts, self._ends))
        angles = 0 if angles_T1h is None else angles_T1h.data_ptr()
        given = angles, hidden_TM.data_ptr(), out_TM.data_ptr(), torch.get_num_threads()
        if not self._places.library.weft_attention(stage, self._of(layer), *where, self._count, *given):
            raise MemoryError(f"attention of {self._count} tokens")

    def _first(self, window: int | None) -> Tensor:
        """The first position that each piece's last token sees."""
        if window not in self._firsts:
            seen = torch.zeros_like(self._ends) if window is None else (self._ends - window).clamp_min_(0)
            self._firsts[window] = seen
        return self._firsts[window]

    def _of(self, layer: int) -> int:
        """Where the pointers of one layer are."""
        return self._pointers.data_ptr() + layer * self._count * self._pointers.element_size()
