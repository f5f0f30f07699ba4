"""What the decoder does to rows beside its products, each in its fastest form.

`exact_rows=True` chooses forms whose result for a row depends on that row alone, bit for bit: not on how many
rows are computed with it, where it stands among them, or how threads share the work. Vectorised kernels handle
the last few elements of an array by other instructions (torch's silu and complex product do, with other bits),
so there these functions are written in operations that are rounded the same way in either. Where weft's own kernels
are compiled, they do it all in one pass, and exactly. Knows nothing of layers.

Shapes: T rows, K numbers of a row, W outputs, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import CDLL
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from weft.compiled.library import library


def compiled_for(rows: Tensor) -> CDLL | None:
    """weft's own kernels, where they are and compute with such numbers: nothing else may decide, or a row's bits would
    depend on how it lies."""
    return library() if rows.dtype is torch.float32 and rows.is_cpu else None


def activation(name: str, gated: bool, exact_rows: bool) -> Callable[[Tensor], Tensor]:
    """An activation by its name, of [T, W]; `gated`: of the first half of [T, 2W], times the second -> [T, W]."""
    act, cubic = (_EXACT if exact_rows else _FAST)[name], compiled_gate(name)

    def gate(gate_up_T2W: Tensor) -> Tensor:
        if cubic is not None and (found := compiled_for(gate_up_T2W)):
            rows, (count, width) = gate_up_T2W.contiguous(), gate_up_T2W.shape
            out = rows.new_empty(count, width // 2)
            given = rows.data_ptr(), count, width // 2, cubic, out.data_ptr()
            found.weft_gate(*given, torch.get_num_threads())
            return out
        first, second = gate_up_T2W.chunk(2, dim=1)
        return act(first).mul_(second)

    return gate if gated else act


def compiled_gate(name: str) -> int | None:
    """What the compiled gate is told of an activation; None for one that it hasn't."""
    return _BY_SIGMOIDS.get(name)


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
_BY_SIGMOIDS = {"silu": 0, "gelu_tanh": 1}


def capped(values: Tensor, cap: float) -> Tensor:
    """cap * tanh(values / cap), in place, by exp, which is rounded alike wherever a number stands."""
    return values.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)


def rotate(heads_THD: Tensor, angles: Tensor, exact_rows: bool) -> Tensor:
    """Rotary embedding in place: each head's neighbouring pairs as complex numbers, times `angles` [T, 1, D/2].

    Weights are loaded with their rows in pairs (see weights.py), so that one product does it.
    """
    if found := compiled_for(heads_THD):
        (count, heads, rotary), (row, width, one), turns = heads_THD.shape, heads_THD.stride(), angles.contiguous()
        assert one == 1 and turns.numel() * 2 == count * rotary, "a head's numbers lie beside each other"
        given = heads_THD.data_ptr(), count, row, heads, width, rotary, turns.data_ptr()
        found.weft_rotate(*given, torch.get_num_threads())
        return heads_THD
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
        if found := compiled_for(rows_TK):
            rows, count = rows_TK.contiguous(), rows_TK.numel() // self.width
            out = torch.empty_like(rows)
            given = rows.data_ptr(), count, self.width, self.width * self.plain_epsilon, out.data_ptr()
            found.weft_unit(*given, torch.get_num_threads())
            return out
        length: Tensor = torch.linalg.vector_norm(rows_TK, dim=-1, keepdim=True)
        if self.exact_rows:
            return rows_TK / length.square_().add_(self.epsilon.square()).sqrt_()
        return rows_TK / torch.hypot(length, self.epsilon)
