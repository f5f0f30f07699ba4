"""Products by weft's own compiled kernels: a row's result depends on that row alone, with any number of rows.

With weights of few bits rows are rounded to 8 bits: for int8 by a scale for each, after they were turned; for int4 by a
scale for each group of 32. Knows weights and rows.

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
from weft.model.kernels.linear import Linear, NoKernel, Stored, codes, numbers
from weft.model.kernels.rotation import TURN

LONGEST = 1 << 17  # inputs of int8: so many products of 127 and 127, and what their starts take, fit into 32 bits


class Compiled:
    """What all have in common: with what products.c calls a Weight, and all that it points to."""

    bits = 32

    def __init__(self, width: int, padded: int, bias_W: Tensor | None) -> None:
        found = library()
        if found is None:
            raise NoKernel("nothing is compiled on this machine")
        self.width, self.padded, self.library = width, padded, found
        self.bias = None if bias_W is None else bias_W.float().contiguous()

    def keep(self, codes: Tensor, scales: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Has the kernel multiply with them."""
        self.weight = codes, scales, starts
        places = map(place_of, (*self.weight, self.bias))
        self._weight = Weight(self.bits, self.padded, self.width, -(-self.width // LANES), *places, 0)
        self.address = ctypes.addressof(self._weight)

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        rows = (rows_TK if rows_TK.dtype is torch.float32 else rows_TK.float()).contiguous()
        count, inputs = rows.shape
        assert rows.is_cpu and self.takes(inputs), "rows of another model, or of another device"
        out = torch.empty(count, self.width)
        given = rows.data_ptr(), inputs, count, out.data_ptr(), torch.get_num_threads()
        if count and not self.library.weft_product(self.address, *given):
            raise MemoryError(f"a product of {count} rows")
        return out if rows_TK.dtype is torch.float32 else out.to(rows_TK.dtype)

    def takes(self, inputs: int) -> bool:
        """Whether rows of so many numbers are multiplied."""
        return 0 <= self.padded - inputs < (TURN if self.bits < 32 else 1)


class CompiledFloats(Compiled):
    """float32."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        plain_WK = numbers(weight)
        outputs, inputs = plain_WK.shape
        super().__init__(outputs, inputs, bias_W)
        whole = outputs // LANES * LANES  # no copy of all of it beside what is kept
        blocks = torch.zeros(-(-outputs // LANES), inputs, LANES)
        blocks[: whole // LANES] = plain_WK[:whole].view(-1, LANES, inputs).transpose(1, 2)
        blocks[whole // LANES :, :, : outputs - whole] = plain_WK[whole:].T
        self.keep(blocks)


class CompiledPlain:
    """float32 that lies as it is: an embedding which is the head too."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        self.weight, found = numbers(weight), library()
        if found is None or self.weight.shape[1] % LANES or not self.weight.is_contiguous():
            raise NoKernel("nothing is compiled on this machine, or not for such a weight")
        self.width, inputs = self.weight.shape
        self.library, self.bias = found, None if bias_W is None else bias_W.float().contiguous()
        self._given = self.weight.data_ptr(), inputs, self.width, place_of(self.bias)

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        rows = rows_TK.float().contiguous()
        assert rows.is_cpu and rows.shape[1] == self.weight.shape[1], "rows of another model, or of another device"
        out = torch.empty(rows.shape[0], self.width)
        given = rows.data_ptr(), rows.shape[0], out.data_ptr(), torch.get_num_threads()
        self.library.weft_plain(*self._given, *given)
        return out.to(rows_TK.dtype)


class FewBits(Compiled):
    """Of fewer than 32 bits."""

    def gained(self, scale_K: Tensor) -> Linear:
        """Of rows that are multiplied by a scale first."""
        self.gains = scale_K.float().contiguous()
        self._weight.gains = self.gains.data_ptr()
        return self


class Compiled8(FewBits):
    """int8: rows are turned by the kernel itself, as the weight's were when it was gathered."""

    bits = 8

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        whole_WK, scales_W1 = codes(weight)
        outputs, padded = whole_WK.shape
        super().__init__(outputs, padded, bias_W)
        if padded > LONGEST:
            raise NoKernel(f"sums of {padded} products don't fit into 32 bits")
        made_up = -outputs % LANES
        blocks = functional.pad(whole_WK, (0, 0, 0, made_up)).view(-1, LANES, padded // 4, 4)
        sums = functional.pad(whole_WK.sum(1, dtype=torch.int32), (0, made_up))
        scales = functional.pad(scales_W1[:, 0], (0, made_up)).contiguous()
        starts = sums.mul_(-self.library.weft_shift())
        self.keep(blocks.transpose(1, 2).contiguous(), scales, starts)


class Compiled4(FewBits):
    """int4: scales and offsets of groups as halves of an output's scale, a power of two."""

    bits = 4

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        whole_WK, scales_WG = codes(weight)
        assert isinstance(weight, Codes) and weight.offsets is not None, "groups have offsets"
        outputs, padded = whole_WK.shape
        super().__init__(outputs, padded, bias_W)
        made_up = 0, 0, 0, -outputs % LANES
        largest = torch.maximum(scales_WG.abs().amax(1), weight.offsets.abs().amax(1)).clamp_min_(torch.finfo().tiny)
        scales_W = torch.exp2(torch.log2(largest).ceil_())
        halves = [_halves(functional.pad(each / scales_W[:, None], made_up)) for each in (scales_WG, weight.offsets)]
        eights = functional.pad(whole_WK, made_up).view(-1, LANES, padded // GROUP, GROUP // 8, 2, 4)
        two = eights.permute(0, 2, 3, 4, 1, 5)  # B, G, eights of a group, their halves, outputs, inputs
        packed = two[:, :, :, 1].bitwise_left_shift(4).bitwise_or_(two[:, :, :, 0]).flatten(2)
        self.keep(torch.cat([*halves, packed], 2), functional.pad(scales_W, (0, made_up[-1])))


def _halves(each_WG: Tensor) -> Tensor:
    """Numbers of groups as halves, [B, G, bytes of a block]."""
    blocks = each_WG.view(-1, LANES, each_WG.shape[1]).transpose(1, 2)
    return blocks.half().contiguous().view(torch.uint8)


def place_of(tensor: Tensor | None) -> int:
    """Where it is; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
