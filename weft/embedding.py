"""A prompt's embedding: the mean of its tokens' last hidden states, or that of its last token alone.

Knows numbers; knows no model and no request.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class Embedding:
    """Sums of rows, as batches bring them."""

    def __init__(self) -> None:
        self._total: Vector | None = None
        self._rows = 0

    def add(self, total: bytes, rows: int) -> None:
        """What so many `rows` add up to: float64 [width]. Raises ValueError for what is no number."""
        more = np.frombuffer(total, np.float64)
        if not np.isfinite(more).all():
            raise ValueError("the model computed numbers that are none (not finite) for this request")
        self._total = more if self._total is None else self._total + more
        self._rows += rows

    @property
    def mean(self) -> Vector:
        """[width]."""
        assert self._total is not None, "every pooled prompt has a row"
        return self._total / self._rows


def unit(vector: Vector, dimensions: int | None = None) -> Vector:
    """Its first numbers, or all, at length 1; of nothing but zeros nothing else can be made."""
    cut = vector[:dimensions]
    return cut / (float(np.linalg.norm(cut)) or 1.0)
