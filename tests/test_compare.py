"""Comparisons: what is measured, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft import LLM
from weft.compare import Comparing, Variant, compare
from weft.program.batch import Batch, Segment
from weft.program.stages import NETWORK
from weft.timeline.timeline import median


@pytest.mark.parametrize("ranks", [1, 2])
def test_rounds_and_figures(packaged: Path, ranks: int) -> None:
    ticks: list[None] = []
    with LLM(packaged, tensor_parallel_size=ranks, num_threads=1) as llm:
        results = compare(llm.engine, list(range(300)), ["iso:2", "tiles:3"], 3, lambda: ticks.append(None))
    assert len(ticks) == 4
    assert [measured.overlap for measured in results] == ["serial", "iso:2", "tiles:3"]
    serial = results[0]
    for measured in results:
        assert len(measured.seconds) == 3
        pairs = zip(measured.seconds, serial.seconds, strict=True)
        assert measured.saving == median(1 - mine / other for mine, other in pairs)
        assert measured.saving_range[0] <= measured.saving <= measured.saving_range[1]
        assert measured.timeline.ranks == list(range(ranks))
        assert (measured.bytes_on_wire > 0) == (ranks > 1)
        assert bool(measured.timeline.lane(0, NETWORK)) == (ranks > 1)
        assert measured.bound >= 0.99 * measured.compute_alone > 0 and measured.network_alone >= 0
    assert serial.saving == 0 and not serial.above_ceiling


def test_wires_and_batches(packaged: Path) -> None:
    """Each wire has its serial, and several prompts are one batch that requests can cut."""
    batch = Batch((Segment(0, 0, 40), Segment(1, 0, 60)))
    variants = [Variant("requests:2", wire) for wire in ("exact", "bf16")]
    counted: list[int] = [0]

    def sent() -> list[int]:
        counted[0] += 1000
        return [counted[0]] * 2

    with LLM(packaged, tensor_parallel_size=2, num_threads=1) as llm:
        comparing = Comparing(llm.engine, batch, list(range(100)), variants, sent)
        for _ in range(3):
            comparing.round()
    exact, bf16, *others = comparing.result()
    assert (exact.overlap, exact.wire, bf16.overlap, bf16.wire) == ("serial", "exact", "serial", "bf16")
    assert [(m.overlap, m.wire) for m in others] == variants
    assert "attention 0:40 40:100" in others[0].plan
    assert bf16.bytes_on_wire < 0.6 * exact.bytes_on_wire
    assert all(m.bytes_on_device == 1000 for m in (exact, bf16, *others))
    first = comparing.rounds[0]
    assert others[1].seconds[0] == first.seconds[variants[1]] and first.serial("bf16") == bf16.seconds[0]
