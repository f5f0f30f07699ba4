"""From spans that were measured to tables of costs.

Means for steps, because a few of them wait for a turn of the processor that the others don't, and a plan pays for all;
medians for differences. Knows what calibrate.py runs; runs nothing itself. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from weft.plan.samples import Sample, Samples, Trial, by_name
from weft.plan.sends import KERNEL, Sends
from weft.program.stages import COMPUTE, NETWORK, Kind
from weft.simulate.cost import NOTHING, ComputeCosts, Contention, Costs, Table, WireCosts, squared, window_shares
from weft.simulate.predicted import simulate
from weft.timeline.timeline import Timeline, median

LEAST_LOST = 0.25  # of a collective's processor seconds: what is lost at least, whatever noise says
SMALLEST_BURST = 64e3  # bytes: less is noise
LARGEST_BURST = 1e6  # bytes: more than token buckets and buffers take
STRAIGHT = 64  # rows from which on a stage's time is a straight line: noise must not be what cuts are chosen by
MOSTLY = 0.9  # of what many rows' scores over earlier ones take, their pairs do at least, whatever noise says
FEW = 16  # rows: their sums are hardly more than what every sum takes


def read(samples: Samples) -> Costs:
    """The costs that explain what was measured."""
    subject = samples.subject
    network = _Network(samples) if len(subject.summing) > 1 else None
    sends = Sends(samples) if subject.layout is not None else None
    ranks = tuple(_Rank(samples, rank).costs() for rank in range(subject.world))
    wires = network.wires() if network is not None else {
        wire: WireCosts({"exchange": NOTHING}, subject.limit, NOTHING, element)
        for wire, element in subject.elements.items()
    }  # fmt: skip
    if sends is not None:
        wires = {wire: replace(way, send=sends.table(wire)) for wire, way in wires.items()}
    costs = Costs(ranks, wires, Contention(), subject.width, subject.logits, subject.world, aside=subject.outline.aside)
    if network is not None:
        return network.beside_computation(costs)
    return replace(costs, contention=sends.contention()) if sends is not None else costs


class _Rank:
    """One rank's computation."""

    def __init__(self, samples: Samples, rank: int) -> None:
        self.samples, self.rank = samples, rank
        self.most = samples.sizes[-1]
        layout = samples.subject.layout
        self.first = layout.section_of(rank).first if layout is not None else 0

    def costs(self) -> ComputeCosts:
        past, one, keyed = self._past()
        present = self._present(past)
        subject = self.samples.subject
        ends = {stage.part: self._serial for stage in subject.outline.before} | {subject.head: lambda _: self._head()}
        body = {part: table(part) if self._has(part) else NOTHING for part, table in ends.items()}
        tail = dict.fromkeys(body, NOTHING)
        for part in (stage.part for stage in subject.outline.layer):
            whole = self._serial(part)
            if part == subject.scored:
                scores = (present.at(n) * self._squared(n) if n > 1 else one for n in whole.sizes)
                whole = _less(whole, scores)
            tail[part] = NOTHING if part in subject.outline.aside else self._tail(part)
            body[part] = _less(_straight(whole), map(tail[part].at, whole.sizes))
        begin = self._begin()
        windows = window_shares(subject.windows)
        return ComputeCosts(
            body, tail, self._enter(), present, past, one, begin, windows, subject.scored, subject.kept, keyed
        )  # fmt: skip

    def _has(self, part: str) -> bool:
        """It computes this part: of a pipeline, the first ranks embed, and the last ones have the head."""
        first = self.samples.of("serial", self.most)[0].timeline
        return any(e.rank == self.rank and e.stage.rpartition(".")[2] == part for e in first.lane(self.rank, COMPUTE))

    def _seconds(self, name: str, rows: int, part: str, kind: Kind = Kind.COMPUTE) -> float:
        """A step of this part, in the mean over layers and rounds: a rank that shares its core computes in turns."""
        return fmean(
            event.seconds
            for sample in self.samples.of(name, rows)
            for event in sample.timeline.events
            if event.rank == self.rank and event.kind is kind and event.stage.rpartition(".")[2] == part
        )

    def _serial(self, part: str) -> Table:
        sizes = self.samples.sizes
        return Table(tuple(map(float, sizes)), tuple(self._seconds("serial", n, part) for n in sizes))

    def _head(self) -> Table:
        """Against wanted rows: one, and as many as there were short prompts."""
        one = median(self._seconds("serial", n, self.samples.subject.head) for n in self.samples.sizes)
        several = self.samples.named("parted")
        if not several:
            return Table((1.0,), (one,))
        more = self._seconds("parted", several[0].rows, self.samples.subject.head)
        return Table((1.0, float(len(several[0].batch.segments))), (one, max(one, more)))

    def _past(self) -> tuple[float, float, float]:
        """Seconds for a pair of one of several new tokens and an earlier one, for a key that a lone token sees, and for
        an earlier position beside its pairs."""
        if not self.samples.of("past", 1):
            return 0.0, 0.0, 0.0
        scored = self.samples.subject.scored
        extra = {
            run.rows: max(0.0, self._seconds("past", run.rows, scored) - self._seconds("serial", run.rows, scored))
            / self._seen(run)
            for run in self.samples.named("past")
        }
        few, most = sorted(extra)[1], max(extra)
        pair = (extra[most] - extra[few]) / (most - few) if most > few else extra[most] / most
        pair = min(max(pair, MOSTLY * extra[most] / most), extra[most] / most)
        return pair, extra[1], max(0.0, extra[most] - pair * most)

    def _seen(self, run: Trial) -> float:
        """Earlier positions that a token sees, in the mean over the layers of a run that this rank has."""
        earlier = run.batch.segments[0].start
        steps = [step for block in run.program.form.blocks for step in block.steps if step.concerns(self.rank)]
        layers = 1 + max(step.layer or 0 for step in steps)
        windows = self.samples.subject.windows[self.first : layers] or (None,)
        return fmean(earlier if window is None else min(earlier, window) for window in windows)

    def _squared(self, rows: float) -> float:
        """Of a prompt, in this rank's first layer, which most runs end with."""
        return squared(rows, next(iter(self.samples.subject.windows[self.first :]), None))

    def _present(self, past: float) -> Table:
        """Seconds for each pair of the n x n square of new tokens with themselves.

        One prompt, less what as many rows take in short prompts, whose own scores count as earlier ones.
        """
        each = past
        if parted := self.samples.named("parted"):
            scored = self.samples.subject.scored
            lone, short = (self._seconds(name, self.most, scored) for name in ("serial", "parted"))
            each = (lone - short) / self._squared(self.most) + past / len(parted[0].batch.segments)
        return Table((0.0, 512.0, 1e6), (past, max(0.3 * past, each), max(0.3 * past, each)))

    def _tail(self, part: str) -> Table:
        runs = self.samples.named("tiles")
        seconds = tuple(self._seconds("tiles", run.rows, part, Kind.TAIL) for run in runs)
        return _straight(Table(tuple(run.rows / 2 for run in runs), seconds))

    def _enter(self) -> Table:
        runs, world = self.samples.named("scattered"), self.samples.subject.world
        layer = self.samples.subject.outline.layer
        part = layer[-1].part if len(layer) > 1 else self.samples.subject.head
        if not runs:  # a model whose sums can't be scattered
            return NOTHING
        seconds = tuple(self._seconds("scattered", run.rows, part, Kind.ENTER) for run in runs)
        return _rising(Table((0.0, *(run.rows / world for run in runs)), (0.0, *seconds)))

    def _begin(self) -> Table:
        sizes = self.samples.sizes
        before = ([max(0.0, s.seconds - s.timeline.seconds) for s in self.samples.of("serial", n)] for n in sizes)
        return Table(tuple(map(float, sizes)), tuple(map(median, before)))


class _Network:
    """Collectives, and what they and computation do to each other."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.subject = samples, samples.subject
        self.row = self.subject.width * self.subject.elements[self.subject.first_wire]  # bytes
        self.slopes = {wire: self._slope(wire) for wire in self.subject.elements}
        self.slope = self.slopes[self.subject.first_wire]
        self.burst = self._burst()

    def wires(self) -> dict[str, WireCosts]:
        """What collectives take on each wire, as straight lines.

        Seconds of a byte are from the largest sums, back to back; those of a sum without bytes from small ones.
        """
        usual = self._fixed()
        fixed = {wire: max(0.3 * usual, usual + self._longer(wire, usual)) for wire in self.slopes}
        return {
            wire: WireCosts(
                {name: self._line(name, fixed[wire], slope) for name in self.subject.algorithms}, self.subject.limit,
                Table.line(fixed[wire], slope / 2), self.subject.elements[wire],
            )
            for wire, slope in self.slopes.items()
        }  # fmt: skip

    def _bytes(self, rows: int, wire: str) -> float:
        """Of a partial of so many rows."""
        return rows * self.subject.width * self.subject.elements[wire]

    def _taken(self, timeline: Timeline) -> list[float]:
        """Seconds of each sum of whole rows."""
        return _collectives(timeline, self.subject.outline.aside, self.subject.summing)

    def _longer(self, wire: str, fixed: float) -> float:
        """Seconds that a sum takes longer on this wire than on the first, beside its bytes. `fixed`: on that one."""
        few, usual = self.samples.sizes[0], self.subject.first_wire
        # Sums that hardly waited for their bytes found a link that had saved up, and so did those beside them.
        saved = fmean(self._sums("network", few, usual)) < fixed + 0.5 * self.slope * self._bytes(few, usual)
        own, first = (
            fmean(self._sums("network", few, each)) - (0.0 if saved else self.slopes[each] * self._bytes(few, each))
            for each in (wire, usual)
        )
        return own - first

    def _line(self, algorithm: str, fixed: float, slope: float) -> Table:
        """What a sum takes by an algorithm. `fixed`: without its bytes, by the usual one of a few bytes; `slope`: of a
        byte, by the usual one of many."""
        if not (runs := self.samples.named(by_name(algorithm))):
            return Table.line(fixed, slope)
        (few, some), (usual, _) = self._few_and_some(algorithm), self._few_and_some(self.subject.algorithms[0])
        a_byte = max(0.0, some - few) / ((runs[-1].rows - runs[0].rows) * self.row)
        a_byte *= slope / self.slope if self.slope > 0 else 1.0  # on this wire
        return Table.line(max(0.3 * fixed, fixed + few - usual), slope if algorithm == "two-shot" else a_byte)

    def _few_and_some(self, algorithm: str) -> tuple[float, float]:
        """Seconds of sums of one row and of more."""
        name = by_name(algorithm)
        few, some = (fmean(self._sums(name, run.rows)) for run in self.samples.named(name))
        return few, some

    def beside_computation(self, costs: Costs) -> Costs:
        """With what sums take from computation, from what they take of the processor and from programs cut in two."""
        sizes = self.samples.sizes
        middle, most = next((n for n in sizes if n * self.row > self.subject.limit), sizes[-1]), sizes[-1]
        some, many = self._processor(middle), self._processor(most)
        per_byte = max(0.0, many - some) / ((most - middle) * self.row) if most > middle else 0.0
        fixed = max(0.0, some - per_byte * middle * self.row)
        fitted = Contention(
            small=self._processor(sizes[0]), fixed=fixed, per_byte=per_byte, wake=self._wake(), burst=self.burst
        )
        # Part of that falls into pauses of the computation, where nothing is lost by it.
        part = self._lost_part(replace(costs, contention=fitted))
        fitted = replace(fitted, small=part * fitted.small, fixed=part * fitted.fixed, per_byte=part * fitted.per_byte)
        corrected = replace(costs, contention=fitted)
        turns = [self._turn(corrected, run) for run in self.samples.named("cut")]
        contention = replace(fitted, turn=max(0.0, median(turns)) if turns else 0.0)
        wires = {name: replace(wire, codec=self._codec(name, contention, part)) for name, wire in costs.wires.items()}
        return replace(costs, contention=contention, wires=wires)

    def _codec(self, wire: str, contention: Contention, part: float) -> Table:
        """What sums on this wire take of the processor beyond what those on the first one do for as many bytes;
        `part` of it is lost to computation."""
        if wire == self.subject.first_wire:
            return NOTHING
        sizes, costs = self.samples.sizes, WireCosts({}, self.subject.limit, NOTHING, 1.0)
        points = {0.0: 0.0}
        for rows in (sizes[0], sizes[-1]):
            size = self._bytes(rows, wire)
            points[size] = max(0.0, part * self._processor(rows, wire) - contention.taken(costs, size, 0.0))
        return Table(tuple(points), tuple(points.values()))

    def _sums(self, name: str, rows: int, wire: str | None = None) -> list[float]:
        """Sums' seconds. Back to back, the first one is left out: it found the link idle."""
        first = 1 if name.startswith("network") else 0
        each = [self._taken(sample.timeline) for sample in self.samples.of(name, rows, wire)]
        return [seconds for taken in each for seconds in taken[first:] or taken]

    def _slope(self, wire: str) -> float:
        """Seconds of one byte more on this wire."""
        less, more = self.samples.sizes[-2:]
        several = len(self.subject.summing) > 2  # then small sums go another way, which is shorter
        few = next((n for n in self.samples.sizes if not several or n * self.row > self.subject.limit), more)
        element = self.subject.width * self.subject.elements[wire]
        shortest, short, long = (fmean(self._sums("network", n, wire)) for n in (few, less, more))
        grown, whole = max(0.0, long - shortest) / (more * element), long / (more * element)
        return min(max((long - short) / ((more - less) * element), 0.7 * grown), whole)

    def _burst(self) -> float:
        """Bytes that an idle link takes at once: what a pass's first sum lacks of all that its bytes would take. Of the
        smallest sums that are more than that, where it is most of the difference."""
        saved, least = 0.0, fmean(self._sums("serial", self.samples.sizes[0]))
        for n in (n for n in self.samples.sizes if n * self.row >= SMALLEST_BURST or n == self.samples.sizes[-1]):
            first = median(self._taken(sample.timeline)[0] for sample in self.samples.of("serial", n))
            size = n * self.row
            saved = (least + size * self.slope - first) / self.slope if self.slope > 0 else 0.0
            if saved < 0.8 * size:
                break
        return min(saved, LARGEST_BURST) if saved > 1.5 * self.row else 0.0  # less is in `least`: a row's own bytes

    def _fixed(self) -> float:
        """Seconds that every sum takes beside its bytes: of one row, and of a few where their bytes hardly count."""
        seconds: list[float] = []
        for n in (n for n in self.samples.sizes if n <= FEW):
            sums = self._sums("serial", n)
            # What an idle link takes at once is there again for the next row, and for more rows once in a pass.
            passes = len(self.samples.of("serial", n))
            at_once = self.burst * passes / len(sums) if seconds else self.burst
            on_the_wire = self.slope * max(0.0, n * self.row * (len(self.subject.summing) - 1) - at_once)
            if not seconds or on_the_wire < 0.3 * fmean(sums):
                seconds += [max(s - on_the_wire, 0.1 * s) for s in sums]
        return fmean(seconds)

    def _processor(self, rows: int, wire: str | None = None) -> float:
        """Processor seconds of one sum of so many rows, from runs that do nothing but communicate."""
        runs = self.samples.of("network", rows, wire)
        return median(
            KERNEL * max(sample.processor) / len(self._taken(sample.timeline))
            for sample in runs
        )  # fmt: skip

    def _lost_part(self, costs: Costs) -> float:
        """How much longer the compute lane was busy beside sums, as a part of what their processor seconds predict."""
        expected = lost = 0.0
        for run in self.samples.named("cut"):
            full, none = (
                simulate(run.program, run.batch, known, run.wire).busy(0, COMPUTE)
                for known in (costs, replace(costs, contention=Contention()))
            )
            expected += full - none
            pairs = zip(self.samples.of("cut", run.rows), self.samples.of("computed", run.rows), strict=True)
            lost += median(_computing(cut) - _computing(alone) for cut, alone in pairs)
        return min(max(lost / expected, LEAST_LOST), 1.0) if expected > 0 else 0.0

    def _turn(self, costs: Costs, run: Trial) -> float:
        """Seconds that a sum takes longer while something computes than it is predicted to without that."""
        expected = fmean(self._taken(simulate(run.program, run.batch, costs, run.wire)))
        return median(fmean(self._taken(sample.timeline)) for sample in self.samples.of("cut", run.rows)) - expected

    def _wake(self) -> float:
        """Seconds from a collective's end to the start of what waited for it."""
        samples = (sample for n in self.samples.sizes for sample in self.samples.of("serial", n))
        gaps = [gap for sample in samples for rank in self.subject.summing for gap in _gaps(sample.timeline, rank)]
        return median(gaps) if gaps else 0.0


def _gaps(timeline: Timeline, rank: int) -> Iterator[float]:
    """Of a serial pass: every step of a layer but the first one follows a collective."""
    network = timeline.lane(rank, NETWORK)
    ends = (event.stop for event in network)
    starts = (event.start for event in timeline.lane(rank, COMPUTE) if network and event.start > network[0].start)
    yield from (start - end for start, end in zip(starts, ends, strict=False) if start > end)


def _computing(sample: Sample) -> float:
    """Seconds that the busiest rank computes."""
    return max(sample.timeline.busy(rank, COMPUTE) for rank in sample.timeline.ranks)


def _collectives(timeline: Timeline, aside: Collection[str], ranks: Sequence[int]) -> list[float]:
    """Seconds of each sum of these ranks, but for those of parts `aside`, from when the last rank came until the last
    one has it."""
    lanes = [
        [e for e in timeline.lane(rank, NETWORK) if e.kind is Kind.REDUCE and e.stage.rpartition(".")[2] not in aside]
        for rank in ranks
    ]
    return [max(e.stop for e in same) - max(e.start for e in same) for same in zip(*lanes, strict=True)]


def _rising(table: Table) -> Table:
    """The same, with no size faster than a smaller one: noise must not make cutting look free."""
    seconds: list[float] = []
    for value in table.seconds:
        seconds.append(max([value, *seconds[-1:]]))
    return Table(table.sizes, tuple(seconds))


def _straight(table: Table) -> Table:
    """From STRAIGHT on a straight line, by least squares of relative differences; rising everywhere."""
    points = [(x, y, 1 / y**2) for x, y in zip(table.sizes, table.seconds, strict=True) if x >= STRAIGHT and y > 0]
    if len(points) < 3:
        return _rising(table)
    weight = sum(w for _, _, w in points)
    middle, height = sum(w * x for x, _, w in points) / weight, sum(w * y for _, y, w in points) / weight
    over = sum(w * (x - middle) * (y - height) for x, y, w in points)
    slope = over / sum(w * (x - middle) ** 2 for x, _, w in points)
    slope = min(max(slope, 0.0), height / middle)  # no cost of a cut below zero
    line = {x: height + slope * (x - middle) for x, _, _ in points}
    return _rising(Table(table.sizes, tuple(line.get(x, y) for x, y in zip(table.sizes, table.seconds, strict=True))))


def _less(table: Table, seconds: Iterator[float]) -> Table:
    """Without so many seconds at each size; something is always left."""
    pairs = zip(table.seconds, seconds, strict=True)
    return _rising(Table(table.sizes, tuple(max(0.05 * whole, whole - part) for whole, part in pairs)))
