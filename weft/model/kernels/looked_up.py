"""The embedding: a weight of which rows are looked up. Knows rows.

Shapes: W rows, K numbers of each, n that are looked up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.formats.packed import Codes
from weft.model.kernels.linear import Stored


class LookedUp:
    """Rows of a weight [W, K] by their numbers, in a `dtype`."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype
        self.numbers = stored.codes if isinstance(stored, Codes) else stored

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.numbers.device

    def __call__(self, places_n: Tensor) -> Tensor:
        """[n, K], memory of its own."""
        if isinstance(self.stored, Codes):
            return self.stored.rows(places_n).numbers().to(self.dtype)
        return self.stored[places_n].to(self.dtype)
