"""Sums over ranks: in rank order, the same bits everywhere, whatever the algorithm, the codec and the cut."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import Threads, grouped
from weft.config import DTYPES, WIRES
from weft.errors import InputError
from weft.parallel.allreduce import (
    all_gather,
    all_reduce,
    exchange,
    gather_columns,
    hierarchical,
    one_shot,
    reduce_scatter,
    shard,
    star,
    two_shot,
)
from weft.parallel.codec import Codec, codec_named
from weft.parallel.group import Group
from weft.parallel.sizes import NUMBER_BYTES, ONE_SHOT_BYTES, element_bytes


@pytest.fixture(params=[(ranks, way) for ranks in (2, 3, 4) for way in ("shm", "tcp", "gloo")], scope="module", ids=str)
def world(request: pytest.FixtureRequest):
    torch.set_num_threads(1)
    with grouped(*request.param) as (threads, groups):
        yield threads, groups


def partials(count: int, rows: int, width: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 1001, 2003])
@pytest.mark.parametrize("algorithm", [one_shot, two_shot, star, hierarchical, all_reduce])
def test_exact_sums_are_in_rank_order(world, rows: int, algorithm) -> None:
    threads, groups = world
    parts = partials(len(groups), rows)
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    sums = threads.each(lambda rank: algorithm(groups[rank], codec_named("exact"), parts[rank].clone()))
    assert all(torch.equal(total, expected) for total in sums)


@pytest.mark.parametrize("wire", ["exact", "bf16"])
@pytest.mark.parametrize("algorithm", [one_shot, two_shot, star, hierarchical])
def test_ranks_agree_and_cuts_do_not_matter(world, wire: str, algorithm) -> None:
    threads, groups = world
    parts, codec = partials(len(groups), 200), codec_named(wire)
    whole = threads.each(lambda rank: algorithm(groups[rank], codec, parts[rank].clone()))
    cut = threads.each(
        lambda rank: torch.cat([algorithm(groups[rank], codec, p.clone()) for p in parts[rank].split([31, 64, 105])])
    )
    assert all(torch.equal(total, whole[0]) for total in whole + cut)
    assert torch.allclose(whole[0], sum(parts), atol=0.1 if wire == "bf16" else 1e-5)


@pytest.mark.parametrize("wire", ["exact", "bf16"])
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("way", ["shm", "tcp", "gloo"])
def test_an_exchange_of_two_ranks(wire: str, rows: int, way: str) -> None:
    """The same bits on both, what they decode added up, however the rows are cut."""
    with grouped(2, way) as (threads, groups):
        exchanged(threads, groups, codec_named(wire), partials(2, rows))


def exchanged(threads: Threads, groups: list[Group], codec: Codec, parts: list[torch.Tensor]) -> None:
    encoded = [codec.encode(part).clone() for part in parts]
    expected = torch.add(encoded[0].float(), encoded[1].float())
    whole = threads.each(lambda rank: exchange(groups[rank], codec, parts[rank].clone()))
    cut = threads.each(
        lambda rank: torch.cat([exchange(groups[rank], codec, p.clone()) for p in parts[rank].split(77)])
    )
    assert all(torch.equal(total, expected) for total in whole + cut)


# Of six ranks: all on one machine, on as many machines, two and four, and machines whose ranks don't stand together.
PLACES = {"one": (0,) * 6, "each": tuple(range(6)), "two": (0, 0, 1, 1, 1, 1), "mixed": (0, 1, 0, 2, 1, 0)}


@pytest.mark.parametrize("wire", ["exact", "bf16"])
@pytest.mark.parametrize("places", PLACES)
def test_all_algorithms_give_the_same_bits(places: str, wire: str) -> None:
    """Those of each machine's ranks in order first, then the machines'; also of the part that each rank keeps."""
    codec, machines = codec_named(wire), PLACES[places]
    with grouped(6) as (threads, groups):
        placed = threads.each(lambda r: Group(groups[r]._transport, range(6), "placed", machines))
        parts = partials(6, 50)
        sums = [
            total
            for algorithm in (one_shot, two_shot, star, hierarchical, all_reduce)
            for total in threads.each(lambda r, a=algorithm: a(placed[r], codec, parts[r].clone()))
        ]
        mine = threads.each(lambda r: reduce_scatter(placed[r], codec, parts[r].clone()))
    assert all(torch.equal(total, sums[0]) for total in sums)
    if wire == "exact":
        of_machines = [
            [part for part, place in zip(parts, machines, strict=True) if place == each]
            for each in dict.fromkeys(machines)
        ]
        totals = [sum(rest, start=first.clone()) for first, *rest in of_machines]
        assert torch.equal(sums[0], sum(totals[1:], start=totals[0]))
        assert torch.equal(torch.cat(mine), sums[0])


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_halves_of_a_sum(world, rows: int) -> None:
    threads, groups = world
    parts, codec = partials(len(groups), rows), codec_named("exact")
    whole = threads.each(lambda rank: two_shot(groups[rank], codec, parts[rank].clone()))
    mine = threads.each(lambda rank: reduce_scatter(groups[rank], codec, parts[rank].clone()))
    for group, part in zip(groups, mine, strict=True):
        assert torch.equal(part, whole[0][shard(group.rank, group.world, rows)])

    def gather(rank: int) -> torch.Tensor:
        rows_of_all = torch.full_like(parts[rank], float("nan"))
        rows_of_all[shard(rank, len(groups), rows)] = mine[rank]
        return all_gather(groups[rank], codec, rows_of_all)

    assert all(torch.equal(gathered, whole[0]) for gathered in threads.each(gather))


@pytest.mark.parametrize("wire", ["exact", "bf16"])
def test_bytes_are_counted(world, wire: str) -> None:
    threads, groups = world
    rows, size = 1200 * len(groups), 4 if wire == "exact" else 2
    parts = partials(len(groups), rows)
    assert rows * 24 * size > ONE_SHOT_BYTES
    before = [group.bytes_sent for group in groups]
    threads.each(lambda rank: all_reduce(groups[rank], codec_named(wire), parts[rank].clone()))
    others = len(groups) - 1
    expected = 2 * others * (rows // len(groups)) * 24 * size  # a shard to each other rank, twice
    assert [group.bytes_sent - b for group, b in zip(groups, before, strict=True)] == [expected] * len(groups)


def test_columns_are_gathered_on_rank_0(world) -> None:
    threads, groups = world
    widths = [3, 5, 2, 4][: len(groups)]
    parts = [torch.full((2, width), float(rank)) for rank, width in enumerate(widths)]
    gathered = threads.each(lambda rank: gather_columns(groups[rank], parts[rank], widths))
    assert torch.equal(gathered[0], torch.cat(parts, dim=1)) and gathered[1:] == [None] * (len(groups) - 1)


def test_one_rank_sums_nothing() -> None:
    group, part = Group(None), torch.randn(3, 4)
    assert all_reduce(group, codec_named("exact"), part) is part
    assert torch.equal(reduce_scatter(group, codec_named("exact"), part), part)
    assert all_gather(group, codec_named("exact"), part) is part and shard(0, 1, 3) == slice(0, 3)
    assert gather_columns(group, part, [4]) is part and group.bytes_sent == 0


def test_unknown_wire() -> None:
    with pytest.raises(InputError, match="'int3' is not known; allowed: exact, bf16"):
        codec_named("int3")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_what_is_sent(wire: str, dtype: str) -> None:
    values = torch.empty(3, 64, dtype=getattr(torch, dtype))
    assert codec_named(wire).empty(values).nbytes == element_bytes(wire, dtype) * values.numel()
    assert set(NUMBER_BYTES) == set(DTYPES)
