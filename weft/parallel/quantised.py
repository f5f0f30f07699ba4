"""Wires of few bits: `int8` and `int4`.

A row is coded by itself: its numbers in groups, each with a scale of its own in bfloat16; and of each GROUP_SET
neighbours the largest is kept apart in bfloat16, so that it doesn't set the scale of the others. A code is the nearest
multiple of the scale:

int8   127 steps up and down to the group's largest number
int4   8 steps to the side where the largest number is, 7 to the other

A number is off by half a step at most, with int4 by a whole one where it is opposite to the largest and as large, and
the scale's own rounding adds 1/256 of that; what was kept apart is off by 1/256 of itself. Numbers below TINY may
arrive as zero, and those from HUGE on as infinite. NaN and infinities arrive as such: the scale of their group is a
power of two, which its bits tell in place of a number, and steps there are up to twice as wide and a little more.
Knows tensors; knows nothing of ranks or messages.

Shapes: T rows, M width, G groups of K, k numbers apart. A row of what is sent: codes (of int4 those of the first half
of the columns in the lower halves of bytes), G scales, k numbers, and a byte for each that says which of its set it is.
"""

from __future__ import annotations

from ctypes import CDLL
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from weft.compiled.library import library
from weft.parallel.sizes import GROUP_SET, GROUPS, RowLayout, layout_of

TINY = 2.0**-118
HUGE = 3.3e38
_LEAST_SCALE = 2.0**-126
_NAN = 0x7FC0
_NO_NUMBER = 0x7F80  # bits that are set in a scale which is none


class _Steps(NamedTuple):
    """Codes go from `least` to `most`. `signed`: the scale's sign makes the largest number's code the least one."""

    least: int
    most: int
    signed: bool


_STEPS = {"int8": _Steps(-127, 127, False), "int4": _Steps(-8, 7, True)}


class _Views:
    """The parts of encoded rows: codes [T, bytes], scales [T, G], numbers apart [T, k] and their places [T, k]."""

    def __init__(self, encoded: Tensor, layout: RowLayout) -> None:
        ends = list(accumulate((layout.codes, 2 * layout.groups, 2 * layout.apart, layout.apart)))
        self.codes = encoded[:, : ends[0]].view(torch.int8)
        self.scales = encoded[:, ends[0] : ends[1]].view(torch.bfloat16)
        self.apart = encoded[:, ends[1] : ends[2]].view(torch.bfloat16)
        self.places = encoded[:, ends[2] : ends[3]]


class Quantised:
    """One of GROUPS. `error`: how far a number may be off, in parts of its group's largest one."""

    def __init__(self, name: str) -> None:
        self.name, self._group, self._steps = name, GROUPS[name], _STEPS[name]
        self.error = 1.01 / (self._steps.most + 1 if self._steps.signed else 2 * self._steps.most)

    def empty(self, values: Tensor) -> Tensor:
        """[T, bytes of a row]."""
        rows, width = values.shape
        return torch.empty(rows, layout_of(self.name, width).row, dtype=torch.uint8, device=values.device)

    def landing(self, values: Tensor) -> Tensor:
        """The same: nothing arrives in the form of the values."""
        return self.empty(values)

    def encode(self, values: Tensor) -> Tensor:
        """[T, M] -> [T, bytes of a row]."""
        rows, width = values.shape
        layout, encoded = layout_of(self.name, width), self.empty(values)
        found = _compiled_for(values)
        if found and found.weft_encode(values.data_ptr(), rows, width, self._group, encoded.data_ptr()):
            return encoded
        views, numbers = _Views(encoded, layout), values.float()
        if layout.padded > width:
            numbers = pad(numbers, (0, layout.padded - width))
        groups = numbers.view(rows, layout.groups, self._group)
        most, least = groups.amax(2), groups.amin(2)
        places = _set_apart(groups, most, least, layout.apart)
        scales = self._scales(most, least)
        inverse = scales.reciprocal().masked_fill_(scales == 0, 0.0)
        codes = torch.mul(groups, inverse[..., None]).round_().view(rows, layout.padded)
        encoded[:, -1].zero_()  # a row may end with a byte that holds nothing
        views.scales.copy_(scales)
        columns = places + _steps_to(layout.apart, GROUP_SET)
        codes.scatter_(1, columns, 0.0)
        kept = numbers.gather(1, columns)
        views.apart.copy_(kept)
        views.apart.view(torch.int16).masked_fill_(kept.isnan(), _NAN)  # there are several, and one has to be agreed on
        views.places.copy_(places)
        if not scales.sum().isfinite():
            self._mark(groups, scales, codes, views)
        self._pack(codes, views.codes)
        return encoded

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """[T, bytes of a row] -> `out` [T, M]."""
        if not self._added(None, encoded, out):
            out.copy_(self._decoded(encoded, out.shape[1]))

    def settle(self, values: Tensor) -> None:
        """Rounds to what would come out at the other end, in place."""
        self.decode(self.encode(values), values)

    def add(self, left: Tensor, encoded: Tensor, out: Tensor) -> None:
        """out = left + decoded, each in `out`'s dtype: so two terms give the same bits in either order."""
        if not self._added(left, encoded, out):
            torch.add(left, self._decoded(encoded, out.shape[1]).to(out.dtype), out=out)

    def _added(self, left: Tensor | None, encoded: Tensor, out: Tensor) -> bool:
        """By weft's own kernels, where they are; False, with nothing done, for what they leave to torch."""
        assert encoded.shape == (out.shape[0], layout_of(self.name, out.shape[1]).row), "bytes of other rows"
        assert left is None or left.shape == out.shape, "terms of other rows"
        found = _compiled_for(out) if encoded.is_contiguous() and (left is None or _compiled_for(left)) else None
        given = encoded.data_ptr(), *out.shape, self._group, 0 if left is None else left.data_ptr(), out.data_ptr()
        return found is not None and bool(found.weft_decode(*given))

    def _scales(self, most: Tensor, least: Tensor) -> Tensor:
        """Of each group as it will be read, in float32. Zero: all that is left of the group is."""
        if self._steps.signed:
            exact = torch.copysign(torch.maximum(most, -least), most + least) / self._steps.least
        else:
            exact = torch.maximum(most, -least) / self._steps.most
        rounded = exact.bfloat16().float()
        return rounded.masked_fill_(rounded.abs() < _LEAST_SCALE, 0.0)

    def _pack(self, codes: Tensor, into: Tensor) -> None:
        """Codes, whole numbers [T, G * K] in float32, to bytes."""
        if self._steps.most == 127:
            into.copy_(codes)
            return
        whole, half = codes.to(torch.int8).clamp_(max=self._steps.most), codes.shape[1] // 2
        torch.bitwise_left_shift(whole[:, half:], 4, out=into)
        into.bitwise_or_(whole[:, :half].bitwise_and_(15))

    def _unpacked(self, packed: Tensor) -> Tensor:
        """Bytes to codes [T, G * K]."""
        if self._steps.most == 127:
            return packed
        return torch.cat([packed << 4, packed], 1).bitwise_right_shift_(4)

    def _decoded(self, encoded: Tensor, width: int) -> Tensor:
        """[T, M] in float32."""
        layout = layout_of(self.name, width)
        views, rows = _Views(encoded, layout), encoded.shape[0]
        codes = self._unpacked(views.codes).view(rows, layout.groups, self._group)
        scales = views.scales.float()
        numbers = torch.mul(codes, scales[..., None])
        if not scales.sum().isfinite():
            self._read_marked(codes, views, numbers)
        numbers = numbers.view(rows, layout.padded)
        columns = views.places + _steps_to(layout.apart, GROUP_SET)
        return numbers.scatter_(1, columns, views.apart.float())[:, :width]

    def _mark(self, groups: Tensor, scales: Tensor, codes: Tensor, views: _Views) -> None:
        """Groups with numbers that are not finite: the scale is 2^e, and its bits have e + 127 in place of the sign and
        the fraction of a number that is none."""
        marked, most = ~scales.isfinite(), self._steps.most
        numbers = groups[marked]
        finite = numbers.isfinite()
        largest = numbers.abs().masked_fill(~finite, 0.0).amax(1)
        exponent = torch.frexp(largest / (most - 1)).exponent.clamp(-126, 127)
        coded = (numbers * torch.exp2(-exponent.float())[:, None]).round().clamp(1 - most, most - 1)
        coded = torch.where(finite, coded, torch.where(numbers > 0, most, -most).float())
        codes.view_as(groups)[marked] = coded.masked_fill(numbers.isnan(), -most - 1)
        told = exponent.int() + 127
        bits = (told & 0x7F) | _NO_NUMBER | torch.where(told > 0x7F, -0x8000, 0)
        views.scales.view(torch.int16)[marked] = bits.short()

    def _read_marked(self, codes: Tensor, views: _Views, numbers: Tensor) -> None:
        bits, most = views.scales.view(torch.int16).int(), self._steps.most
        marked = (bits & _NO_NUMBER) == _NO_NUMBER
        told, coded = bits[marked], codes[marked].float()
        exponent = ((told & 0x7F) | torch.where(told < 0, 0x80, 0)) - 127
        greatest = torch.finfo(torch.float32).max
        values = (coded * torch.exp2(exponent.float())[:, None]).clamp(-greatest, greatest)
        values = values.masked_fill(coded == most, float("inf")).masked_fill(coded == -most, float("-inf"))
        numbers[marked] = values.masked_fill(coded == -most - 1, float("nan"))


def _compiled_for(values: Tensor) -> CDLL | None:
    """weft's own kernels, where they are and know such numbers; the bytes are the same."""
    return library() if values.dtype is torch.float32 and values.is_cpu and values.is_contiguous() else None


def _set_apart(groups: Tensor, most: Tensor, least: Tensor, apart: int) -> Tensor:
    """The largest number of each set of neighbouring groups, which then counts no more in `most` and `least`: its place
    in the set [T, k]."""
    rows, count, size = groups.shape
    largest, of_set = torch.maximum(most, -least), GROUP_SET // size
    of_sets = pad(largest, (0, apart * of_set - count)).view(rows, apart, of_set)
    columns = (_argmax(of_sets) + _steps_to(apart, of_set)).clamp_(max=count - 1)  # where all are zero, what was padded
    picked = groups.reshape(-1, size).index_select(0, (columns + _steps_to(rows, count)[:, None]).view(-1))
    place = _argmax(picked)
    picked.scatter_(1, place[:, None], 0.0)
    most.scatter_(1, columns, picked.amax(1).view(rows, apart))
    least.scatter_(1, columns, picked.amin(1).view(rows, apart))
    return columns * size + place.view(rows, apart) - _steps_to(apart, GROUP_SET)


def _argmax(values: Tensor) -> Tensor:
    """Where the largest ones of the last dimension are, nearly: those that differ by less than 2^-17 count as alike, of
    which it is the last. A largest number of whole ones is several times as fast as `argmax`."""
    size = values.shape[-1]
    low = (1 << (size - 1).bit_length()) - 1
    tagged = values.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF & ~low).bitwise_or_(_steps_to(size, 1).int())
    return tagged.amax(-1).bitwise_and_(low).long()


def _steps_to(count: int, step: int) -> Tensor:
    """0, step, 2 step, …"""
    return torch.arange(0, count * step, step)
