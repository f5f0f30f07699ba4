"""Which part a rank holds: everything once, in proportion, for any count of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.config import ModelConfig
from weft.model.families import blueprint_of
from weft.model.shares import tensor_shares

CONFIG = ModelConfig("llama", "", 2, 64, 112, 8, 2, 8, 131, 1e-5, "silu", False, 100, {})


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 500),
)
def test_all_is_held_once_and_in_proportion(shares: list[float], groups: int, group: int, width: int) -> None:
    config = replace(CONFIG, heads=groups * group, kv_heads=groups, intermediate=width)
    parts = tensor_shares(blueprint_of(config), shares)
    for name, total in (("heads", config.heads), ("width", width), ("vocabulary", 131)):
        ranges = [part.ranges[name] for part in parts]
        assert [i for r in ranges for i in r] == list(range(total))
    for part in parts:
        assert sum(run.query.stop - run.query.start for run in part.runs) == len(part.heads)
        assert sum(run.key.stop - run.key.start for run in part.runs) == len(part.kv_heads)
        assert {head // group for head in part.heads} == set(part.kv_heads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shares", "expected", "kv"),
    [
        (8, 2, (1, 1), [4, 4], [1, 1]),
        (8, 2, (1, 1, 1), [3, 3, 2], [1, 2, 1]),
        (8, 2, (1,) * 4, [2] * 4, [1] * 4),  # more ranks than key/value heads: each is held twice
        (6, 6, (2, 1), [4, 2], [4, 2]),
        (2, 1, (1, 1, 1), [1, 1, 0], [1, 1, 0]),  # more ranks than heads: one has no attention
        (12, 6, (1, 1, 1), [4, 4, 4], [2, 2, 2]),
    ],
)
def test_heads(heads: int, kv_heads: int, shares: tuple[float, ...], expected: list[int], kv: list[int]) -> None:
    parts = tensor_shares(blueprint_of(replace(CONFIG, heads=heads, kv_heads=kv_heads)), shares)
    assert [len(part.heads) for part in parts] == expected
    assert [len(part.kv_heads) for part in parts] == kv


def test_runs_of_a_ragged_part() -> None:
    middle = tensor_shares(blueprint_of(CONFIG), (1, 1, 1))[
        1
    ]  # heads 3, 4, 5: one of the first group, two of the second
    assert [(run.query, run.key, run.group) for run in middle.runs] == [
        (slice(0, 1), slice(0, 1), 1),
        (slice(1, 3), slice(1, 2), 2),
    ]
