"""Products with weights of few bits by weft's own compiled kernels.

Rows are rounded to 8 bits: for int8 by a scale for each, after they were turned; for int4 by a scale for each group of
32. A row's result depends on that row alone, with any number of rows. Knows weights and rows.

Shapes: T rows, K inputs, W outputs, B blocks of 16 outputs, G groups of inputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from weft.compiled.library import LANES, Weight, library
from weft.formats.packed import Codes
from weft.model.kernels.few_bits import GROUP
from weft.model.kernels.linear import NoKernel, Stored, codes, numbers


class _Compiled:
    """What both have in common."""

    bits = 0

    def __init__(self, outputs: int, padded: int, bias_W: Tensor | None, *parts: Tensor | None) -> None:
        found = library()
        if found is None:
            raise NoKernel("nothing is compiled on this machine")
        self.width, self._product = outputs, found.weft_product
        self._held = bias = (None if bias_W is None else bias_W.float().contiguous()), *parts
        self._weight = Weight(
            padded, outputs, -(-outputs // LANES), *(0 if each is None else each.data_ptr() for each in (*parts, bias[0]))
        )  # fmt: skip
        self._place = ctypes.addressof(self._weight)

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        rows = rows_TK if rows_TK.dtype is torch.float32 else rows_TK.float()
        rows = rows.contiguous()
        count, inputs = rows.shape
        out = torch.empty(count, self.width)
        given = rows.data_ptr(), inputs, count, out.data_ptr(), torch.get_num_threads()
        if count and not self._product(self._place, self.bits, *given):
            raise MemoryError(f"a product of {count} rows")
        return out if rows_TK.dtype is torch.float32 else out.to(rows_TK.dtype)


class Compiled8(_Compiled):
    """int8: rows are turned by the kernel itself, as the weight's were when it was gathered."""

    bits = 8

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        whole_WK, scales_W1 = codes(weight)
        outputs, padded = whole_WK.shape
        made_up, found = -outputs % LANES, library()
        blocks = functional.pad(whole_WK, (0, 0, 0, made_up)).view(-1, LANES, padded // 4, 4)
        sums = functional.pad(whole_WK.sum(1, dtype=torch.int32), (0, made_up))
        starts = sums.mul_(-(found.weft_shift() if found else 0))
        scales = functional.pad(scales_W1[:, 0], (0, made_up)).contiguous()
        super().__init__(outputs, padded, bias_W, blocks.transpose(1, 2).contiguous(), scales, starts)


class Compiled4(_Compiled):
    """int4: scales and offsets of groups as halves of an output's scale, a power of two."""

    bits = 4

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        whole_WK, scales_WG = codes(weight)
        assert isinstance(weight, Codes) and weight.offsets is not None, "groups have offsets"
        outputs, padded = whole_WK.shape
        made_up = 0, 0, 0, -outputs % LANES
        largest = torch.maximum(scales_WG.abs().amax(1), weight.offsets.abs().amax(1)).clamp_min_(torch.finfo().tiny)
        scales_W = torch.exp2(torch.log2(largest).ceil_())
        halves = [_blocks(functional.pad(each / scales_W[:, None], made_up)) for each in (scales_WG, weight.offsets)]
        eights = functional.pad(whole_WK, made_up).view(-1, LANES, padded // GROUP, GROUP // 8, 2, 4)
        two = eights.permute(0, 2, 3, 4, 1, 5)  # B, G, eights of a group, their halves, outputs, inputs
        packed = two[:, :, :, 1].bitwise_left_shift(4).bitwise_or_(two[:, :, :, 0]).flatten(2)
        scales = functional.pad(scales_W, (0, made_up[-1]))
        super().__init__(outputs, padded, bias_W, torch.cat([*halves, packed], 2), scales, None)


def _blocks(each_WG: Tensor) -> Tensor:
    """Numbers of groups as halves, [B, G, bytes of a block]."""
    blocks = each_WG.view(-1, LANES, each_WG.shape[1]).transpose(1, 2)
    return blocks.half().contiguous().view(torch.uint8)


class CompiledFloats:
    """float32."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        found = library()
        if found is None:
            raise NoKernel("nothing is compiled on this machine")
        plain_WK = numbers(weight)
        self.width, inputs = plain_WK.shape
        self.weight = functional.pad(plain_WK, (0, 0, 0, -self.width % LANES)).view(-1, LANES, inputs)
        self.weight = self.weight.transpose(1, 2).contiguous()
        self.bias = None if bias_W is None else bias_W.float().contiguous()
        bias = 0 if self.bias is None else self.bias.data_ptr()
        self._product, self._given = found.weft_floats, (self.weight.data_ptr(), inputs, self.width, bias)

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        rows = (rows_TK if rows_TK.dtype is torch.float32 else rows_TK.float()).contiguous()
        out = torch.empty(len(rows), self.width)
        given = rows.data_ptr(), len(rows), out.data_ptr(), torch.get_num_threads()
        self._product(*self._given, *given)
        return out if rows_TK.dtype is torch.float32 else out.to(rows_TK.dtype)
