"""Models split over ranks, for the tests of a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks
    from tests.tiny import Checkpoints

KEPT = 6  # each rank is three threads that give signs of life: hundreds of them starve each other


@pytest.fixture(scope="module")
def split(checkpoints: Checkpoints) -> Iterator[object]:
    """Models split over ranks, the last ones kept for the tests of one model."""
    from tests.ranks import Ranks  # torch

    kept: OrderedDict[object, Ranks] = OrderedDict()

    def get(name: str, shares: tuple[float, ...], exact_rows: bool = False, lags: tuple[int, ...] = (0, 0),
            times: int = 1, layers: tuple[int, ...] = ()) -> Ranks:  # fmt: skip
        key = (name, shares, exact_rows, lags, times, layers)
        if key in kept and kept[key].broken:
            del kept[key]  # not closed: that could wait for ever
        if key not in kept:
            if len(kept) == KEPT:
                _, oldest = kept.popitem(last=False)
                if not oldest.broken:
                    oldest.close()
            kept[key] = Ranks(checkpoints.directory(name), shares, exact_rows, lags=lags, times=times, layers=layers)
        kept.move_to_end(key)
        return kept[key]

    yield get
    for ranks in kept.values():
        if not ranks.broken:
            ranks.close()
