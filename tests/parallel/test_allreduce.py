"""Sums over ranks: in rank order, the same bits everywhere, whatever the algorithm, the codec and the cut."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import Threads, grouped
from weft.config import DTYPES
from weft.errors import InputError
from weft.parallel.allreduce import all_gather, all_reduce, gather_columns, reduce_scatter, shard
from weft.parallel.codec import Codec, codec_named
from weft.parallel.group import Group
from weft.parallel.sizes import NUMBER_BYTES, ONE_SHOT_BYTES, row_bytes
from weft.program.stages import ALGORITHMS
from weft.wires import WIRES


@pytest.fixture(params=[(ranks, way) for ranks in (2, 3, 4) for way in ("shm", "tcp", "gloo")], scope="module", ids=str)
def world(request: pytest.FixtureRequest):
    torch.set_num_threads(1)
    with grouped(*request.param) as (threads, groups):
        yield threads, groups


def partials(count: int, rows: int, width: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 1001, 2003])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS[1:], ""])
def test_exact_sums_are_in_rank_order(world, rows: int, algorithm) -> None:
    threads, groups = world
    parts = partials(len(groups), rows)
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    sums = threads.each(lambda rank: all_reduce(groups[rank], codec_named("exact"), parts[rank].clone(), algorithm))
    assert all(torch.equal(total, expected) for total in sums)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_ranks_agree_and_cuts_do_not_matter(world, wire: str, algorithm) -> None:
    threads, groups = world
    parts, codec = partials(len(groups), 200), codec_named(wire)
    whole = threads.each(lambda rank: all_reduce(groups[rank], codec, parts[rank].clone(), algorithm))
    cut = threads.each(
        lambda rank: torch.cat(
            [all_reduce(groups[rank], codec, p.clone(), algorithm) for p in parts[rank].split([31, 64, 105])]
        )
    )
    assert all(torch.equal(total, whole[0]) for total in whole + cut)
    largest = sum(part.abs().max() for part in parts)
    assert torch.allclose(whole[0], sum(parts), atol=float(1e-5 + 2 * codec.error * largest))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("way", ["shm", "tcp", "tls", "gloo"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exchange_of_two_ranks(wire: str, rows: int, way: str, dtype: str) -> None:
    """The same bits on both, what they decode added up, however the rows are cut."""
    with grouped(2, way) as (threads, groups):
        parts = [part.to(getattr(torch, dtype)) for part in partials(2, rows, 200)]
        exchanged(threads, groups, codec_named(wire), parts)


def exchanged(threads: Threads, groups: list[Group], codec: Codec, parts: list[torch.Tensor]) -> None:
    decoded = [torch.empty_like(part) for part in parts]
    for part, out in zip(parts, decoded, strict=True):
        codec.decode(codec.encode(part.clone()), out)
    expected = torch.add(*decoded)
    whole = threads.each(lambda rank: all_reduce(groups[rank], codec, parts[rank].clone()))
    cut = threads.each(
        lambda rank: torch.cat([all_reduce(groups[rank], codec, p.clone()) for p in parts[rank].split(77)])
    )
    assert all(torch.equal(total, expected) for total in whole + cut)


# Of six ranks: all on one machine, on as many machines, two and four, and machines whose ranks don't stand together.
PLACES = {
    "lone": (0, 0, 0, 0, 0, 1),
    "one": (0,) * 6,
    "each": tuple(range(6)),
    "two": (0, 0, 1, 1, 1, 1),
    "mixed": (0, 1, 0, 2, 1, 0),
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", PLACES)
def test_all_algorithms_give_the_same_bits(places: str, wire: str, dtype: str) -> None:
    """Those of each machine's ranks in order first, then the machines'; also of the part that each rank keeps."""
    codec, machines = codec_named(wire), PLACES[places]
    with grouped(6) as (threads, groups):
        placed = threads.each(lambda r: Group(groups[r]._transport, range(6), "placed", machines))
        parts = [part.to(getattr(torch, dtype)) for part in partials(6, 50, 200)]
        sums = [
            total
            for algorithm in (*ALGORITHMS[1:], "")
            for total in threads.each(lambda r, a=algorithm: all_reduce(placed[r], codec, parts[r].clone(), a))
        ]
        mine = threads.each(lambda r: reduce_scatter(placed[r], codec, parts[r].clone()))
    assert all(torch.equal(total, sums[0]) for total in sums)
    if wire == "exact" and dtype == "float32":
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
    whole = threads.each(lambda rank: all_reduce(groups[rank], codec, parts[rank].clone(), "two-shot"))
    mine = threads.each(lambda rank: reduce_scatter(groups[rank], codec, parts[rank].clone()))
    for group, part in zip(groups, mine, strict=True):
        assert torch.equal(part, whole[0][shard(group.rank, group.world, rows)])

    def gather(rank: int) -> torch.Tensor:
        rows_of_all = torch.full_like(parts[rank], float("nan"))
        rows_of_all[shard(rank, len(groups), rows)] = mine[rank]
        return all_gather(groups[rank], codec, rows_of_all)

    assert all(torch.equal(gathered, whole[0]) for gathered in threads.each(gather))


@pytest.mark.parametrize("wire", WIRES)
def test_bytes_are_counted(world, wire: str) -> None:
    threads, groups = world
    rows, size = 6400 * len(groups), row_bytes(wire, "float32", 24)
    parts = partials(len(groups), rows)
    assert rows * size > ONE_SHOT_BYTES
    before = [group.bytes_sent for group in groups]
    threads.each(lambda rank: all_reduce(groups[rank], codec_named(wire), parts[rank].clone()))
    others = len(groups) - 1
    of_sums = row_bytes("int8" if wire == "int4" and others > 1 else wire, "float32", 24)
    expected = others * (rows // len(groups)) * (size + of_sums)  # a shard to each other rank, and its sum
    assert [group.bytes_sent - b for group, b in zip(groups, before, strict=True)] == [expected] * len(groups)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("algorithm", ["", *ALGORITHMS[1:]])
def test_a_large_row_changes_no_other(world, wire: str, algorithm: str) -> None:
    """One a thousand times larger, and one that is not finite."""
    threads, groups = world
    codec, parts = codec_named(wire), partials(len(groups), 9, 192)

    def all_of() -> torch.Tensor:
        return threads.each(lambda rank: all_reduce(groups[rank], codec, parts[rank].clone(), algorithm))[-1]

    before = all_of()
    for part in parts:
        part[4] *= 1000
        part[6] = float("nan")
    after = all_of()
    rows = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(before[rows], after[rows]) and not torch.equal(before[4], after[4])
    assert bool(after[6].isnan().all())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("algorithm", ["", *ALGORITHMS[1:]])
def test_what_a_wire_takes_the_next_sum_brings(world, wire: str, algorithm: str) -> None:
    """Ten sums of the same rows lack no more than one of them does, on all ranks alike, however the rows are cut."""
    threads, groups = world
    codec, rounds = codec_named(wire), [partials(len(groups), rows, 128) for rows in range(40, 50)]
    rounds = [[part[:40] for part in parts] for parts in rounds]

    def all_of(rank: int, cuts: tuple[int, ...]) -> torch.Tensor:
        total, owed = torch.zeros(40, 128), torch.zeros(40, 128)
        for parts in rounds:
            pieces = zip(parts[rank].clone().split(cuts), total.split(cuts), owed.split(cuts), strict=True)
            for part, stream, debt in pieces:
                stream.add_(all_reduce(groups[rank], codec, part, algorithm, debt))
        return total

    whole = threads.each(lambda rank: all_of(rank, (40,)))
    cut = threads.each(lambda rank: all_of(rank, (7, 33)))
    assert all(torch.equal(total, whole[0]) for total in whole + cut)
    off = (whole[0] - sum(part for parts in rounds for part in parts)).square().mean().sqrt()
    bare = threads.each(lambda rank: sum(all_reduce(groups[rank], codec, p[rank].clone(), algorithm) for p in rounds))
    without = (bare[0] - sum(part for parts in rounds for part in parts)).square().mean().sqrt()
    # Where totals are rounded too, nobody owes that.
    assert off <= (0.45 if len(groups) == 2 and not algorithm else 0.95) * without + 1e-5


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
    assert codec_named(wire).empty(values).nbytes == row_bytes(wire, dtype, 64) * values.shape[0]
    assert set(NUMBER_BYTES) == set(DTYPES)
