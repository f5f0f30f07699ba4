"""The few operations that the decoder is made of, each in its fastest form on this machine.

`exact_rows=True` chooses forms whose result for a row depends on that row alone, bit for bit: not on how many
rows are computed with it, where it stands among them, or how threads share the work. Vectorised kernels handle
the last few elements of an array by other instructions (torch's silu and complex product do, with other bits),
so there these functions are written in operations that are rounded the same way in either.
Knows nothing of layers.

Shapes: T rows, K inputs, W outputs, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

PACKED_ROWS = 1024  # MKL lays the weight out for this many rows; it then serves any count
EXACT_BLOCK = 64  # rows of one matrix product where packed weights are missing and row bits are asked for
# Below this, MKL's packed product keeps to one thread, and the plain one with two was twice as fast (docs/log.md).
PACKED_BYTES = 1 << 20
NARROW = 32  # outputs below which a row's bits depend on the row count, on some processors: weights get rows of zeros


@cache
def packed_weights_work() -> bool:
    """True if MKL's packed matrix product exists here and gives row results independent of the row count.

    The operators are private to torch, so their presence and their promise are tried once, on odd sizes.
    """
    try:
        weight, rows = torch.randn(96, 100), torch.randn(37, 100)
        product = _packed_product(rows, _pack(weight), 96, None)
        alone = _packed_product(rows[5:6].contiguous(), _pack(weight), 96, None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(product, rows @ weight.T, atol=1e-3) and torch.equal(product[5:6], alone))


def _pack(weight_WK: Tensor) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight_WK, PACKED_ROWS)  # type: ignore[no-any-return]


def _packed_product(rows_TK: Tensor, packed: Tensor, width: int, bias: Tensor | None) -> Tensor:
    # The third argument is read for its shape only, so the unpacked weight need not be kept.
    shape = torch.empty(1).expand(width, rows_TK.shape[1])
    return torch.ops.mkl._mkl_linear.default(rows_TK, packed, shape, bias, rows_TK.shape[0])  # type: ignore[no-any-return]


class Linear:
    """`rows @ weight.T + bias`, with the weight packed for MKL where that works and pays (float32 on a CPU).

    `packed=False`: for what few rows go through. A matrix-vector product reads the plain weight a little faster;
    with `exact_rows` each row then has a product of its own.
    """

    def __init__(
        self, weight_WK: Tensor, bias_W: Tensor | None = None, *, exact_rows: bool = False, packed: bool = True
    ) -> None:
        self.width, self.inputs = weight_WK.shape
        self.bias = bias_W
        fits = weight_WK.device.type == "cpu" and weight_WK.dtype == torch.float32 and weight_WK.numel() > 0
        pays = exact_rows or weight_WK.nbytes >= PACKED_BYTES or torch.get_num_threads() == 1
        self.packed = fits and pays and packed and packed_weights_work()
        self.block = 0 if self.packed or not exact_rows else EXACT_BLOCK if packed else 1
        narrow = max(0, NARROW - self.width) if exact_rows and weight_WK.numel() else 0
        if narrow:
            weight_WK = functional.pad(weight_WK, (0, 0, 0, narrow))
            self.bias = None if bias_W is None else functional.pad(bias_W, (0, narrow))
        self.weight = _pack(weight_WK) if self.packed else weight_WK
        # Looked up once, and written out below: decoding calls this a few times a layer for one row.
        self._product = torch.ops.mkl._mkl_linear.default if self.packed else None
        self._shape = torch.empty(1).expand(weight_WK.shape) if self.packed else None
        self._cut = self.width if narrow else 0

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """[T, K] -> [T, W]."""
        if self._product is not None:
            product: Tensor = self._product(rows_TK, self.weight, self._shape, self.bias, rows_TK.shape[0])
        elif self.block:
            product = _in_blocks(rows_TK, self.weight, self.bias, self.block)
        else:
            return functional.linear(rows_TK, self.weight, self.bias)
        return product if not self._cut else product[:, : self._cut].contiguous()


def _in_blocks(rows_TK: Tensor, weight_WK: Tensor, bias_W: Tensor | None, size: int) -> Tensor:
    """Always the same matrix product, of `size` rows, the last ones padded with zeros."""
    count = rows_TK.shape[0]
    padded = functional.pad(rows_TK, (0, 0, 0, -count % size))
    blocks = [functional.linear(block, weight_WK, bias_W) for block in torch.split(padded, size)]
    return torch.cat(blocks)[:count] if blocks else rows_TK.new_empty(0, weight_WK.shape[0])


def activation(name: str, gated: bool, exact_rows: bool) -> Callable[[Tensor], Tensor]:
    """An activation by its name, of [T, W]; `gated`: of the first half of [T, 2W], times the second -> [T, W]."""
    act = (_EXACT if exact_rows else _FAST)[name]

    def gate(gate_up_T2W: Tensor) -> Tensor:
        first, second = gate_up_T2W.chunk(2, dim=1)
        return act(first).mul_(second)

    return gate if gated else act


def _sigmoid_times(rows: Tensor, negated: Tensor) -> Tensor:
    """rows * sigmoid(-negated), overwriting `negated`."""
    return torch.div(rows, negated.exp_().add_(1), out=negated)


def _tanh_gelu(rows: Tensor) -> Tensor:
    """(1 + tanh(u)) / 2 is sigmoid(2u)."""
    inner = torch.addcmul(rows, rows.square(), rows, value=0.044715)
    return _sigmoid_times(rows, inner.mul_(-2 * math.sqrt(2 / math.pi)))


def _erf_gelu(rows: Tensor) -> Tensor:
    return torch.mul(rows, math.sqrt(0.5)).erf_().add_(1).mul_(rows).mul_(0.5)


def _relu2(rows: Tensor) -> Tensor:
    return torch.relu(rows).square_()


_FAST: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu2": _relu2,
}  # fmt: skip
_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda rows: _sigmoid_times(rows, torch.neg(rows)), "gelu": _erf_gelu, "gelu_tanh": _tanh_gelu,
    "relu2": _relu2,
}  # fmt: skip


def capped(values: Tensor, cap: float) -> Tensor:
    """cap * tanh(values / cap), in place, by exp, which is rounded alike wherever a number stands."""
    return values.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)


def rotate(heads_THD: Tensor, angles: Tensor, exact_rows: bool) -> Tensor:
    """Rotary embedding in place: each head's neighbouring pairs as complex numbers, times `angles` [T, 1, D/2].

    Weights are loaded with their rows in pairs (see weights.py), so that one product does it.
    """
    pairs = torch.unflatten(heads_THD, 2, (-1, 2))
    if not exact_rows and heads_THD.dtype is torch.float32:  # torch has no complex bfloat16
        torch.view_as_complex(pairs).mul_(angles)
        return heads_THD
    cosine, sine = torch.view_as_real(angles).unbind(-1)
    real, imaginary = pairs.unbind(3)
    turned = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    pairs.copy_(torch.stack(turned, dim=3))
    return heads_THD


class UnitRows:
    """Rows of `width` numbers made one size: over the root of their sum of squares plus width * epsilon; `centred`:
    less their mean, and over their standard deviation.

    Times sqrt(width) the first is the root-mean-square norm; whoever loads weights folds sqrt(width) and the norm's own
    weight into the projection that follows, so that two passes over the rows are enough.
    """

    def __init__(
        self, width: int, epsilon: float, device: torch.device, exact_rows: bool, centred: bool = False
    ) -> None:
        self.width, self.plain_epsilon, self.exact_rows, self.centred = width, epsilon, exact_rows, centred
        self.epsilon = torch.tensor(math.sqrt(width * epsilon), device=device)

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """[..., width]."""
        if self.centred:
            return functional.layer_norm(rows_TK, (self.width,), eps=self.plain_epsilon)
        length: Tensor = torch.linalg.vector_norm(rows_TK, dim=-1, keepdim=True)
        if self.exact_rows:
            return rows_TK / length.square_().add_(self.epsilon.square()).sqrt_()
        return rows_TK / torch.hypot(length, self.epsilon)
