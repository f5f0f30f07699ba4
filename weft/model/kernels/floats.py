"""Products with float weights. Packed ones lie in an order that a library's kernel reads at the memory's full speed.

Shapes: T rows, K inputs, W outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from weft.model.kernels.linear import MadeUp, NoKernel, Stored, numbers, operator

PACKED_ROWS = 1024  # MKL lays the weight out for this many rows; it then serves any count
NARROW = 32  # outputs below which a row's bits depend on the row count, on some processors: weights get rows of zeros


class PlainProduct(MadeUp):
    """torch's own product, with the weight as it is. `block`: rows of one product, where row bits are asked for, always
    the same number; 0: all that come."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1, block: int = 0) -> None:
        self.weight, self.block = numbers(weight), block
        self.bias = None if bias_W is None else bias_W.to(self.weight.dtype)
        super().__init__(self.weight.shape[0], least)
        if block and (narrow := NARROW - self.width) > 0 and self.weight.numel():
            self.weight = functional.pad(self.weight, (0, 0, 0, narrow))
            self.bias = None if self.bias is None else functional.pad(self.bias, (0, narrow))

    def product(self, rows_TK: Tensor) -> Tensor:
        """See `MadeUp`."""
        rows, dtype, count = rows_TK.to(self.weight.dtype), rows_TK.dtype, rows_TK.shape[0]
        if not self.block:
            return functional.linear(rows, self.weight, self.bias).to(dtype)
        padded = functional.pad(rows, (0, 0, 0, -count % self.block))
        blocks = [functional.linear(block, self.weight, self.bias) for block in torch.split(padded, self.block)]
        return torch.cat(blocks)[:count, : self.width].contiguous().to(dtype)


class MklProduct(MadeUp):
    """MKL's packed product, of float32."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1) -> None:
        plain, self.bias = numbers(weight), bias_W
        super().__init__(plain.shape[0], least)
        self._product = operator("mkl._mkl_linear")
        self.weight = operator("mkl._mkl_reorder_linear_weight")(plain, PACKED_ROWS)
        self._shape = torch.empty(1).expand(plain.shape)  # that is all that is read of the unpacked weight

    def product(self, rows_TK: Tensor) -> Tensor:
        """See `MadeUp`."""
        product = self._product(rows_TK.float(), self.weight, self._shape, self.bias, rows_TK.shape[0])
        return product.to(rows_TK.dtype)


class OneDnnProduct(MadeUp):
    """oneDNN's product, of float32 or bfloat16, with a packed weight; `packed=False`: with the weight as it is, which
    somebody else may use too."""

    def __init__(self, weight: Stored, bias_W: Tensor | None = None, least: int = 1, packed: bool = True) -> None:
        self.weight = numbers(weight)
        super().__init__(self.weight.shape[0], least)
        self.dtype = self.weight.dtype
        self.bias = None if bias_W is None else bias_W.to(self.dtype)
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise NoKernel("this torch was built without oneDNN")
        self._product = operator("mkldnn._linear_pointwise")
        if packed:
            self.weight = operator("mkldnn._reorder_linear_weight")(self.weight)

    def product(self, rows_TK: Tensor) -> Tensor:
        """See `MadeUp`."""
        return self._product(rows_TK.to(self.dtype), self.weight, self.bias, "none", [], "").to(rows_TK.dtype)
