"""Measures what steps cost on two or more live ranks, in a few seconds, through a callback that runs a program.

Short programs of one or two layers, serial, cut, tiled and scattered, run in rounds until the time is used up; medians
of their spans become the tables of `Costs`. Knows programs, spans and seconds; knows nothing of processes. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.steps import Kind, Lane, Program, Stage, decoder_stages
from weft.program.strategy import Strategy
from weft.simulate.cost import ComputeCosts, Contention, Costs, Table, WireCosts
from weft.simulate.run import simulate
from weft.timeline.timeline import Timeline, median

BUDGET = 4.0  # seconds of measuring; the whole takes at most 5
ROUNDS = 9
PARTS = ("attention", "mlp")
SUMS = (Kind.REDUCE,)
LEAST, MOST = 256, 2048  # rows: what is measured even where it takes long, and what suffices
KERNEL = 1.2  # interrupts of the network's are on no process's account: measured, docs/log.md
LEAST_LOST = 0.25  # of a collective's processor seconds: what is lost at least, whatever noise says
LARGEST_BURST = 1e6  # bytes: more than token buckets and buffers take
STRAIGHT = 64  # rows from which on a stage's time is a straight line: smooths noise that cuts would be chosen by


class Sample(NamedTuple):
    """One run: seconds of the slowest rank's program, processor seconds of each rank, and the timeline."""

    seconds: float
    processor: list[float]
    timeline: Timeline


# Runs a program on a batch of any tokens: (batch, program, wire, "both" or "network").
Probe = Callable[[Batch, Program, str, str], Sample]


@dataclass(frozen=True)
class Subject:
    """What is calibrated. `length`: positions of a sequence; `slots`: sequences at a time. `limit`: bytes up to which
    a sum takes one hop. `elements`: bytes of a number, by wire. `logits`: bytes of a row of a rank's logits."""

    layers: int
    width: int
    logits: float
    world: int
    length: int
    slots: int
    limit: float
    elements: dict[str, float]
    window: int | None = None


class _Run(NamedTuple):
    """One thing to run in every round, and what it is for."""

    name: str
    rows: int
    batch: Batch
    program: Program
    wire: str
    part: str = "both"


def calibrate(probe: Probe, subject: Subject, watch: Callable[[float], None] = lambda done: None) -> Costs:
    """Costs of these ranks on this link. `watch` is told the share that is done, 0 to 1."""
    return _Calibration(probe, subject, watch).costs()


class _Calibration:
    def __init__(self, probe: Probe, subject: Subject, watch: Callable[[float], None]) -> None:
        self.probe, self.subject, self.watch = probe, subject, watch
        self.first_wire = next(iter(subject.elements))
        self.samples: dict[tuple[str, int, str], list[Sample]] = {}
        self.deadline = time.monotonic() + BUDGET

    def costs(self) -> Costs:
        """Measures, then reads the tables off."""
        self.runs = runs = self._runs(self._scout())
        begin, number = time.monotonic(), 0
        while number == 0 or (number < ROUNDS and time.monotonic() + self._a_round(begin, number) < self.deadline):
            for index, run in enumerate(runs):
                self._take(run)
                used = 1 - (self.deadline - time.monotonic()) / BUDGET
                self.watch(min(1.0, max(used, (number + index / len(runs)) / ROUNDS)))
            number += 1
        self.rounds = number
        return self._read()

    @staticmethod
    def _a_round(begin: float, rounds: int) -> float:
        return (time.monotonic() - begin) / rounds

    def _scout(self) -> int:
        """How many rows can be afforded, found on a few."""
        trials = [self._run("scout", min(64, self.subject.length), 2) for _ in range(2)]
        for trial in trials:  # the first one warms up
            sample = self.probe(trial.batch, trial.program, trial.wire, trial.part)
        a_row = sample.seconds / trials[-1].rows / 2
        most = LEAST
        while 2 * most <= MOST and a_row * (1000 + 14 * most) < BUDGET / 6:
            most *= 2
        return min(most, self.subject.length)

    def _take(self, run: _Run) -> None:
        sample = self.probe(run.batch, run.program, run.wire, run.part)
        self.samples.setdefault((run.name, run.rows, run.wire), []).append(sample)

    def _runs(self, most: int) -> list[_Run]:
        """One round. Runs whose difference matters stand side by side."""
        length, slots = self.subject.length, self.subject.slots
        self.sizes = sorted({n for n in (1, 16, 64, 128, most // 2, most) if n <= length})
        self.halves = sorted({n for n in (2, 32, 128, most) if 1 < n <= length})
        self.most, self.earlier, self.parted = most, min(1024, length - most), min(slots, 16)
        runs = [self._run("serial", n, 1 if n > 128 else 2 if n > 16 else 8) for n in self.sizes]
        if self.parted >= 4:
            runs.append(self._run("parted", most, 1, batch=_parted(most, self.parted)))
        if self.earlier >= LEAST:
            runs.append(self._run("past", most, 1, batch=_after(self.earlier, most)))
            runs.append(self._run("past", 1, 8, batch=_after(self.earlier, 1)))
        runs += [self._run("tiles", n, 1, "tiles:2") for n in self.halves]
        self.crossed = [max(2, most // 4), most]
        for n in self.crossed:
            runs += [self._run("cut", n, 2, "iso:2"), self._run("computed", n, 2, "iso:2", part="compute")]
        runs += [self._run("scattered", n, 1, "rs") for n in self.crossed]
        for wire in self.subject.elements:
            runs += [self._run("network", n, 2, wire=wire, part="network") for n in self.sizes if n <= 16]
            runs += [self._run("network", n, 1, wire=wire, part="network") for n in self.sizes if n > 16]
        return runs

    def _run(
        self, name: str, rows: int, layers: int, strategy: str = "serial", *, batch: Batch | None = None,
        wire: str | None = None, part: str = "both",
    ) -> _Run:  # fmt: skip
        batch = batch or one_prompt(rows)
        program = build(Strategy.parse(strategy), _first(self.subject.layers, layers), batch)
        return _Run(name, rows, batch, program, wire or self.first_wire, part)

    def _read(self) -> Costs:
        wires, burst = self._wires()
        ranks = tuple(self._rank(rank) for rank in range(self.subject.world))
        costs = Costs(ranks, wires, Contention(), self.subject.width, self.subject.logits, self.subject.world)
        return replace(costs, contention=self._contention(costs, burst))

    def _of(self, name: str, rows: int, wire: str | None = None) -> list[Sample]:
        return self.samples.get((name, rows, wire or self.first_wire), [])

    def _seconds(self, name: str, rows: int, rank: int, kinds: Iterable[Kind], part: str) -> float:
        """One rank's step of this part, in the median over layers and rounds; body and tail count as one."""
        kinds = tuple(kinds)
        return median(
            event.seconds
            for sample in self._of(name, rows)
            for event in sample.timeline.events
            if event.rank == rank and event.kind in kinds and event.stage.rpartition(".")[2] == part
        )

    def _rank(self, rank: int) -> ComputeCosts:
        whole = {part: self._whole(rank, part) for part in (*PARTS, "embed", "head")}
        past, one = self._past(rank)
        present = self._present(rank, past)
        lone = whole["attention"]
        scores = [present.at(n) * n * n if n > 1 else one for n in lone.sizes]
        pairs = zip(lone.seconds, scores, strict=True)
        whole["attention"] = _rising(Table(lone.sizes, tuple(max(0.1 * whole, whole - part) for whole, part in pairs)))
        tail = {part: self._tail(rank, part) for part in PARTS}
        body = {part: _less(whole[part], tail[part]) for part in PARTS}
        body |= {part: whole[part] for part in ("embed", "head")}
        tail |= {part: Table((1.0,), (0.0,)) for part in ("embed", "head")}
        begin = Table(
            tuple(map(float, self.sizes)),
            tuple(median(max(0.0, s.seconds - s.timeline.seconds) for s in self._of("serial", n)) for n in self.sizes),
        )
        return ComputeCosts(body, tail, self._enter(rank), present, past, one, begin, self.subject.window)

    def _whole(self, rank: int, part: str) -> Table:
        """A stage by its rows; the head by its sampled rows."""
        kinds = (Kind.COMPUTE,)
        if part != "head":
            seconds = [self._seconds("serial", n, rank, kinds, part) for n in self.sizes]
            return _straightened(Table(tuple(map(float, self.sizes)), tuple(seconds)))
        one = median(self._seconds("serial", n, rank, kinds, part) for n in self.sizes)
        several = [name for name in self.samples if name[0] == "parted"]
        if not several:
            return Table((1.0,), (one,))
        more = median(self._seconds("parted", rows, rank, kinds, part) for _, rows, _ in several)
        return Table((1.0, float(self.parted)), (one, max(one, more)))

    def _past(self, rank: int) -> tuple[float, float]:
        """Seconds for a pair of one of several new tokens and an earlier one, and for a key that a lone token sees."""
        kinds, rows = (Kind.COMPUTE,), (self.most, 1)
        if not self._of("past", 1):
            return 0.0, 0.0
        alone, longer = (
            [self._seconds(name, n, rank, kinds, "attention") for n in rows] for name in ("serial", "past")
        )
        extra = [max(0.0, late - early) / self.earlier for early, late in zip(alone, longer, strict=True)]
        return extra[0] / self.most, extra[1]

    def _present(self, rank: int, past: float) -> Table:
        """Seconds for each pair of the n x n square of new tokens with themselves.

        One prompt, less what as many rows take in short prompts, whose own scores count as earlier ones.
        """
        each = past
        if self._of("parted", self.most):
            names = ("serial", "parted")
            lone, parted = (self._seconds(name, self.most, rank, (Kind.COMPUTE,), "attention") for name in names)
            each = (lone - parted) / self.most**2 + past / self.parted
        return Table((0.0, 512.0, 1e6), (past, max(0.3 * past, each), max(0.3 * past, each)))

    def _tail(self, rank: int, part: str) -> Table:
        sizes = tuple(n / 2 for n in self.halves)
        seconds = tuple(self._seconds("tiles", n, rank, (Kind.TAIL,), part) for n in self.halves)
        return _straightened(Table(sizes, seconds))

    def _enter(self, rank: int) -> Table:
        sizes = tuple(n / self.subject.world for n in self.crossed)
        seconds = [
            median(self._seconds("scattered", n, rank, (Kind.ENTER,), part) for part in PARTS[1:])
            for n in self.crossed
        ]  # fmt: skip
        return Table((0.0, *sizes), (0.0, *seconds))

    def _sums(self, name: str, rows: int, wire: str | None = None) -> float:
        """A sum's seconds, in the mean, because a few wait for a turn of the processor that others don't.

        Taken on the rank that came last, whose span holds no waiting for the others. Back to back, the first one is
        left out: it found the link idle.
        """
        first = 1 if name == "network" else 0
        samples = self._of(name, rows, wire)
        return fmean(seconds for sample in samples for seconds in _collectives(sample.timeline, SUMS)[first:])

    def _first_sum(self, rows: int) -> float:
        """The same, in the median, of the first sum of a serial pass: it always finds the link idle for long."""
        return median(_collectives(sample.timeline, SUMS)[0] for sample in self._of("serial", rows))

    def _fixed(self, slope: float, burst: float) -> float:
        """Seconds that every sum takes beside its bytes, from those of few rows; `slope`: seconds of a byte."""
        found = []
        for n in (n for n in self.sizes if n <= 16):
            size = n * self.subject.width * self.subject.elements[self.first_wire] * (self.subject.world - 1)
            waited = slope * max(0.0, size - burst)
            sums = [s for x in self._of("serial", n) for s in _collectives(x.timeline, SUMS)]
            found += [max(s - waited, 0.1 * s) for s in sums]
        return fmean(found)

    def _wires(self) -> tuple[dict[str, WireCosts], float]:
        """What sums take on each wire, as straight lines, and the bytes that the idle link takes at once.

        Seconds of a byte are from the largest sums, back to back; those of a sum without bytes from small ones.
        """
        world = self.subject.world
        slope = {wire: self._slope(wire) for wire in self.subject.elements}
        first = slope[self.first_wire]
        burst = (self._sums("network", self.sizes[-1]) - self._first_sum(self.sizes[-1])) / first if first > 0 else 0.0
        burst = min(max(0.0, burst), LARGEST_BURST)
        fixed = self._fixed(first, burst)
        hops = 1 if world == 2 else 2  # two ranks swap whole partials in one
        return {
            wire: WireCosts(
                Table.line(fixed, (world - 1) * slope[wire]), Table.line(fixed, slope[wire]), self.subject.limit,
                Table.line(fixed / hops, slope[wire] / 2), element,
            )
            for wire, element in self.subject.elements.items()
        }, burst  # fmt: skip

    def _slope(self, wire: str) -> float:
        """Seconds of one byte more on this wire."""
        less, more = self.sizes[-2:] if len(self.sizes) > 1 else (self.sizes[0], self.sizes[0])
        element = self.subject.width * self.subject.elements[wire]
        short, long = self._sums("network", less, wire), self._sums("network", more, wire)
        whole = long / (more * element)
        return min(max((long - short) / ((more - less) * element), 0.7 * whole), whole) if more > less else whole

    def _contention(self, costs: Costs, burst: float) -> Contention:
        """What the lanes do to each other."""
        wire = costs.wires[self.first_wire]
        element = self.subject.width * wire.element
        middle = next((n for n in self.sizes if n * element > wire.limit), self.sizes[-1])
        some, most = self._processor(middle), self._processor(self.sizes[-1])
        more = (self.sizes[-1] - middle) * element
        per_byte = max(0.0, most - some) / more if more else 0.0
        fixed = max(0.0, some - per_byte * middle * element)
        apart = Contention(
            small=self._processor(self.sizes[0]), fixed=fixed, per_byte=per_byte, wake=self._wake(), burst=burst
        )
        # Part of that is waiting in a loop for something to do, by which nothing is lost beside a computation.
        part = self._lost_part(replace(costs, contention=apart))
        apart = replace(apart, small=part * apart.small, fixed=part * apart.fixed, per_byte=part * apart.per_byte)
        without = replace(costs, contention=apart)
        turn = median(self._turn(without, run) for run in self.runs if run.name == "cut")
        return replace(apart, turn=max(0.0, turn))

    def _processor(self, rows: int) -> float:
        """Processor seconds of one sum of so many rows, from runs that do nothing but communicate."""
        found = []
        for sample in self._of("network", rows):
            sums = sum(event.rank == 0 for event in sample.timeline.events)
            found.append(KERNEL * max(sample.processor) / sums)
        return median(found)

    def _lost_part(self, costs: Costs) -> float:
        """How much longer the compute lane was busy beside sums, as a part of what their processor seconds predict."""
        expected = lost = 0.0
        for run in (run for run in self.runs if run.name == "cut"):
            busy = [
                simulate(run.program, run.batch, known, run.wire).busy(0, Lane.COMPUTE)
                for known in (costs, replace(costs, contention=Contention()))
            ]
            expected += busy[0] - busy[1]
            pairs = zip(self._of("cut", run.rows), self._of("computed", run.rows), strict=True)
            lost += median(_compute(cut) - _compute(alone) for cut, alone in pairs)
        return min(max(lost / expected, LEAST_LOST), 1.0) if expected > 0 else 0.0

    def _turn(self, costs: Costs, run: _Run) -> float:
        """Seconds that a sum takes longer while something computes than it is predicted to without that."""
        expected = _collectives(simulate(run.program, run.batch, costs, run.wire), SUMS)
        taken = [_collectives(sample.timeline, SUMS) for sample in self._of("cut", run.rows)]
        return median(fmean(sums) for sums in taken) - fmean(expected)

    def _wake(self) -> float:
        """From a collective's end to the start of what waited for it."""
        found = []
        for n in self.sizes:
            for sample in self._of("serial", n):
                for rank in sample.timeline.ranks:
                    compute = sample.timeline.lane(rank, Lane.COMPUTE)
                    ends = [e.stop for e in sample.timeline.lane(rank, Lane.NETWORK)]
                    starts = [e.start for e in compute[2:]]
                    found += [start - end for start, end in zip(starts, ends, strict=False) if start > end]
        return median(found) if found else 0.0


def _compute(sample: Sample) -> float:
    """Seconds that the busiest rank computes."""
    return max(sample.timeline.busy(rank, Lane.COMPUTE) for rank in sample.timeline.ranks)


def _first(layers: int, count: int) -> tuple[Stage, ...]:
    """The stages of a model that ends after its first layers."""
    return decoder_stages(min(layers, count))


def _after(earlier: int, rows: int) -> Batch:
    """A chunk of one sequence that has tokens before it."""
    return Batch((Segment(0, earlier, rows),))


def _parted(rows: int, sequences: int) -> Batch:
    """As many rows in short prompts."""
    edges = [rows * i // sequences for i in range(sequences + 1)]
    return Batch(tuple(Segment(i, 0, edges[i + 1] - edges[i]) for i in range(sequences)))


def _collectives(timeline: Timeline, kinds: Sequence[Kind]) -> list[float]:
    """Seconds of each collective of these kinds, on the rank where it took the shortest."""
    lanes = [[event for event in timeline.lane(rank, Lane.NETWORK) if event.kind in kinds] for rank in timeline.ranks]
    return [min(event.seconds for event in same) for same in zip(*lanes, strict=True)]


def _rising(table: Table) -> Table:
    """The same, with no size faster than a smaller one: noise must not make cutting look free."""
    seconds: list[float] = []
    for value in table.seconds:
        seconds.append(max([value, *seconds[-1:]]))
    return Table(table.sizes, tuple(seconds))


def _straightened(table: Table) -> Table:
    """From STRAIGHT on a straight line, by least squares of relative differences; rising everywhere."""
    points = [(x, y) for x, y in zip(table.sizes, table.seconds, strict=True) if x >= STRAIGHT]
    if len(points) < 3:
        return _rising(table)
    weights = [1 / y**2 for _, y in points]
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / sum(weights)
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / sum(weights)
    over = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = over / sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = min(max(slope, 0.0), mean_y / mean_x)  # no cost of a cut below zero
    line = {x: mean_y + slope * (x - mean_x) for x, _ in points}
    return _rising(Table(table.sizes, tuple(line.get(x, y) for x, y in zip(table.sizes, table.seconds, strict=True))))


def _less(whole: Table, part: Table) -> Table:
    """What is left of a stage without its tail."""
    pairs = zip(whole.sizes, whole.seconds, strict=True)
    return Table(whole.sizes, tuple(max(0.05 * seconds, seconds - part.at(size)) for size, seconds in pairs))
