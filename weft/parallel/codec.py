"""Wire formats: how a partial travels.

A codec turns rows of numbers into what is sent and back. Exact and lossy sums share their algorithm and its
order; only the codec differs. Knows tensors; knows nothing of ranks or messages.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from weft.errors import InputError
from weft.parallel.quantised import Quantised
from weft.wires import WIRES


class Codec(Protocol):
    """One wire format. `values` are [rows, width], contiguous, in the computation's dtype; what is sent has a row for
    each of theirs, which depends on that row alone. `error`: how far a number may be off, in parts of itself, or of the
    largest number of its group on wires that have some (parallel/quantised.py)."""

    name: str
    error: float

    def empty(self, values: Tensor) -> Tensor:
        """A buffer for what `encode(values)` of another rank would be."""
        ...

    def landing(self, values: Tensor) -> Tensor:
        """The same, when the result is to replace `values`: their own memory if they travel as they are."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """What is sent; `values` itself if nothing has to change."""
        ...

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Writes the values into `out` [rows, width]."""
        ...

    def settle(self, values: Tensor) -> None:
        """Rounds to what would come out at the other end, in place."""
        ...

    def add(self, left: Tensor, encoded: Tensor, out: Tensor) -> None:
        """out = left + decoded, which is what `decode` gives; `left` may be `out`."""
        ...


class Exact:
    """The computation's own numbers."""

    name, error = "exact", 0.0

    def empty(self, values: Tensor) -> Tensor:
        return torch.empty_like(values)

    def landing(self, values: Tensor) -> Tensor:
        return values

    def encode(self, values: Tensor) -> Tensor:
        return values

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        if encoded.data_ptr() != out.data_ptr():
            out.copy_(encoded)

    def settle(self, values: Tensor) -> None:
        """Nothing is lost."""

    def add(self, left: Tensor, encoded: Tensor, out: Tensor) -> None:
        torch.add(left, encoded, out=out)


class BFloat16:
    """Half the bytes of float32: 8 bits of mantissa, the same range."""

    name, error = "bf16", 1 / 256

    def empty(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)

    def landing(self, values: Tensor) -> Tensor:
        return self.empty(values)

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        out.copy_(encoded)

    def settle(self, values: Tensor) -> None:
        values.copy_(values.to(torch.bfloat16))

    def add(self, left: Tensor, encoded: Tensor, out: Tensor) -> None:
        torch.add(left, encoded, out=out)


_CODECS: dict[str, Codec] = {
    "exact": Exact(), "bf16": BFloat16(), "int8": Quantised("int8"), "int4": Quantised("int4"),
}  # fmt: skip
assert tuple(_CODECS) == WIRES
_TOTALS = {"int4": "int8"}


def totals(codec: Codec) -> Codec:
    """How sums travel of what travelled so: nobody makes up for what they lack."""
    return _CODECS[_TOTALS.get(codec.name, codec.name)]


def codec_named(name: str) -> Codec:
    """The codec of a wire. Raises `InputError` that lists the known ones."""
    if name not in _CODECS:
        raise InputError(f"--wire {name!r} is not known; allowed: {', '.join(WIRES)}")
    return _CODECS[name]
