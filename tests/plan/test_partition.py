"""Layers of a pipeline's sections, by how fast these are."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import InputError
from weft.layout import even_layers
from weft.plan.partition import NOISE, partition


@pytest.mark.parametrize(
    ("layers", "seconds", "ends", "most", "expected"),
    [
        (32, (1.0, 1.0), (0.0, 0.0), (99, 99), (16, 16)),
        (30, (1.0, 2.0), (0.0, 0.0), (99, 99), (20, 10)),
        (32, (1.0, 1.0, 1.0), (0.0, 0.0, 5.0), (99, 99, 99), (12, 12, 8)),
        (32, (1.0, 1.0), (0.0, 0.0), (10, 99), (10, 22)),  # the first one has no more room
        (4, (1.0, 1.0, 1.0, 50.0), (0.0,) * 4, (99,) * 4, (1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_by_hand(layers, seconds, ends, most, expected) -> None:
    found = partition(layers, seconds, ends, most)
    assert found.layers == expected
    assert found.bottleneck == max(e + s * n for s, e, n in zip(seconds, ends, expected, strict=True))


@given(layers=st.integers(3, 14), data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_other_partition_has_a_faster_slowest_section(layers: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(4, layers)))
    some = st.floats(0.1, 5.0)
    seconds = data.draw(st.lists(some, min_size=sections, max_size=sections))
    ends = data.draw(st.lists(st.floats(0.0, 9.0), min_size=sections, max_size=sections))
    most = data.draw(st.lists(st.integers(layers // 2, layers), min_size=sections, max_size=sections))
    if sum(most) < layers:
        return
    found = partition(layers, seconds, ends, most)
    assert sum(found.layers) == layers and all(1 <= n <= room for n, room in zip(found.layers, most, strict=True))
    others = []
    for cuts in combinations(range(1, layers), sections - 1):
        counts = [b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True)]
        if all(count <= room for count, room in zip(counts, most, strict=True)):
            others.append(max(e + s * n for s, e, n in zip(seconds, ends, counts, strict=True)))
    assert found.best == pytest.approx(min(others)) and found.bound <= found.bottleneck + 1e-9
    if found.layers != even_layers(layers, sections):
        assert found.bottleneck == found.best and (found.even is None or found.even > (1 + NOISE) * found.best)
    assert found.best <= found.bottleneck <= (1 + NOISE) * found.best


def test_even_layers_where_uneven_ones_are_no_more_than_noise() -> None:
    """On ranks that are alike one was measured to be a little slower, and got two of six layers."""
    found = partition(6, (1.0, 0.98), (0.0, -0.95), (6, 6))
    assert found.layers == (3, 3)
    found = partition(30, (1.0, 1.08), (0.0, 0.0), (30, 30))
    assert found.layers == (15, 15) and "uneven ones 1.03: no more than noise" in found.describe()
    found = partition(6, (1.0, 0.5), (0.0, 0.0), (6, 6))
    assert found.layers == (2, 4) and found.describe().endswith("of the least possible, with 3,3 1.50")
    assert partition(6, (1.0, 1.0), (0.0, 0.0), (2, 6)).even is None
    assert "whole layers allow no less" in partition(5, (1.0, 1.0), (0.0, 0.0), (5, 5)).describe()


def test_the_certificate() -> None:
    """Of models with layers enough for it, the slowest section takes at most 1.1 of what no partition goes below."""
    for sections in (2, 3, 4):
        for speed in (0.5, 1.0, 1.7):
            found = partition(60, (1.0,) * (sections - 1) + (speed,), (0.2,) * sections, (60,) * sections)
            assert found.bound <= found.bottleneck <= 1.1 * found.bound
    assert "takes 1.0" in found.describe()


def test_no_room() -> None:
    with pytest.raises(InputError, match=r"room for 3,4 layers, and the model has 8"):
        partition(8, (1.0, 1.0), (0.0, 0.0), (3, 4))
