"""Which part of each layer a rank holds. No torch; knows sizes only.

A rank's part of the heads and of the MLP width is a number of its own: any count of ranks works, also one that
doesn't divide the heads or exceeds them, and a fast machine may take more than a slow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from weft.config import ModelConfig


@dataclass(frozen=True)
class HeadRun:
    """Consecutive query heads that use consecutive key/value heads, `group` query heads to each."""

    query: slice  # of this rank's query heads
    key: slice  # of this rank's key/value heads
    group: int


@dataclass(frozen=True)
class Share:
    """One rank's part, as half-open ranges of the whole model's query heads, MLP width and vocabulary."""

    rank: int
    heads: range
    width: range
    vocabulary: range
    kv_group: int  # query heads that share one key/value head, in the whole model

    @cached_property
    def kv_heads(self) -> range:
        """Key/value heads that this rank's query heads use; a head on a border is held by both ranks."""
        if not self.heads:
            return range(0)
        return range(self.heads.start // self.kv_group, (self.heads.stop - 1) // self.kv_group + 1)

    @cached_property
    def runs(self) -> tuple[HeadRun, ...]:
        """The rank's heads as runs of equal groups, so that each run is one attention call."""
        users = [len([h for h in self.heads if h // self.kv_group == kv]) for kv in self.kv_heads]
        runs, query, key = [], 0, 0
        for group, members in groupby(users):
            count = len(list(members))
            runs.append(HeadRun(slice(query, query + group * count), slice(key, key + count), group))
            query, key = query + group * count, key + count
        return tuple(runs)

    @property
    def leads(self) -> bool:
        """True for the one rank that adds what must be added once, such as an output bias."""
        return self.rank == 0


def shares_of(config: ModelConfig, shares: Sequence[float]) -> tuple[Share, ...]:
    """Every rank's part of a model, in proportion to `shares`."""
    heads = _ranges(config.heads, shares, _unit(config.heads, shares, config.heads // config.kv_heads))
    width = _ranges(config.intermediate, shares, _unit(config.intermediate, shares, 16))
    vocabulary = _ranges(config.vocabulary, shares, _unit(config.vocabulary, shares, 16))
    group = config.heads // config.kv_heads
    parts = zip(heads, width, vocabulary, strict=True)
    return tuple(Share(rank, *part, kv_group=group) for rank, part in enumerate(parts))


def shard_bytes(config: ModelConfig, share: Share, itemsize: int) -> int:
    """Bytes that `share` of the weights takes in memory, embedding included."""
    heads, kv = len(share.heads), len(share.kv_heads)
    attention = config.hidden * config.head_dim * 2 * (heads + kv)
    layers = config.layers * (attention + 3 * config.hidden * len(share.width))
    head = 0 if config.tied_embeddings else len(share.vocabulary) * config.hidden
    return itemsize * (layers + config.vocabulary * config.hidden + head)


def _unit(total: int, shares: Sequence[float], wanted: int) -> int:
    """`wanted` if splitting in such units is no less even than in single ones by more than 2%, else 1.

    Whole key/value groups are never computed twice, and kernels like multiples of 16.
    """
    if total % wanted:
        return 1
    weights = [share / sum(shares) for share in shares]

    def worst(unit: int) -> float:
        return max(len(r) / w for r, w in zip(_ranges(total, shares, unit), weights, strict=True))

    return wanted if worst(wanted) <= 1.02 * worst(1) else 1


def _ranges(total: int, shares: Sequence[float], unit: int) -> list[range]:
    """Consecutive ranges of multiples of `unit` with sizes in proportion (largest remainders get the rest)."""
    units = total // unit
    exact = [units * share / sum(shares) for share in shares]
    sizes = [int(value) for value in exact]
    rest = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    for index in rest[: units - sum(sizes)]:
        sizes[index] += 1
    stops = [size * unit for size in accumulate(sizes)]
    return [range(stop - size * unit, stop) for stop, size in zip(stops, sizes, strict=True)]
