"""A part of a tensor as a checkpoint stores it: plain numbers, or codes with their scales; and what they come to.

A quantised tensor becomes what its reader asks for: `into` gives numbers, `Packed.unpack` the codes that they are made
of, a few rows at a time, so that neither needs memory for the whole. Knows numbers; knows nothing of files.

Shapes: R rows, C columns, G = C / group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PIECE = 1 << 17  # numbers that are unpacked at a time: they stay in a core's cache


class TensorPart(Protocol):
    """Some rows and columns of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As if it were not packed."""
        ...

    def into(self, out: Tensor) -> None:
        """Its numbers, into a tensor of its shape, of any dtype and device."""
        ...

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Its numbers."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers as they are; they may be a view of a mapped file."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorPart`."""
        return tuple(self.values.shape)

    def into(self, out: Tensor) -> None:
        """See `TensorPart`."""
        out.copy_(self.values)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """See `TensorPart`; a view, where they are of that dtype."""
        return self.values.to(dtype)


@dataclass(frozen=True)
class Codes:
    """Of whole rows: each number is codes [R, C] times its scale plus its offset, both [R, G]; no scales: they are the
    numbers. `codes` are whole numbers of 8 or 16 bits, or floats; the rest is float32."""

    codes: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None

    def into(self, out: Tensor) -> None:
        """Their numbers [R, C], into a contiguous float32 tensor; each product and each sum rounded once."""
        out.copy_(self.codes)
        if self.scales is None:
            return
        grouped = out.view(*self.scales.shape, -1)
        grouped.mul_(self.scales[..., None])
        if self.offsets is not None:
            grouped.add_(self.offsets[..., None])

    def clone(self) -> Codes:
        """In memory of their own."""
        parts = (None if each is None else each.clone() for each in (self.codes, self.scales, self.offsets))
        return Codes(*parts)  # type: ignore[arg-type]

    def rows(self, some: slice | Tensor) -> Codes:
        """Of some rows, by a slice or their places."""
        parts = (None if each is None else each[some] for each in (self.codes, self.scales, self.offsets))
        return Codes(*parts)  # type: ignore[arg-type]

    def times(self, factor: float) -> Codes:
        """Of numbers so many times as large."""
        if self.scales is None:
            return Codes(self.numbers().mul_(factor))
        return Codes(self.codes, self.scales * factor, None if self.offsets is None else self.offsets * factor)

    def columns(self, some: range) -> Codes | None:
        """Of some columns, where they are whole groups; else None."""
        if len(some) == self.codes.shape[1]:
            return self
        if self.scales is None:
            return Codes(self.codes[:, some.start : some.stop])
        size = self.codes.shape[1] // self.scales.shape[1]
        if some.start % size or some.stop % size:
            return None
        groups = slice(some.start // size, some.stop // size)
        offsets = None if self.offsets is None else self.offsets[:, groups]
        return Codes(self.codes[:, some.start : some.stop], self.scales[:, groups], offsets)

    def numbers(self) -> Tensor:
        """The same in a tensor of their own."""
        out = torch.empty(self.codes.shape)
        self.into(out)
        return out


@dataclass(frozen=True)
class Packed:
    """A matrix, or rows of one. `unpack` gives the codes of a range of its rows; of their columns `keep` are this
    part's: groups don't end where ranks' parts do."""

    rows: int
    keep: range
    unpack: Callable[[range], Codes]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorPart`."""
        return self.rows, len(self.keep)

    def into(self, out: Tensor) -> None:
        """See `TensorPart`."""
        many = max(1, PIECE // max(1, self.keep.stop))
        for start in range(0, self.rows, many):
            rows = range(start, min(self.rows, start + many))
            codes, here = self.unpack(rows), out[rows.start : rows.stop]
            if here.shape == codes.codes.shape and here.is_contiguous() and here.dtype is torch.float32:
                codes.into(here)
            else:
                here.copy_(codes.numbers()[:, self.keep.start : self.keep.stop])

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """See `TensorPart`."""
        out = torch.empty(self.shape, dtype=dtype)
        self.into(out)
        return out
