"""Which layers a rank holds, and which part of each. No torch; knows sizes only.

A rank's part of the heads and of the MLP width is a number of its own: any count of ranks works, also one that
doesn't divide the heads or exceeds them, and a fast machine may take more than a slow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from weft.layout import Layout
from weft.model.blueprint import Axis, Blueprint, Matrix, size

STORED_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 5.0}  # of a number, scales of groups included
FEW_BITS = ("int8", "int4")


@dataclass(frozen=True)
class HeadRun:
    """Consecutive query heads that use consecutive key/value heads, `group` query heads to each."""

    query: slice  # of this rank's query heads
    key: slice  # of this rank's key/value heads
    group: int


@dataclass(frozen=True)
class Share:
    """One rank's part: of each axis that is divided, by its name, a half-open range of the whole model's pieces, in so
    many layers. `rank`: among those that divide these layers. `begins`: what comes before all layers is with these,
    the embedding; `ends`: what comes after them is, the output head."""

    rank: int
    ranges: dict[str, range]
    kv_group: int  # query heads that share one key/value head, in the whole model
    layers: range
    begins: bool
    ends: bool

    def of(self, axis: Axis) -> range:
        """Pieces of an axis. One that follows another has those that the other's pieces use: a piece on a border is
        held by both ranks."""
        return self.ranges[axis.name]

    def numbers(self, matrix: Matrix) -> int:
        """Of a matrix, on this rank."""
        outputs, inputs = (size(side, lambda axis: len(self.of(axis))) for side in (matrix.outputs, matrix.inputs))
        return outputs * inputs

    @property
    def heads(self) -> range:
        """Query heads."""
        return self.ranges["heads"]

    @property
    def kv_heads(self) -> range:
        """Key/value heads that the query heads use."""
        return self.ranges["kv_heads"]

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


def shares_of(blueprint: Blueprint, layout: Layout) -> tuple[Share, ...]:
    """Every rank's part of a model."""
    return tuple(
        Share(
            place, {name: ranges[place] for name, ranges in divided.items()}, _kv_group(blueprint),
            range(section.first, section.stop), section.first == 0, section.stop == blueprint.layers,
        )
        for section in layout.sections
        for divided in [_divided(blueprint, section.shares)]
        for place in range(len(section.ranks))
    )  # fmt: skip


def tensor_shares(blueprint: Blueprint, shares: Sequence[float]) -> tuple[Share, ...]:
    """The same where each rank has a part of all layers, in proportion to `shares`."""
    return shares_of(blueprint, Layout.tensor(blueprint.layers, shares))


def _divided(blueprint: Blueprint, shares: Sequence[float]) -> dict[str, list[range]]:
    """Of each axis every rank's pieces."""
    divided: dict[str, list[range]] = {}
    for axis in blueprint.axes:
        if axis.of:
            group = blueprint.axis(axis.of).count // axis.count
            divided[axis.name] = [_used(pieces, group) for pieces in divided[axis.of]]
        else:
            divided[axis.name] = _ranges(axis.count, shares, _unit(axis.count, shares, axis.unit))
    return divided


def _kv_group(blueprint: Blueprint) -> int:
    return blueprint.axis("heads").count // blueprint.axis("kv_heads").count


def _used(pieces: range, group: int) -> range:
    return range(pieces.start // group, (pieces.stop - 1) // group + 1) if pieces else range(0)


def shard_bytes(blueprint: Blueprint, share: Share, weights: str, tables: str = "") -> int:
    """Bytes that `share` of the weights takes, embedding included, where matrices are kept in `weights`: a format, or
    auto: with the one of fewest bits. Of few bits the embedding and the head have 8, or are kept in `tables`; one that
    is tied to the other is another copy then, packed, unless both are floats."""
    format_ = weights.removeprefix("auto:")
    kept = tables or (format_ if STORED_BITS[format_] > STORED_BITS["int8"] else "int8")
    layer = (matrix for parts in blueprint.layer for matrix in parts.matrices)
    bits = STORED_BITS[format_] * len(share.layers) * sum(map(share.numbers, layer))
    tables_here = [blueprint.embedding] if share.begins else []
    if share.ends and not (share.begins and blueprint.tied and kept not in FEW_BITS):
        tables_here.append(blueprint.head)
    return int((bits + STORED_BITS[kept] * sum(map(share.numbers, tables_here))) / 8)


def remembered(blueprint: Blueprint, share: Share) -> int:
    """Numbers of keys and values that a token leaves on a rank, in all its layers."""
    axes = [parts.remembers for parts in blueprint.layer if parts.remembers]
    return len(share.layers) * sum(2 * len(share.of(axis)) * axis.width for axis in axes)


def kept_bytes(kv: str, dtype: str, width: int) -> float:
    """Bytes of a number of keys and values, of heads of a width; in int8 with a scale for each head."""
    return 1 + 4 / width if kv == "int8" else STORED_BITS[dtype] / 8


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
