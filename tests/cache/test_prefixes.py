"""Which slots hold the beginning of which tokens."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from weft.cache.prefixes import Prefix, Prefixes, packed, shared

TOKENS = st.lists(st.integers(0, 3), max_size=40)


@given(TOKENS, TOKENS, TOKENS)
def test_shared_is_the_common_beginning(common: list[int], one: list[int], other: list[int]) -> None:
    left, right = common + one, common + other
    expected = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    assert shared(packed(left), packed(right)) == expected


def test_the_longest_is_found_and_counts_as_used() -> None:
    prefixes = Prefixes(2)
    assert prefixes.keep(0, packed([1, 2, 3, 4])) == [] and prefixes.keep(1, packed([1, 2, 9])) == []
    assert prefixes.longest(packed([1, 2, 3, 7, 7])) == Prefix(0, 3)
    assert prefixes.longest(packed([5, 2, 3])) is None
    assert prefixes.keep(2, packed([8, 8])) == [1], "the least recently used goes"
    prefixes.check_integrity()


def test_nothing_is_kept_twice() -> None:
    prefixes = Prefixes(4)
    prefixes.keep(0, packed([1, 2]))
    assert prefixes.keep(1, packed([1, 2, 3])) == [0], "the longer one holds the shorter one"
    assert prefixes.keep(2, packed([1, 2])) == [2] and prefixes.keep(3, b"") == [3]
    assert len(prefixes) == 1 and prefixes.length(1) == 3 and prefixes.clear() == [1] and len(prefixes) == 0


def test_none_allowed_keeps_none() -> None:
    assert Prefixes(0).keep(5, packed([1])) == [5]
