"""Costs: what each step of a program takes on given ranks and a given link, as data.

Tables come from a calibration (plan/calibrate.py) or from the catalogue (hardware.py); both have this form, and who
uses them need not know which. Knows steps, batches and seconds; knows nothing of how costs were found.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from weft.program.batch import Batch, Rows
from weft.program.stages import COMPUTE, Kind


@dataclass(frozen=True)
class Table:
    """Seconds against a size: straight between its points, and on along the first and the last two outside.

    With one point, seconds are in proportion to the size.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, size: float) -> float:
        """Seconds for this size; never below zero."""
        sizes, seconds = self.sizes, self.seconds
        if len(sizes) == 1:
            return seconds[0] * size / sizes[0]
        right = bisect_left(sizes, size, 1, len(sizes) - 1)
        x, y = sizes[right - 1], seconds[right - 1]
        value = y + (seconds[right] - y) * (size - x) / (sizes[right] - x)
        return value if value > 0 else 0.0

    def scaled(self, factor: float) -> Table:
        """Every time longer by this factor."""
        return Table(self.sizes, tuple(value * factor for value in self.seconds))

    @classmethod
    def line(cls, fixed: float, per_unit: float, most: float = 1e6) -> Table:
        """fixed + per_unit * size."""
        return cls((0.0, most), (fixed, fixed + per_unit * most))

    @classmethod
    def sum(cls, left: Table, right: Table) -> Table:
        """Both together; exact, as both are straight between the points of either."""
        sizes = cls._sizes((left, right))
        return cls(sizes, tuple(left.at(size) + right.at(size) for size in sizes))

    @classmethod
    def slowest(cls, tables: Sequence[Table]) -> Table:
        """At each size of any of them the longest one's."""
        sizes = cls._sizes(tables)
        return cls(sizes, tuple(max(table.at(size) for table in tables) for size in sizes))

    @staticmethod
    def _sizes(tables: Sequence[Table]) -> tuple[float, ...]:
        """All of theirs, with zero and one more beyond the last."""
        sizes = sorted({0.0, *(size for table in tables for size in table.sizes)})
        return (*sizes, 2 * sizes[-1])


NOTHING = Table((1.0,), (0.0,))


def squared(count: float, window: int | None) -> float:
    """Twice the pairs of so many new tokens with themselves, where a token sees so many at most."""
    if window is None or count <= window:
        return count * count
    return window * (2 * count - window)


def window_shares(windows: Sequence[int | None]) -> tuple[tuple[int | None, float], ...]:
    """The windows that layers have, each with its share of the layers."""
    return tuple((window, windows.count(window) / len(windows)) for window in dict.fromkeys(windows))


@dataclass(frozen=True)
class ComputeCosts:
    """One rank's computation, in seconds.

    `body`, `tail`: of a stage, by its part, against rows; that of `scored`, which looks at earlier rows, without its
    scores. `enter`: the norm, against rows, where a step of its own takes it. Scores of n new tokens of one sequence
    over p earlier ones: `present` against n, divided by n² or what `squared` makes of it (how much of that it skips is
    the kernel's business), `past` for each of the n * p pairs, and `keyed` for each of the p positions beside them.
    `one`: for each key that a single new token sees.
    `windows`: positions that a token sees at most, or None, each with the share of the layers where that is so; none
    where it sees all. `kept`: the part of the body of `scored` that all rows go through where only wanted ones leave;
    the rest is for these. `begin`: before the first step, against rows.
    """

    body: dict[str, Table]
    tail: dict[str, Table]
    enter: Table
    present: Table
    past: float
    one: float
    begin: Table
    windows: tuple[tuple[int | None, float], ...] = ()
    scored: str = ""
    kept: float = 1.0
    keyed: float = 0.0

    def seen(self, earlier: float) -> float:
        """Of so many earlier positions, in the mean over layers."""
        if not self.windows:
            return earlier
        return sum(share * (earlier if window is None else min(earlier, window)) for window, share in self.windows)

    @cached_property
    def whole(self) -> dict[str, Table]:
        """Body and tail together."""
        return {part: Table.sum(table, self.tail[part]) for part, table in self.body.items()}

    def scores(self, batch: Batch, rows: Rows, wanted: bool = False) -> float:
        """Attention's own part for some rows, or for the wanted ones of them."""
        total = 0.0
        for segment, span in zip(batch.segments, batch.spans, strict=True):
            first = span[1] - segment.wanted if wanted else span[0]
            start, stop = max(first, rows[0]), min(span[1], rows[1])
            if start < stop:
                total += self._scores(stop - start, segment.start + start - span[0])
        return total

    def _scores(self, count: int, earlier: int) -> float:
        seen = self.seen(earlier)
        if count == 1:
            return self.one * (seen + 1)
        each = self.windows or ((None, 1.0),)
        square = sum(share * squared(count, window) for window, share in each)
        return self.present.at(count) * square + (self.past * count + self.keyed) * seen

    def scaled(self, factor: float) -> ComputeCosts:
        """The same rank, slower by this factor."""
        return replace(
            self, body={part: table.scaled(factor) for part, table in self.body.items()},
            tail={part: table.scaled(factor) for part, table in self.tail.items()}, enter=self.enter.scaled(factor),
            present=self.present.scaled(factor), past=self.past * factor, one=self.one * factor,
            begin=self.begin.scaled(factor), keyed=self.keyed * factor,
        )  # fmt: skip

    @classmethod
    def slowest(cls, ranks: Sequence[ComputeCosts]) -> ComputeCosts:
        """A rank that is as slow as the slowest in everything: the one whose pace the group keeps."""
        if len(ranks) == 1:
            return ranks[0]
        first = ranks[0]
        return cls(
            {part: Table.slowest([rank.body[part] for rank in ranks]) for part in first.body},
            {part: Table.slowest([rank.tail[part] for rank in ranks]) for part in first.tail},
            Table.slowest([rank.enter for rank in ranks]), Table.slowest([rank.present for rank in ranks]),
            max(rank.past for rank in ranks), max(rank.one for rank in ranks),
            Table.slowest([rank.begin for rank in ranks]), first.windows, first.scored,
            first.kept, max(rank.keyed for rank in ranks),
        )  # fmt: skip


@dataclass(frozen=True)
class WireCosts:
    """Collectives on one wire, in seconds against encoded bytes of the whole partial.

    `sums`: by algorithm, see parallel/allreduce.py; up to `limit` bytes one counts as small. `hop`: one message from
    each rank to each other, as reduce-scatter, all-gather and the logits' gather need it. `send`: one from a section's
    rank to the next section's. `element`: bytes of one
    number on the wire. `fused`: the sum takes the norm that follows it along, so that the next body goes without.
    `codec`: of the compute lane's processor, that a collective takes beyond what its bytes do (see `Contention`).
    """

    sums: dict[str, Table]
    limit: float
    hop: Table
    element: float
    fused: bool = False
    codec: Table = NOTHING
    send: Table = NOTHING

    def table(self, kind: Kind, size: float, algorithm: str = "") -> Table:
        """The one that holds for a collective on `size` bytes, by an algorithm or by the cheapest one."""
        if kind is not Kind.REDUCE:
            return self.send if kind is Kind.SEND else self.hop
        return self.sums.get(algorithm) or self.sums[self.cheapest(size)]

    def cheapest(self, size: float) -> str:
        """The algorithm that sums so many bytes soonest; of equal ones the first."""
        if len(self.sums) == 1:
            return next(iter(self.sums))
        return min(self.sums, key=lambda algorithm: self.sums[algorithm].at(size))

    @cached_property
    def fixed(self) -> float:
        """Seconds of a sum of no bytes."""
        return min(table.at(0.0) for table in self.sums.values())

    @cached_property
    def per_byte(self) -> float:
        """Seconds that one more byte of a large sum takes."""
        return min(table.at(2e6) - table.at(1e6) for table in self.sums.values()) / 1e6

    def scaled(self, factor: float) -> WireCosts:
        """The same wire, slower by this factor."""
        sums = {algorithm: table.scaled(factor) for algorithm, table in self.sums.items()}
        return replace(self, sums=sums, hop=self.hop.scaled(factor), send=self.send.scaled(factor))


@dataclass(frozen=True)
class Contention:
    """What a lane that communicates does to another one, the compute lane mostly.

    A collective of b bytes takes `fixed` + `per_byte` * b seconds of the compute lane's processor, a small one `small`
    seconds, spread over its own duration; one that starts while something computes takes `turn` seconds longer, until
    it gets its turn of the processor. `wake`: seconds until a compute lane that waited goes on. `burst`: bytes that an
    idle link takes at once (token buckets, buffers). `part`: of the other lane's speed that any collective takes away
    (a GPU's has its share of the multiprocessors, and two lanes that share a link have half of it each).
    """

    part: float = 0.0
    small: float = 0.0
    fixed: float = 0.0
    per_byte: float = 0.0
    turn: float = 0.0
    wake: float = 0.0
    burst: float = 0.0

    def taken(self, wire: WireCosts, size: float, seconds: float) -> float:
        """Seconds of the compute lane that a collective of `size` bytes takes away, if it is hidden whole."""
        own = self.small if size <= wire.limit else self.fixed + self.per_byte * size
        return own + wire.codec.at(size) + self.part * seconds


SHARED = Contention(part=0.5)


@dataclass(frozen=True)
class Costs:
    """Everything that the simulator needs: ranks (several may be alike), wires by name, contention.

    `width`: numbers in one row of a partial; `aside`: of those parts whose sums are float32's and of another width.
    `logits`: bytes that a rank tells the others of a row from which a token follows.
    `world`: ranks, where `ranks` holds one entry for all of them. `contention`: of the network with computation;
    `between`: of other pairs of lanes, by both names, "compute network2".
    """

    ranks: tuple[ComputeCosts, ...]
    wires: dict[str, WireCosts]
    contention: Contention
    width: int
    logits: float
    world: int
    between: dict[str, Contention] = field(default_factory=dict)
    aside: dict[str, int] = field(default_factory=dict)

    def contention_of(self, one: str, other: str) -> Contention:
        """What `other` does to `one`. Without a measurement every lane treats computation as the network does, and two
        that communicate share one link."""
        usual = self.contention if one == COMPUTE else SHARED
        return self.between.get(f"{one} {other}", usual)

    @cached_property
    def pace(self) -> ComputeCosts:
        """The group's pace: a collective starts when the last rank is ready."""
        return ComputeCosts.slowest(self.ranks)

    def pace_of(self, ranks: tuple[int, ...]) -> ComputeCosts:
        """That of some of the ranks; of all, where these are ()."""
        if not ranks or len(self.ranks) == 1:
            return self.pace
        if ranks not in self._paces:
            self._paces[ranks] = ComputeCosts.slowest([self.ranks[rank] for rank in ranks])
        return self._paces[ranks]

    @cached_property
    def _paces(self) -> dict[tuple[int, ...], ComputeCosts]:
        return {}

    def compute_seconds(
        self, rank: ComputeCosts, kind: Kind, part: str, rows: Rows, batch: Batch, entered: bool = False,
        wanted: bool = False,
    ) -> float:  # fmt: skip
        """One step of the compute lane. `entered`: its norm was taken elsewhere; `wanted`: see `program.steps.Step`."""
        count = self.count(rows, batch, wanted)
        if kind is Kind.ENTER:
            return rank.enter.at(count / self.world)
        if kind is Kind.TAIL:
            return rank.tail[part].at(count) if count else 0.0
        if part == rank.scored:  # stores what all rows leave behind
            seconds = rank.body[part].at(rows[1] - rows[0]) + rank.scores(batch, rows, wanted)
            if count < rows[1] - rows[0]:
                seconds -= (1 - rank.kept) * (rank.body[part].at(rows[1] - rows[0]) - rank.body[part].at(count))
            seconds += rank.tail[part].at(count) if count and kind is Kind.COMPUTE else 0.0
            count = rows[1] - rows[0]
        elif not count:
            return 0.0
        else:
            seconds = (rank.body if kind is Kind.BODY else rank.whole)[part].at(count)
        return max(0.0, seconds - rank.enter.at(count)) if entered else seconds

    def count(self, rows: Rows, batch: Batch, wanted: bool) -> int:
        """How many rows, or wanted ones of them."""
        start, stop = batch.wanted(rows) if wanted else rows
        return stop - start

    def size(
        self, wire: WireCosts, kind: Kind, part: str, rows: Rows, batch: Batch, wanted: bool = False
    ) -> float:  # fmt: skip
        """Bytes that a collective is about."""
        if kind is Kind.GATHER:
            return self.logits * len(batch.predicting_rows)
        a_row = 4.0 * self.aside[part] if part in self.aside else wire.element * self.width
        return a_row * self.count(rows, batch, wanted)

    def scaled(self, compute: float, network: float) -> Costs:
        """The same with slower (or faster) computation and collectives, by these factors."""
        if compute == network == 1.0:
            return self
        ranks = tuple(rank.scaled(compute) for rank in self.ranks)
        return replace(self, ranks=ranks, wires={name: wire.scaled(network) for name, wire in self.wires.items()})
