"""Products with weights of few bits.

In int8 a row is rounded to whole numbers by a scale of its own, so that products are exact sums of whole numbers: a
row's result can't depend on its neighbours, and kernels differ in speed alone. In int4 rows stay floats.

Shapes: T rows, K inputs, W outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.formats.packed import Codes
from weft.model.kernels.linear import MadeUp, NoKernel, Stored, biased, codes, operator

LEVELS = (127, 63)  # of rows: the second where the processor's sums of two products end at 16 bits
SMALLEST = 1e-30  # of a row's scale: rows of zeros have one too
GROUP = 32  # numbers of int4 that share a scale
OUTPUTS = 16  # of which int4's kernels want a multiple


class _WholeNumbers(MadeUp):
    """MadeUp to whole numbers, their product, and back. Raises `NoKernel` where none comes out right."""

    def __init__(self, weight: Stored, bias_W: Tensor | None, least: int, levels: int) -> None:
        self.codes_shape = codes(weight)[0].shape
        super().__init__(self.codes_shape[0], least)
        self.bias, self.levels, self._a_level = bias_W, levels, 1.0 / levels

    def product(self, rows_TK: Tensor) -> Tensor:
        """See `MadeUp`."""
        rows = rows_TK.float()
        scales = rows.abs().amax(1, keepdim=True).clamp_min_(SMALLEST).mul_(self._a_level)
        product = self.whole(torch.div(rows, scales).round_()).mul_(scales)
        return biased(product, self.bias).to(rows_TK.dtype)

    def whole(self, rows_TK: Tensor) -> Tensor:
        """Of rows of whole numbers from -levels to levels, which may be overwritten; in float32."""
        raise NotImplementedError


class Fbgemm8(_WholeNumbers):
    """FBGEMM's product: fast for few rows on any x86 processor."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1, levels: int = 0) -> None:
        levels = levels or levels_of("fbgemm")
        super().__init__(weight, bias_W, least, levels)
        self._product = operator("quantized.linear_with_input_q_dq_qweight_dq_output_fp32")
        self.weight, self._zero = _fbgemm_packed(*codes(weight)), levels + 1

    def whole(self, rows_TK: Tensor) -> Tensor:
        """See `_WholeNumbers`."""
        return self._product(rows_TK, 1.0, self._zero, self.weight)


def _fbgemm_packed(codes_WK: Tensor, scales_W1: Tensor) -> Any:
    engines = torch.backends.quantized
    if "fbgemm" not in engines.supported_engines or 0 in codes_WK.shape:
        raise NoKernel("this torch was built without FBGEMM")
    before, zeros = engines.engine, torch.zeros(codes_WK.shape[0], dtype=torch.int64)
    try:
        engines.engine = "fbgemm"
        with warnings.catch_warnings():  # torch means to do without such tensors one day; oneDNN's kernel does already
            warnings.simplefilter("ignore")
            typed = torch._make_per_channel_quantized_tensor(codes_WK, scales_W1[:, 0].double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(typed, None)
    except (AttributeError, RuntimeError) as error:
        raise NoKernel(str(error)) from None
    finally:
        engines.engine = before


class OneDnn8(_WholeNumbers):
    """oneDNN's product: fastest for many rows where the processor multiplies bytes (VNNI, AMX)."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1, levels: int = 0) -> None:
        levels = levels or levels_of("onednn")
        super().__init__(weight, bias_W, least, levels)
        whole, scales = codes(weight)
        self._product = operator("onednn.qlinear_pointwise")
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise NoKernel("this torch was built without oneDNN")
        self.weight = operator("onednn.qlinear_prepack")(whole.contiguous(), None)
        self._scales, self._zeros = scales[:, 0].clone(), torch.zeros(self.width, dtype=torch.int64)
        self._zero = levels + 1

    def whole(self, rows_TK: Tensor) -> Tensor:
        """See `_WholeNumbers`."""
        rows = rows_TK.add_(self._zero).to(torch.uint8)
        weight = self.weight, self._scales, self._zeros, None
        return self._product(rows, 1.0, self._zero, *weight, 1.0, 0, torch.float32, "none", [], "")


@cache
def levels_of(name: str) -> int:
    """How many levels of rows a kernel adds up rightly on this processor, tried on the largest sums that there are.
    Raises `NoKernel`."""
    kernel = INT8[name]
    for levels in LEVELS:
        weight = torch.full((64, 256), 127, dtype=torch.int8)
        weight[1::2] *= -1
        weight[2::4, ::2] = 0
        rows = torch.full((9, 256), float(levels))
        rows[1::2] *= -1
        rows[4, ::3], rows[5:] = 0, torch.randint(-levels, levels + 1, (4, 256)).float()
        exact = rows.double() @ weight.double().T
        product = kernel(Codes(weight, torch.ones(64, 1)), None, 1, levels)
        if all(torch.equal(product.whole(rows[:n].clone()).double(), exact[:n]) for n in (1, 2, 9)):
            return levels
    raise NoKernel("its sums are wrong on this processor")


INT8: dict[str, type[Fbgemm8] | type[OneDnn8]] = {"fbgemm": Fbgemm8, "onednn": OneDnn8}


class Groups4(MadeUp):
    """torch's product with 4 bits a number, in groups; rows go in as `dtype`."""

    def __init__(
        self, weight: Stored, bias_W: Tensor | None = None, least: int = 1, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        whole, scales = codes(weight)
        assert isinstance(weight, Codes) and weight.offsets is not None, "groups have offsets"
        super().__init__(whole.shape[0], least)
        self.bias, self.dtype, self.inputs = bias_W, dtype, whole.shape[1]  # made up to whole groups
        self._product = operator("aten._weight_int4pack_mm_for_cpu")
        made_up = -self.width % OUTPUTS
        self.outputs = self.width + made_up
        whole, scales, offsets = (functional.pad(each, (0, 0, 0, made_up)) for each in (whole, scales, weight.offsets))
        self.weight = operator("aten._convert_weight_to_int4pack_for_cpu")(whole.int(), 1)
        scales_lows = torch.stack([scales, offsets + 8 * scales], 2)  # the kernel's codes count from 8 down
        self.scales_lows = scales_lows.transpose(0, 1).to(dtype).contiguous()

    def product(self, rows_TK: Tensor) -> Tensor:
        """See `MadeUp`."""
        rows = rows_TK.to(self.dtype)
        if made_up := self.inputs - rows.shape[1]:
            rows = functional.pad(rows, (0, made_up))
        product = self._product(rows.contiguous(), self.weight, GROUP, self.scales_lows)
        if self.outputs != self.width:
            product = product[:, : self.width]
        return biased(product.to(rows_TK.dtype), self.bias)
