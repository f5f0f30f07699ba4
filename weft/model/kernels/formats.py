"""Formats that weights are kept in: float32, bfloat16, int8 with a scale for each row, int4 in groups.

A weight is gathered rows after rows, so that its float32 numbers are never there whole. Knows numbers; knows nothing of
checkpoints or of how products are computed.

Shapes: W outputs, K inputs, n some rows, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from weft.formats.packed import Codes
from weft.model.kernels.few_bits import GROUP
from weft.model.kernels.linear import Stored
from weft.model.kernels.rotation import made_up, turned

MOST8, MOST4 = 127, 15  # the largest codes
FEW_BITS = ("int4", "int8")
ROUNDED8, ROUNDED4 = 10.0, 5.0  # bits of a number, with its scales, up to which a tensor is of 8 and of 4 bits
LOST = {"int8": 0.02, "int4": 0.11}  # of a matrix's size; normal weights lose 0.9% and 8%
SHRINKS = (1.0, 0.95, 0.9, 0.85)  # of a group's range, of which the one with the smallest error is taken


class Gathering(Protocol):
    """A weight [W, K] that comes rows after rows."""

    takes_codes: bool

    @property
    def stored(self) -> Stored:
        """All of them."""
        ...

    @property
    def lost(self) -> float:
        """The error of what was gathered, as a part of its size (both as root of the sum of squares)."""
        ...

    @property
    def again(self) -> bool:
        """Whether numbers were rounded, rather than codes taken."""
        ...

    def recall(self, stored: Codes) -> None:
        """All of them, as they were gathered before."""
        ...

    def put(self, start: int, rows_nK: Tensor) -> None:
        """Numbers of some rows, float32."""
        ...

    def put_codes(self, start: int, some: Codes) -> bool:
        """Codes of some rows, as a checkpoint has them; False if these can't be taken as they are."""
        ...


class GatheredFloats:
    """Numbers in a `dtype`."""

    takes_codes, lost, again = False, 0.0, False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.stored = torch.empty(shape, dtype=dtype)

    def put(self, start: int, rows_nK: Tensor) -> None:
        """See `Gathering`."""
        self.stored[start : start + len(rows_nK)] = rows_nK

    def recall(self, stored: Codes) -> None:
        """See `Gathering`."""
        raise AssertionError("floats are read from the checkpoint each time")

    def put_codes(self, start: int, some: Codes) -> bool:
        """See `Gathering`."""
        return False


class _Rounded:
    """What formats of few bits have in common: how much they lose."""

    def __init__(self) -> None:
        self._error = self._size = 0.0

    @property
    def again(self) -> bool:
        """See `Gathering`."""
        return self._size > 0

    def _lose(self, error: Tensor, values: Tensor) -> None:
        self._error += float(error.square().sum())
        self._size += float(values.square().sum())

    @property
    def lost(self) -> float:
        """See `Gathering`."""
        return (self._error / self._size) ** 0.5 if self._size else 0.0


class GatheredInt8(_Rounded):
    """Whole numbers to 127 times a scale for each row. `turned`: of rows turned by `rotation.turned`, as those that are
    multiplied with them will be."""

    takes_codes = False

    def __init__(self, shape: tuple[int, int], turned: bool = True) -> None:
        super().__init__()
        self.turned = turned
        kept = kept_shape("int8", shape) if turned else shape
        self.stored = Codes(torch.empty(kept, dtype=torch.int8), torch.empty(shape[0], 1))

    def recall(self, stored: Codes) -> None:
        """See `Gathering`."""
        self.stored = stored

    def put(self, start: int, rows_nK: Tensor) -> None:
        """See `Gathering`."""
        here = slice(start, start + len(rows_nK))
        rows = turned(rows_nK) if self.turned else rows_nK
        scales = rows.abs().amax(1, keepdim=True).mul_(1 / MOST8)
        assert self.stored.scales is not None
        self.stored.scales[here] = scales
        whole = (rows / scales.clamp_min(torch.finfo().tiny)).round_()
        self.stored.codes[here] = whole
        self._lose(whole.mul_(scales).sub_(rows), rows)

    def put_codes(self, start: int, some: Codes) -> bool:
        """See `Gathering`."""
        return False


class GatheredInt4(_Rounded):
    """Whole numbers to 15 times a scale plus an offset, for each group of a row. The last group is made up with
    zeros."""

    takes_codes = True

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        kept = kept_shape("int4", shape)
        self.inputs, groups = shape[1], (shape[0], kept[1] // GROUP)
        self.stored = Codes(torch.empty(kept, dtype=torch.uint8), torch.empty(groups), torch.empty(groups))

    def recall(self, stored: Codes) -> None:
        """See `Gathering`."""
        self.stored = stored

    def put(self, start: int, rows_nK: Tensor) -> None:
        """See `Gathering`."""
        padded = functional.pad(rows_nK, (0, self.stored.codes.shape[1] - self.inputs))
        values = padded.view(len(rows_nK), -1, GROUP)
        low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
        best: tuple[Tensor, ...] | None = None
        for shrink in SHRINKS:
            middle, half = (high + low) / 2, (high - low) * (shrink / 2)
            scale, offset = (half * (2 / MOST4)).clamp_min_(torch.finfo().tiny), middle - half
            whole = (values - offset).div_(scale).round_().clamp_(0, MOST4)
            error = (whole * scale + offset - values).square_().sum(2, keepdim=True)
            found = whole, scale, offset, error
            best = found if best is None else tuple(
                torch.where(error < best[3], new, old) for new, old in zip(found, best, strict=True)
            )  # fmt: skip
        assert best is not None
        self._lose(best[3].sqrt(), values)
        self._set(start, best[0].flatten(1), best[1].squeeze(2), best[2].squeeze(2))

    def put_codes(self, start: int, some: Codes) -> bool:
        """See `Gathering`."""
        if some.scales is None or some.codes.is_floating_point() or some.codes.shape[1] != self.inputs:
            return False
        size = self.inputs // some.scales.shape[1]
        if size % GROUP or self.inputs % GROUP:
            return False
        values = some.codes.to(torch.int16).view(len(some.codes), -1, GROUP)
        base = values.amin(2, keepdim=True)
        whole = values - base
        if int(whole.max()) > MOST4:
            return False
        scales = some.scales.repeat_interleave(size // GROUP, 1)
        offsets = base.squeeze(2) * scales
        if some.offsets is not None:
            offsets += some.offsets.repeat_interleave(size // GROUP, 1)
        self._set(start, whole.flatten(1), scales, offsets)
        return True

    def _set(self, start: int, whole: Tensor, scales: Tensor, offsets: Tensor) -> None:
        here, stored = slice(start, start + len(whole)), self.stored
        assert stored.scales is not None and stored.offsets is not None
        stored.codes[here], stored.scales[here], stored.offsets[here] = whole, scales, offsets


def gathering(format_: str, shape: tuple[int, int]) -> Gathering:
    """Of one of the formats, to be multiplied with."""
    if 0 in shape:  # a rank without heads, say
        return GatheredFloats(shape, torch.float32)
    if format_ in ("float32", "bfloat16"):
        return GatheredFloats(shape, getattr(torch, format_))
    return GatheredInt8(shape) if format_ == "int8" else GatheredInt4(shape)


class Formats:
    """The format of each matrix, for what `--weights` came to. With auto:int8 or auto:int4 no matrix is kept in less
    than the checkpoint has of it: floats as what is computed in, a `dtype`; with auto:int8 what has 4 bits there in
    int4 or int8, whichever is `faster` for its shape. `bits`: of a number of a tensor, as the checkpoint stores it;
    `works`: whether anything here multiplies with a format."""

    def __init__(
        self, weights: str, dtype: str, bits: Callable[[str], float], faster: Callable[[tuple[int, int]], str],
        works: Callable[[str], bool] = lambda format_: True,
    ) -> None:  # fmt: skip
        self._fewest, self.auto = weights.removeprefix("auto:"), weights.startswith("auto:")
        self._dtype, self._bits, self._faster, self._works = dtype, bits, faster, works

    def __call__(self, names: Iterable[str], shape: tuple[int, int], table: bool = False) -> str:
        """Of tensors that are one matrix [W, K] in memory. `table`: it has no fewer than 8 bits in any case."""
        if not self.auto:
            return self._fewest
        most = max(map(self._bits, names))
        if most > ROUNDED8 or not self._works("int8"):
            return self._dtype
        if most > ROUNDED4 or table or 0 in shape or not self._works("int4"):
            return "int8"
        return self._fewest if self._fewest == "int4" else self._faster(shape)


def kept_shape(format_: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Of what is kept of a weight [W, K]: codes are made up to whole turns, or groups."""
    if format_ == "int8":
        return shape[0], made_up(shape[1])
    return (shape[0], -(-shape[1] // GROUP) * GROUP) if format_ == "int4" else shape


def head_of(format_: str) -> str:
    """Of a head, whose answers lie close beside each other: 8 bits where others have fewer."""
    return "int8" if format_ == "int4" else format_


def finer(format_: str, dtype: str) -> str:
    """What is kept in more bits, where this format loses too much; at most what is computed in, a `dtype`."""
    return "int8" if format_ == "int4" else dtype


def table_of(format_: str, shape: tuple[int, int]) -> Gathering:
    """Of one of the formats, whose rows are looked up: of few bits, int8."""
    return GatheredInt8(shape, turned=False) if format_ in FEW_BITS else gathering(format_, shape)


def random_codes(format_: str, shape: tuple[int, int]) -> Codes:
    """Such as a weight of this shape has in a format of few bits; to be timed."""
    kept, most = kept_shape(format_, shape), MOST4 if format_ == "int4" else MOST8
    codes = torch.randint(0, most + 1, kept, dtype=torch.uint8)
    if format_ == "int8":
        return Codes(codes.view(torch.int8), torch.rand(kept[0], 1))
    groups = kept[0], kept[1] // GROUP
    return Codes(codes, torch.rand(groups), torch.rand(groups))


def bytes_of(stored: Stored) -> int:
    """In memory, once it is packed: int4 has two numbers in a byte, scales and offsets of two bytes."""
    if isinstance(stored, Tensor):
        return stored.nbytes
    assert stored.scales is not None, "codes have scales"
    if stored.offsets is None:
        return stored.codes.nbytes + stored.scales.nbytes
    return stored.codes.nbytes // 2 + stored.scales.nbytes
