"""Comparisons: what is measured, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft import LLM
from weft.compare import compare
from weft.program.steps import Lane
from weft.timeline.timeline import median


@pytest.mark.parametrize("ranks", [1, 2])
def test_rounds_and_figures(packaged: Path, ranks: int) -> None:
    ticks: list[None] = []
    with LLM(packaged, tensor_parallel_size=ranks, num_threads=1) as llm:
        result = compare(llm.engine, list(range(300)), ["iso:2", "tiles:3"], 3, lambda: ticks.append(None))
    assert len(result.rounds) == 3 and len(ticks) == 4 and result.tokens == 300
    assert [measured.overlap for measured in result.strategies] == ["iso:2", "tiles:3"]
    for measured in result.strategies:
        assert measured.seconds == [r.strategies[measured.overlap] for r in result.rounds]
        assert measured.saving == median(1 - r.strategies[measured.overlap] / r.serial for r in result.rounds)
        assert measured.timeline.ranks == list(range(ranks))
        assert (measured.bytes_on_wire > 0) == (ranks > 1)
        assert bool(measured.timeline.lane(0, Lane.NETWORK)) == (ranks > 1)
    assert result.bound >= median(r.compute_alone for r in result.rounds)
    assert result.compute_alone > 0 and result.network_alone >= 0
