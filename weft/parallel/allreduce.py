"""Sums over ranks, in one order, for any codec, and what ranks hand to others.

exchange (two ranks)  one message each way
one-shot      everybody sends everything to everybody, and sums: one hop, for few bytes
two-shot      everybody sums a shard and fetches the others' sums: two hops, the fewest bytes of each
star          rank 0 sums and sends it back: two hops, the fewest messages
hierarchical  the first rank of each machine sums for it; these swap, and send it back: few bytes between machines

An element's sum is p0 + p1 + p2 + … in each, so it depends neither on the algorithm nor on where the batch was cut;
where several ranks share one of several machines, theirs are summed first. Every rank decodes the same bytes, its own
contribution included, so all end with the same bits.

What encoding takes from a rank's partial it owes, and adds to its next partial of the same rows (error feedback): all
sums of a layer end in one stream, so what one lacks the next one brings, and errors don't add up over the layers. Of
more than two ranks the sums are coded too, which nobody owes; so they don't go below int8.
Knows groups and codecs; knows nothing of stages.

Shapes: T rows, M width, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from weft.parallel.codec import Codec, codec_named, totals
from weft.parallel.group import Group, wait_all
from weft.parallel.sizes import usual_algorithm
from weft.parallel.transport import Transfer


def all_reduce(
    group: Group, codec: Codec, partial_TM: Tensor, algorithm: str = "", owed_TM: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The sum of every rank's partial [T, M], the same bits on all of them. May reuse the partial's memory.

    `algorithm`: one of those above; without it the size decides. `owed_TM`: what this rank owes of these rows, before
    and after.
    """
    if group.world == 1:
        return partial_TM
    return _sum_all(group, codec, partial_TM, _encoded(codec, partial_TM, owed_TM), algorithm)


def _sum_all(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor, algorithm: str = "") -> Tensor:
    """`own`: the partial, encoded."""
    if group.world > 2 and not algorithm:
        algorithm = usual_algorithm(group.world, own.nbytes)
    return _ALGORITHMS[algorithm or "exchange"](group, codec, partial_TM, own)


def _encoded(codec: Codec, partial_TM: Tensor, owed_TM: Tensor | None) -> Tensor:
    """The partial with what is owed, as it travels; then what is owed after that."""
    if owed_TM is not None:
        partial_TM += owed_TM
    encoded = codec.encode(partial_TM)
    if owed_TM is not None:
        codec.decode(encoded, owed_TM)
        torch.sub(partial_TM, owed_TM, out=owed_TM)
    return encoded


def _one_shot(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor) -> Tensor:
    """Gathers all partials and sums them here."""
    encoded, receiving = _gathering(group, codec, partial_TM, own, group.peers)
    wait_all([group.send(own, peer) for peer in group.peers])  # before the sum takes its place
    _sum_in_order(group, codec, partial_TM, encoded, receiving)
    totals(codec).settle(partial_TM)
    return partial_TM


def _exchange(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor) -> Tensor:
    """Swaps whole partials with the only other rank. Two terms give the same bits in either order."""
    received = codec.empty(partial_TM)
    group.exchange(own, received, 1 - group.rank)
    codec.decode(own, partial_TM)
    codec.add(partial_TM, received, partial_TM)
    return partial_TM


def _two_shot(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor) -> Tensor:
    """Sums one shard of the rows here and fetches the others' sums. Shards may be empty."""
    _sum_shards(group, codec, partial_TM, own)
    return all_gather(group, totals(codec), partial_TM)


def _star(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor) -> Tensor:
    """Rank 0 sums for all."""
    if group.rank == 0:
        encoded, receiving = _gathering(group, codec, partial_TM, own, group.peers)
        _sum_in_order(group, codec, partial_TM, encoded, receiving)
        return _spread(group, totals(codec), partial_TM, group.peers)
    return _have_summed(group, totals(codec), partial_TM, own, 0)


def _hierarchical(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor) -> Tensor:
    """First inside each machine, then between their first ranks; the total comes back inside the machine as it is."""
    mine = next(ranks for ranks in group.machines if group.rank in ranks)
    if group.rank != mine[0]:
        return _have_summed(group, _EXACT, partial_TM, own, mine[0])
    others = mine[1:]
    if others:  # one that is alone on its machine travels as it is coded already: coding twice is not coding once
        encoded, receiving = _gathering(group, codec, partial_TM, own, others)
        _add_up(codec, partial_TM, mine, encoded, receiving)
    between = group.among([ranks[0] for ranks in group.machines])
    if between.world > 1:
        _sum_all(between, codec, partial_TM, codec.encode(partial_TM) if others else own)
    if between.world <= 2:  # else the sum was settled
        totals(codec).settle(partial_TM)
    return _spread(group, _EXACT, partial_TM, others)


_ALGORITHMS: dict[str, Callable[[Group, Codec, Tensor, Tensor], Tensor]] = {
    "exchange": _exchange, "one-shot": _one_shot, "two-shot": _two_shot, "star": _star, "hierarchical": _hierarchical,
}  # fmt: skip

_EXACT = codec_named("exact")
_Encoded = dict[int, Tensor]  # by rank
_Receiving = dict[int, Transfer]


def _gathering(
    group: Group, codec: Codec, rows_TM: Tensor, own: Tensor, peers: Sequence[int]
) -> tuple[_Encoded, _Receiving]:
    """What these ranks send of the rows, on its way, and this rank's own."""
    encoded = {peer: codec.empty(rows_TM) for peer in peers}
    receiving = {peer: group.receive(buffer, peer) for peer, buffer in encoded.items()}
    encoded[group.rank] = own
    return encoded, receiving


def _have_summed(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor, by: int) -> Tensor:
    """Another rank sums; `codec`: of the sum that it sends."""
    group.send(own, by).wait()
    total = codec.landing(partial_TM)
    group.receive(total, by).wait()
    codec.decode(total, partial_TM)
    return partial_TM


def _spread(group: Group, codec: Codec, total_TM: Tensor, peers: Sequence[int]) -> Tensor:
    """This rank has summed: the others get it, and all decode the same."""
    encoded = codec.encode(total_TM)
    wait_all([group.send(encoded, peer) for peer in peers])
    codec.decode(encoded, total_TM)
    return total_TM


def shard(rank: int, world: int, rows: int) -> slice:
    """A rank's part of so many rows: the first ranks take one more where they don't divide."""
    size, larger = divmod(rows, world)
    start = rank * size + min(rank, larger)
    return slice(start, start + (size + 1 if rank < larger else size))


def reduce_scatter(group: Group, codec: Codec, partial_TM: Tensor, owed_TM: Tensor | None = None) -> Tensor:
    """The sum, in rank order, of this rank's shard of the rows: a view of the partial, whose other rows are left.
    `owed_TM`: as in `all_reduce`."""
    if group.world == 1:
        return partial_TM
    return _sum_shards(group, codec, partial_TM, _encoded(codec, partial_TM, owed_TM))


def _sum_shards(group: Group, codec: Codec, partial_TM: Tensor, own: Tensor) -> Tensor:
    """Each rank its own."""
    mine, outgoing = torch.tensor_split(partial_TM, group.world)[group.rank], torch.tensor_split(own, group.world)
    encoded, receiving = _gathering(group, codec, mine, outgoing[group.rank], group.peers)
    sending = [group.send(outgoing[peer], peer) for peer in group.peers]
    _sum_in_order(group, codec, mine, encoded, receiving)
    wait_all(sending)
    return mine


def _sum_in_order(group: Group, codec: Codec, mine: Tensor, encoded: _Encoded, receiving: _Receiving) -> None:
    """mine = p0 + p1 + …, where several ranks share one of several machines, those first."""
    if not group.nested:
        _add_up(codec, mine, range(group.world), encoded, receiving)
        return
    sums = [torch.empty_like(mine) for _ in group.machines]
    for part, ranks in zip(sums, group.machines, strict=True):
        _add_up(codec, part, ranks, encoded, receiving)
        if len(ranks) > 1:
            codec.settle(part)  # as it would travel
    torch.add(sums[0], sums[1], out=mine)
    for part in sums[2:]:
        torch.add(mine, part, out=mine)


def _add_up(
    codec: Codec, out: Tensor, ranks: Sequence[int], encoded: Mapping[int, Tensor], receiving: Mapping[int, Transfer]
) -> None:  # fmt: skip
    """out = the terms of these ranks, one after the other; each is awaited just before it is added."""
    # Exact encoding leaves one rank's term in `out` itself, so sums of earlier ranks' terms gather elsewhere.
    own = next((place for place, rank in enumerate(ranks) if rank not in receiving), 0)
    total = torch.empty_like(out) if own > 0 else out
    for place, rank in enumerate(ranks):
        if rank in receiving:
            receiving[rank].wait()
        target = out if place >= own else total
        if place == 0:
            codec.decode(encoded[rank], target)
        else:
            codec.add(total, encoded[rank], target)
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
