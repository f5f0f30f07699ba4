"""What every product with a weight is to the rest of the model. Knows rows; knows nothing of how they are multiplied.

Shapes: T rows, K inputs, W outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from weft.formats.packed import Codes

Stored = Tensor | Codes  # a weight [W, K]: numbers, or codes with their scales


class Linear(Protocol):
    """`rows @ weight.T + bias`, of one weight."""

    width: int  # W

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """[T, K] -> [T, W], in the dtype of the rows."""
        ...


Maker = Callable[[Stored, Tensor | None, int], Linear]
"""Makes a product with a weight and its bias [W], if it has one; the number is that of rows to which fewer are made
up. Raises `NoKernel`."""


class NoKernel(Exception):
    """This torch, this processor or this shape hasn't that kernel."""


class Gained:
    """A product whose rows are multiplied by a scale first, and a bias added: a norm's, which codes can't take in."""

    def __init__(self, inner: Linear, scale_K: Tensor, bias_K: Tensor | None) -> None:
        self.inner, self.width, self.scale, self.bias = inner, inner.width, scale_K, bias_K

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        rows = rows_TK * self.scale
        return self.inner(rows if self.bias is None else rows.add_(self.bias))


class InBlocks:
    """A product that is always one of so many rows, so that a row has the same bits in any batch."""

    def __init__(self, inner: Linear, rows: int) -> None:
        self.inner, self.rows, self.width = inner, rows, inner.width

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        padded = functional.pad(rows_TK, (0, 0, 0, -rows_TK.shape[0] % self.rows))
        products = [self.inner(block) for block in torch.split(padded, self.rows)]
        return torch.cat(products)[: rows_TK.shape[0]] if rows_TK.shape[0] else rows_TK.new_empty(0, self.width)


class MadeUp:
    """What kernels have in common: few rows are made up to `least`, where fewer would have other bits."""

    def __init__(self, width: int, least: int) -> None:
        self.width, self.least = width, least

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        count = rows_TK.shape[0]
        if count >= self.least:
            return self.product(rows_TK)
        if not count:
            return rows_TK.new_empty(0, self.width)
        made_up = (
            rows_TK.expand(self.least, -1) if count == 1 else functional.pad(rows_TK, (0, 0, 0, self.least - count))
        )
        return self.product(made_up)[:count]

    def product(self, rows_TK: Tensor) -> Tensor:
        """Of `least` rows or more, and of at least one."""
        raise NotImplementedError


def biased(product_TW: Tensor, bias_W: Tensor | None) -> Tensor:
    """Plus the bias, in place: where a kernel can't, because rows have scales."""
    return product_TW if bias_W is None else product_TW.add_(bias_W)


def numbers(weight: Stored) -> Tensor:
    """Of a format that keeps them as they are."""
    assert isinstance(weight, Tensor), "floats are not packed"
    return weight


def codes(weight: Stored) -> tuple[Tensor, Tensor]:
    """Of a format that keeps codes: them, and their scales."""
    assert isinstance(weight, Codes) and weight.scales is not None, "codes have scales"
    return weight.codes, weight.scales


def operator(name: str) -> Callable[..., Tensor]:
    """An operator of torch's by its name, "mkl._mkl_linear" say. Raises `NoKernel` where this torch hasn't it: most of
    those used here are private."""
    found: Any = torch.ops
    try:
        for part in name.split("."):
            found = getattr(found, part)
        return found.default  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        raise NoKernel(f"this torch has no operator {name}") from None
