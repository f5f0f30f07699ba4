"""Sums over ranks, in rank order, for any codec, and what ranks hand to others.

two-shot (large)  encode, exchange shards, decode and sum, encode, exchange sums, decode: bandwidth-optimal
one-shot (small)  encode, gather everything everywhere, decode and sum: one hop
exchange (two ranks)  the same by one message each way: two ranks' two-shot sends as many bytes in two hops

An element's sum is p0 + p1 + p2 + … in each, so it depends neither on the algorithm nor on where the batch was
cut; and every rank decodes the same bytes, its own contribution included, so all end with the same bits.
Knows groups and codecs; knows nothing of stages.

Shapes: T rows, M width, N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.parallel.codec import Codec
from weft.parallel.group import Group, wait_all
from weft.parallel.sizes import ONE_SHOT_BYTES


def all_reduce(group: Group, codec: Codec, partial_TM: Tensor, algorithm: str = "") -> Tensor:
    """The sum of every rank's partial [T, M], the same bits on all of them. May reuse the partial's memory.

    `algorithm`: "one-shot" or "two-shot"; without it the size decides.
    """
    if group.world == 1:
        return partial_TM
    small = group.world == 2 or codec.empty(partial_TM[:1]).nbytes * partial_TM.shape[0] <= ONE_SHOT_BYTES
    if not (algorithm == "one-shot" if algorithm else small):
        return two_shot(group, codec, partial_TM)
    return (exchange if group.world == 2 else one_shot)(group, codec, partial_TM)


def one_shot(group: Group, codec: Codec, partial_TM: Tensor) -> Tensor:
    """Gathers all partials and sums them here."""
    received = {peer: codec.empty(partial_TM) for peer in group.peers}
    receiving = {peer: group.receive(buffer, peer) for peer, buffer in received.items()}
    encoded = codec.encode(partial_TM)
    wait_all([group.send(encoded, peer) for peer in group.peers])  # before the sum takes its place
    received[group.rank] = encoded
    _sum_in_rank_order(group, codec, partial_TM, received, receiving)
    return partial_TM


def exchange(group: Group, codec: Codec, partial_TM: Tensor) -> Tensor:
    """Swaps whole partials with the only other rank. Two terms give the same bits in either order."""
    received, encoded = codec.empty(partial_TM), codec.encode(partial_TM)
    group.exchange(encoded, received, 1 - group.rank)
    codec.decode(encoded, partial_TM)
    codec.add(partial_TM, received, partial_TM)
    return partial_TM


def two_shot(group: Group, codec: Codec, partial_TM: Tensor) -> Tensor:
    """Sums one shard of the rows here and fetches the others' sums. Shards may be empty."""
    reduce_scatter(group, codec, partial_TM)
    return all_gather(group, codec, partial_TM)


def shard(rank: int, world: int, rows: int) -> slice:
    """A rank's part of so many rows: the first ranks take one more where they don't divide."""
    size, larger = divmod(rows, world)
    start = rank * size + min(rank, larger)
    return slice(start, start + (size + 1 if rank < larger else size))


def reduce_scatter(group: Group, codec: Codec, partial_TM: Tensor) -> Tensor:
    """The sum, in rank order, of this rank's shard of the rows: a view of the partial, whose other rows are left."""
    shards = torch.tensor_split(partial_TM, group.world)
    mine = shards[group.rank]
    if group.world == 1:
        return mine
    received = {peer: codec.empty(mine) for peer in group.peers}
    receiving = {peer: group.receive(buffer, peer) for peer, buffer in received.items()}
    outgoing = {peer: codec.encode(shards[peer]) for peer in group.peers}  # kept until they are sent
    sending = [group.send(encoded, peer) for peer, encoded in outgoing.items()]
    received[group.rank] = codec.encode(mine)
    _sum_in_rank_order(group, codec, mine, received, receiving)
    wait_all(sending)
    return mine


def _sum_in_rank_order(group: Group, codec: Codec, mine: Tensor, encoded: dict[int, Tensor], receiving: dict) -> None:  # type: ignore[type-arg]
    """mine = p0 + p1 + …; each term is awaited just before it is added."""
    # Exact encoding leaves this rank's term in `mine` itself, so sums of earlier ranks' terms gather elsewhere.
    total = torch.empty_like(mine) if group.rank > 0 else mine
    for peer in range(group.world):
        if peer in receiving:
            receiving[peer].wait()
        if peer == 0:
            codec.decode(encoded[0], total)
        else:
            target = mine if peer >= group.rank else total
            codec.add(total, encoded[peer], target)
            total = target


def all_gather(group: Group, codec: Codec, rows_TM: Tensor) -> Tensor:
    """Fills in the other ranks' shards of the rows; all are decoded, the own one included: the same bits everywhere."""
    if group.world == 1:
        return rows_TM
    shards = torch.tensor_split(rows_TM, group.world)
    encoded = codec.encode(shards[group.rank])
    received = {peer: codec.landing(shards[peer]) for peer in group.peers}
    receiving = {peer: group.receive(buffer, peer) for peer, buffer in received.items()}
    sending = [group.send(encoded, peer) for peer in group.peers]
    codec.decode(encoded, shards[group.rank])
    for peer, work in receiving.items():
        work.wait()
        codec.decode(received[peer], shards[peer])
    wait_all(sending)
    return rows_TM


def hand_over(group: Group, codec: Codec, rows_TM: Tensor, senders: Sequence[int], receivers: Sequence[int]) -> None:
    """The senders' rows, alike on all of them, come to the receivers, into `rows_TM` there. Each receiver has one
    sender; receivers are dealt out to the senders in turn."""
    if group.rank in senders:
        encoded = codec.encode(rows_TM)
        mine = receivers[senders.index(group.rank) :: len(senders)]
        wait_all([group.send(encoded, peer) for peer in mine])
        return
    received = codec.landing(rows_TM)
    group.receive(received, senders[receivers.index(group.rank) % len(senders)]).wait()
    codec.decode(received, rows_TM)


def swap(group: Group, numbers: Tensor) -> list[Tensor]:
    """Every rank's numbers, as many of each, in rank order: for the little that all are to know."""
    if group.world != 2:
        return group.all_gather(numbers)
    received = torch.empty_like(numbers)
    group.exchange(numbers, received, 1 - group.rank)
    return [numbers, received] if group.rank == 0 else [received, numbers]


def gather_columns(group: Group, part: Tensor, widths: list[int]) -> Tensor | None:
    """Every rank's columns [rows, widths[rank]] side by side on rank 0; None on the others."""
    if group.world == 1:
        return part
    if group.rank != 0:
        group.send(part.contiguous(), 0).wait()
        return None
    received = {peer: part.new_empty(part.shape[0], widths[peer]) for peer in group.peers}
    receiving = [group.receive(buffer, peer) for peer, buffer in received.items()]
    wait_all(receiving)
    return torch.cat([part, *(received[peer] for peer in range(1, group.world))], dim=1)
