"""Rows turned so that no number of them stands out: outliers are what rounding to 8 bits loses most by.

Each 64 numbers of a row are multiplied by an orthogonal matrix of plus and minus one eighth (Sylvester's), and so are
those of the weight: products stay what they were, and what was large in one number is spread over 64. (QuaRot, arXiv
2404.00456, does it with whole rows, and folds what it can into weights.) Knows rows.

Shapes: T rows, K inputs, made up to whole turns; W outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from weft.model.kernels.linear import Linear

TURN = 64  # numbers that are turned together: a power of two


def matrix() -> Tensor:
    """[TURN, TURN], symmetric, its own inverse."""
    found = torch.ones(1, 1)
    while len(found) < TURN:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found.div(TURN**0.5)


def made_up(inputs: int) -> int:
    """To whole turns."""
    return -(-inputs // TURN) * TURN


def turned(rows: Tensor) -> Tensor:
    """[n, K] of a weight, as it is gathered; made up with zeros."""
    padded = functional.pad(rows, (0, made_up(rows.shape[1]) - rows.shape[1])).contiguous()
    return torch.mm(padded.view(-1, TURN), matrix()).view(padded.shape)


class Turned:
    """A product with a weight whose rows were turned. `turn`: a product with `matrix`, that keeps row bits."""

    def __init__(self, inner: Linear, turn: Linear, inputs: int) -> None:
        self.inner, self.turn, self.inputs, self.width = inner, turn, made_up(inputs), inner.width

    def __call__(self, rows_TK: Tensor) -> Tensor:
        """See `Linear`."""
        if more := self.inputs - rows_TK.shape[1]:
            rows_TK = functional.pad(rows_TK, (0, more))
        return self.inner(self.turn(rows_TK.reshape(-1, TURN)).view(-1, self.inputs))
