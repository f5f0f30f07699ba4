"""Whole branches of few rows in one call of weft's own kernels, with the bits of the single calls.

A row that is decoded takes ten calls a layer else, and what Python does between them lasts as long as small products.
Knows a branch's weights and one batch; knows nothing of other stages or ranks. Shapes: see forward.py.
"""

from __future__ import annotations

from ctypes import addressof
from typing import Protocol

import torch
from torch import Tensor

from weft.compiled.library import WholeAttention, WholeMlp
from weft.model.branches import Attention, BranchFunctions, Mlp
from weft.model.elementwise import UnitRows, compiled_for
from weft.model.forward import Extent, Forward
from weft.model.kernels.compiled import Compiled, place_of

MOST_ROWS = 64  # more have no need of it, and would want much memory at once


class AtOnce(Protocol):
    """One branch of one rank, behind its norm."""

    def __call__(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor | None:
        """This rank's partial [L, M] of rows of the residual stream; None, with nothing done, for others than it takes.
        Raises MemoryError."""
        ...


def at_once(norm: UnitRows | None, branch: BranchFunctions, width: int) -> AtOnce | None:
    """A branch of rows of a width, where all of it is compiled."""
    if not isinstance(branch, Mlp | Attention) or (norm is not None and norm.centred):
        return None
    first, last = branch.weights.first, branch.weights.last
    if not isinstance(first, Compiled) or not isinstance(last, Compiled) or not first.takes(width):
        return None
    if isinstance(branch, Mlp):
        return None if branch.cubic is None else _MlpAtOnce(norm, branch.cubic, first, last, width)
    if len(branch.shape.runs) != 1 or any(each.softcap == 0 for each in branch.scorings):
        return None
    return _AttentionAtOnce(norm, branch, first, last, width)


class _Whole:
    """What both have in common."""

    def __init__(self, norm: UnitRows | None, first: Compiled, last: Compiled, width: int) -> None:
        self._products, self._width, self._library = (first, last), width, first.library
        self._epsilon = -1.0 if norm is None else norm.width * norm.plain_epsilon
        self._common = first.address, last.address, width, self._epsilon

    def _takes(self, extent: Extent, hidden_TM: Tensor) -> bool:
        rows, width = hidden_TM.shape
        fits = rows == extent.leaves.length <= MOST_ROWS and width == self._width
        return fits and hidden_TM.is_contiguous() and compiled_for(hidden_TM) is not None

    def _out(self, rows: int) -> Tensor:
        return torch.empty(rows, self._products[1].width)


class _MlpAtOnce(_Whole):
    """A gated MLP."""

    def __init__(self, norm: UnitRows | None, cubic: int, first: Compiled, last: Compiled, width: int) -> None:
        super().__init__(norm, first, last, width)
        assert last.takes(first.width // 2), "the last product is of what the gate leaves"
        self._given = WholeMlp(*self._common, cubic)
        self._address = addressof(self._given)

    def __call__(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor | None:
        """See `AtOnce`."""
        if not self._takes(extent, hidden_TM):
            return None
        rows = hidden_TM.shape[0]
        out = self._out(rows)
        given = hidden_TM.data_ptr(), rows, out.data_ptr(), torch.get_num_threads()
        if not self._library.weft_mlp(self._address, *given):
            raise MemoryError(f"an MLP of {rows} rows")
        return out


class _AttentionAtOnce(_Whole):
    """Attention of single tokens."""

    def __init__(
        self, norm: UnitRows | None, branch: Attention, first: Compiled, last: Compiled, width: int
    ) -> None:  # fmt: skip
        super().__init__(norm, first, last, width)
        shape, scoring, scales = branch.shape, branch.scorings[0], branch.weights.scales
        assert last.takes(shape.queries * shape.width), "the last product is of what heads leave"
        self._branch, self._window = branch, scoring.window
        self._scales = None if scales is None else scales.float().contiguous()
        self._sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
        self._given = WholeAttention(
            *self._common, scoring.softcap or 0.0, shape.queries, shape.groups, shape.width, branch.rotary,
            place_of(self._scales), place_of(self._sinks), branch.unit.width * branch.unit.plain_epsilon,
        )  # fmt: skip
        self._address = addressof(self._given)

    def __call__(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor | None:
        """See `AtOnce`."""
        branch, rows = self._branch, extent.rows
        if not self._takes(extent, hidden_TM) or rows.length != extent.leaves.length:
            return None
        places = forward.places(rows)
        if places is None or forward.query_factors is not None:
            return None
        if any(piece is not None for _, piece in forward.stretches(rows, branch.exact_rows, False)):
            return None
        out = self._out(rows.length)
        angles = None if branch.turn is None else forward.turned(branch.turn, rows)
        places.attend_whole(branch.layer, self._address, self._window, angles, hidden_TM, out)
        return out
