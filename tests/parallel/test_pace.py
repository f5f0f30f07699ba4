"""Paced links: messages take what they would over the link, to a few percent, whatever they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import Threads, grouped
from weft.links import BURST
from weft.parallel.direct import Direct
from weft.parallel.group import Group, wait_all
from weft.parallel.pace import HEADERS, SEGMENT, Pace, on_the_wire

MBIT = 1e6


@pytest.fixture
def pair() -> Iterator[tuple[Threads, list[Group]]]:
    with grouped(2, "tcp") as made:
        yield made


def paced(groups: list[Group], rate: float | None, delay: float = 0.0, shared: str = "") -> None:
    for group in groups:
        assert isinstance(group._transport, Direct)
        group._transport.pace(Pace(rate, delay, shared))


def seconds(threads: Threads, work: Callable[[int], object]) -> float:
    """The slower rank's."""

    def timed(rank: int) -> float:
        begin = time.perf_counter()
        work(rank)
        return time.perf_counter() - begin

    return max(threads.each(timed))


def about(taken: float, expected: float) -> bool:
    """Never sooner; later by what a busy machine adds. benchmarks/pacing.py says how exact it is."""
    return 0.98 * expected <= taken <= 1.3 * expected + 0.03


def exchanged(groups: list[Group], size: int, times: int) -> Callable[[int], None]:
    def rank(r: int) -> None:
        sent, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        for _ in range(times):
            groups[r].exchange(sent, received, 1 - r)

    return rank


def test_headers_are_counted_as_ethernet_has_them() -> None:
    assert on_the_wire(1) == 1 + HEADERS and on_the_wire(SEGMENT) == SEGMENT + HEADERS
    assert on_the_wire(SEGMENT + 1) == SEGMENT + 1 + 2 * HEADERS


@pytest.mark.parametrize(("size", "times"), [(1_000_000, 4), (50_000, 40)])
def test_the_rate_is_kept_both_ways_at_once(pair: tuple[Threads, list[Group]], size: int, times: int) -> None:
    threads, groups = pair
    paced(groups, 200 * MBIT)
    expected = (times * on_the_wire(size + 16) - BURST) * 8 / (200 * MBIT)
    assert about(seconds(threads, exchanged(groups, size, times)), expected)


def test_a_shared_rate_is_half_each_way(pair: tuple[Threads, list[Group]], tmp_path: Path) -> None:
    threads, groups = pair
    paced(groups, 200 * MBIT, shared=str(tmp_path / "link"))
    expected = (8 * on_the_wire(1_000_016) - BURST) * 8 / (200 * MBIT)
    assert about(seconds(threads, exchanged(groups, 1_000_000, 4)), expected)


def test_a_delay_is_waited_for_once_each_way_and_takes_no_rate(pair: tuple[Threads, list[Group]]) -> None:
    threads, groups = pair
    paced(groups, None, delay=0.01)
    assert about(seconds(threads, exchanged(groups, 2304, 10)), 0.1)

    def several(r: int) -> None:  # one behind the other, all under way at once
        received = [groups[r].receive(torch.empty(2304, dtype=torch.uint8), 1 - r) for _ in range(10)]
        wait_all([groups[r].send(torch.zeros(2304, dtype=torch.uint8), 1 - r) for _ in range(10)] + received)

    assert about(seconds(threads, several), 0.01)


def test_an_idle_link_takes_one_burst_and_lanes_share_it(pair: tuple[Threads, list[Group]]) -> None:
    threads, groups = pair
    lanes = threads.each(lambda r: groups[r].on("network2"))
    paced(groups, 10 * MBIT)
    size = BURST // 2 - 4096
    assert seconds(threads, exchanged(groups, size, 1)) < 0.01
    assert seconds(threads, exchanged(lanes, size, 1)) < 0.01
    expected = (3 * on_the_wire(size + 16) - BURST) * 8 / (10 * MBIT)
    assert about(seconds(threads, exchanged(lanes, size, 1)), expected - 0.02)


def test_four_ranks_share_what_each_sends() -> None:
    with grouped(4, "tcp") as (threads, groups):
        paced(groups, 200 * MBIT)
        expected = (3 * on_the_wire(1_000_016) - BURST) * 8 / (200 * MBIT)
        taken = seconds(threads, lambda r: groups[r].all_gather(torch.zeros(1_000_000, dtype=torch.uint8)))
        assert about(taken, expected)


def test_and_then_as_fast_as_it_goes(pair: tuple[Threads, list[Group]]) -> None:
    threads, groups = pair
    paced(groups, 1 * MBIT)
    for group in groups:
        group._transport.pace(None)  # type: ignore[union-attr]
    assert seconds(threads, exchanged(groups, 1_000_000, 4)) < 0.5
