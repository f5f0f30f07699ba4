"""What this rank owes of each row: what the wires have taken from its partials so far, and a later one is to bring.

All contributions are added to one stream as they are, so a row's next sum may bring what the one before it lacked. At
the end of a pass what is still owed is let go. Knows rows and stages; knows nothing of wires or messages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.execute.residual import Residual
from weft.model.forward import Extent


class Owed:
    """Of the rows of a residual stream, and of the wanted ones alone once only they go on. Rows that are in no two
    collectives at once may be used by several threads."""

    def __init__(self, residual: Residual) -> None:
        self._residual = residual
        self._all = torch.zeros_like(residual.hidden)
        self._kept = torch.zeros_like(residual.kept) if residual.kept is not residual.hidden else self._all

    def of(self, place: int, extent: Extent) -> Tensor:
        """Of the rows that leave a stage, to be read and written."""
        first, last = extent.leaves
        if not self._residual.leaves_alone(place):
            return self._all[first:last]
        if place == self._residual.narrow_from:
            self._kept[first:last] = self._residual.pick(self._all[slice(*extent.rows)], extent.rows)
        return self._kept[first:last]
