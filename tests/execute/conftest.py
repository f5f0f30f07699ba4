"""Models split over ranks, for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks
    from tests.tiny import Checkpoints


@pytest.fixture(scope="module")
def split(checkpoints: Checkpoints) -> Iterator[object]:
    """Models split over ranks, kept for the tests of one model."""
    from tests.ranks import Ranks  # torch

    kept: dict[object, Ranks] = {}

    def get(name: str, shares: tuple[float, ...], exact_rows: bool = False, lags: tuple[int, ...] = (0, 0),
            times: int = 1, layers: tuple[int, ...] = ()) -> Ranks:  # fmt: skip
        key = (name, shares, exact_rows, lags, times, layers)
        if key not in kept:
            kept[key] = Ranks(checkpoints.directory(name), shares, exact_rows, lags=lags, times=times, layers=layers)
        return kept[key]

    yield get
    for ranks in kept.values():
        ranks.close()
