"""Messages between ranks: in order, of any size, both ways at once, and never of another size than is expected."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Threads, grouped
from weft.errors import LinkLost
from weft.parallel import ring
from weft.parallel.group import Group, wait_all

WAYS = ["shm", "tcp", "tls", "gloo"]


@pytest.fixture(params=WAYS, scope="module")
def two(request: pytest.FixtureRequest) -> Iterator[tuple[Threads, list[Group]]]:
    with grouped(2, request.param) as made:
        yield made


def numbers(seed: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_messages_come_whole_and_in_order(two: tuple[Threads, list[Group]], seed: int) -> None:
    """Sizes around all that rings, pieces and headers are made of, several under way at once."""
    threads, groups = two
    draw = random.Random(seed)
    edges = [1, 3, 16, 4096, ring.PIECE, ring.RING - 16, ring.RING, 2 * ring.RING + 5]
    sizes = [max(1, draw.choice(edges) + draw.randrange(-17, 18)) for _ in range(25)]

    def rank(r: int) -> bool:
        group, sent, received = groups[r], [], []
        for number, size in enumerate(sizes):
            received.append(torch.empty(size, dtype=torch.uint8))
            sent.append(numbers(2 * number + r, size))
        transfers = [group.receive(each, 1 - r) for each in received]
        wait_all([group.send(each, 1 - r) for each in sent] + transfers)
        expected = [numbers(2 * number + 1 - r, size) for number, size in enumerate(sizes)]
        return all(map(torch.equal, received, expected))

    assert threads.each(rank) == [True, True]


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_among_other_messages(two: tuple[Threads, list[Group]], seed: int) -> None:
    threads, groups = two
    draw = random.Random(seed)
    sizes = [draw.choice([4, 100, 2304, 70_000, 1_000_000]) for _ in range(200)]

    def rank(r: int) -> bool:
        right = True
        for number, size in enumerate(sizes):
            if number % 7 == 3:  # one way only
                if number % 2 == r:
                    groups[r].send(numbers(number, size), 1 - r).wait()
                    continue
                received = torch.empty(size, dtype=torch.uint8)
                groups[r].receive(received, 1 - r).wait()
                right = right and torch.equal(received, numbers(number, size))
                continue
            received = torch.empty(size, dtype=torch.uint8)
            groups[r].exchange(numbers(2 * number + r, size), received, 1 - r)
            right = right and torch.equal(received, numbers(2 * number + 1 - r, size))
        return right

    assert threads.each(rank) == [True, True]


def test_more_than_buffers_hold_both_ways_at_once(two: tuple[Threads, list[Group]]) -> None:
    threads, groups = two

    def rank(r: int) -> bool:
        received = torch.empty(48 << 20, dtype=torch.uint8)
        groups[r].exchange(numbers(r, 48 << 20), received, 1 - r)
        return torch.equal(received, numbers(1 - r, 48 << 20))

    assert threads.each(rank) == [True, True]


def test_nothing_is_no_message(two: tuple[Threads, list[Group]]) -> None:
    threads, groups = two

    def rank(r: int) -> None:
        groups[r].exchange(torch.empty(0, 8), torch.empty(0, 8), 1 - r)
        groups[r].barrier()

    threads.each(rank)


@pytest.mark.parametrize("way", ["shm", "tcp", "tls"])
@pytest.mark.parametrize("sizes", [(100, 101), (100, 99), (70_000, 100), (100, 70_000)])
def test_another_size_than_was_due_is_an_error(way: str, sizes: tuple[int, int]) -> None:
    with grouped(2, way) as (threads, groups):

        def rank(r: int) -> None:
            sent, due = torch.zeros(sizes[0], dtype=torch.uint8), torch.zeros(sizes[1], dtype=torch.uint8)
            if r == 0:
                groups[0].send(sent, 1).wait()
            else:
                with pytest.raises(LinkLost, match=f"rank 0 sent {sizes[0]} bytes where {sizes[1]} were due"):
                    groups[1].receive(due, 0).wait()

        threads.each(rank)


@pytest.mark.parametrize("way", WAYS)
def test_lanes_and_some_of_the_ranks(way: str) -> None:
    with grouped(4, way) as (threads, groups):

        def rank(r: int) -> list[float]:
            some = (0, 2, 3)
            lane = groups[r].on("network2")
            assert lane is groups[r].on("network2") and lane is not groups[r]
            gathered = [float(each) for each in lane.all_gather(torch.tensor([float(r)]))]
            if r in some:
                few = groups[r].on("network", some)
                assert (few.rank, few.world) == (some.index(r), 3)
                gathered += [float(each) for each in few.all_gather(torch.tensor([float(r)]))]
            return gathered

        everything = threads.each(rank)
    assert everything[1] == [0, 1, 2, 3] and everything[0] == everything[2] == everything[3] == [0, 1, 2, 3, 0, 2, 3]
