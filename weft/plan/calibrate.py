"""Measures what steps cost on two or more live ranks, in a few seconds, through a callback that runs a program.

Short programs of a few layers, serial, cut, tiled and scattered, run in rounds until the time is used up; readings.py
makes costs of what they took. A pipeline's sections are measured all at once (spread.py), and what goes between them.
Knows programs and seconds; knows nothing of processes. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from weft.layout import Layout
from weft.plan.readings import read
from weft.plan.samples import Sample, Samples, Subject, Trial, by_name, sent_to
from weft.plan.sends import halves
from weft.plan.spread import ROUND_TRIPS, round_trips, spread, sums_of_some
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.stages import NETWORK
from weft.program.steps import Program
from weft.program.strategy import Strategy
from weft.simulate.cost import Costs, Table
from weft.timeline.timeline import median

BUDGET = 4.0  # seconds of measuring; the whole takes at most 5
ROUNDS, SEVERAL = 9, 6  # rounds at most, and those for which runs are made small enough
MOST = 2048  # rows that suffice
EARLIER = 128  # positions, from which on what they cost is more than noise
# The largest number of rows, and the layers that are run with few rows: weights that were not used for a while are
# read from memory, so few rows want many layers. The second ones are for machines that can't afford SEVERAL rounds.
EXTENTS = ((2048, 8), (1024, 8), (512, 8), (256, 8), (256, 2))
SLOWEST = 2.0  # seconds of a run of a few rows: a round has some thirty runs, and most of more rows
SOME_BYTES = 256 << 10  # of a sum, by which algorithms are told apart
LONG = 0.1  # seconds of a message, from which larger ones are not sent
SENT_BYTES = 512 << 10  # of the largest message between sections
OFTEN = 4  # times in a round, of messages of a row: they are short, and wires differ by little there
STOPGAPS = ((256, 2), (128, 2), (64, 1))

# Runs a program on a batch of any tokens: (batch, program, wire, "both", or one side alone: "compute", "network", or
# "beside": messages on the threads that send beside a computation).
Probe = Callable[[Batch, Program, str, str], Sample]


class TooSlow(Exception):
    """Measuring what steps cost would take minutes."""


def calibrate(probe: Probe, subject: Subject, watch: Callable[[float], None] = lambda done: None) -> Costs:
    """Costs of these ranks on this link. `watch` is told the share that is done, 0 to 1.

    Raises `TooSlow` for a link over which that would take minutes.
    """
    begin = time.monotonic()
    most, deep = _extent(probe, subject)
    runs = tuple(_runs(subject, most, deep))
    if (written := _earlier(subject, most)[1]) >= EARLIER:  # once: memory that never was is read much faster
        fill = _run(subject, "written", written, deep)
        probe(fill.batch, fill.program, fill.wire, fill.scope)
    samples, number, first = Samples(subject, runs), 0, time.monotonic()

    def until(now: float) -> float:
        return (now - begin) / BUDGET

    while number < ROUNDS:
        a_round = (time.monotonic() - first) / number if number else 0.0
        if number and until(time.monotonic() + a_round) > 1:
            break
        for index, run in enumerate(runs):
            samples.add(run, probe(run.batch, run.program, run.wire, run.scope))
            watch(min(1.0, max(until(time.monotonic()), (number + index / len(runs)) / ROUNDS)))
        number += 1
    return read(samples)


def measure_sums(probe: Probe, subject: Subject, counts: Sequence[int]) -> dict[int, Table]:
    """Seconds of sums of so many ranks against bytes, whatever layout is loaded."""
    row, found = subject.width * subject.elements[subject.first_wire], dict[int, Table]()
    for count in counts:
        ranks, points = tuple(range(count)), dict[float, float]()
        for rows in sorted({1, 32, max(64, int(SOME_BYTES / row))}):
            if points and list(points.values())[-1] > LONG:
                break  # what more bytes take, these say
            program, seconds = sums_of_some(subject.outline, ranks, rows), list[float]()
            for _ in range(4):
                timeline = probe(one_prompt(rows), program, subject.first_wire, "network").timeline
                lanes = [timeline.lane(rank, NETWORK)[1:] for rank in ranks]
                seconds += [max(e.stop for e in s) - max(e.start for e in s) for s in zip(*lanes, strict=True)][1:]
            points[rows * row] = max([median(seconds), *list(points.values())[-1:]])
        found[count] = Table(tuple(points), tuple(points.values()))
    return found


def measure_message(probe: Probe, subject: Subject) -> dict[int, Table]:
    """Under 1, seconds of a message from the first rank to the second one against bytes, whatever layout is loaded."""
    pair, row = Layout((1, 1), ((1.0,), (1.0,))), subject.width * subject.elements[subject.first_wire]
    points = dict[float, float]()
    for rows in (1, 64):
        program = round_trips(subject.outline, pair, 1, rows)
        timeline = probe(one_prompt(rows), program, subject.first_wire, "beside").timeline
        points[rows * row] = max([median(halves(timeline, 0)), *points.values()])
    return {1: Table(tuple(points), tuple(points.values()))}


def _extent(probe: Probe, subject: Subject) -> tuple[int, int]:
    """How many rows and layers can be afforded, found on a few."""
    rows = min(64, subject.length)
    for few in (1, rows, rows):  # the first ones warm up
        run = _run(subject, "scout", few, 2)
        sample = probe(run.batch, run.program, run.wire, run.scope)
        if sample.seconds > SLOWEST:
            raise TooSlow(f"{few} row{'s' if few > 1 else ''} of two layers took {sample.seconds:.1f} s")
    if subject.layout is not None:
        program = round_trips(subject.outline, subject.layout, 1, rows)
        sent = probe(one_prompt(rows), program, subject.first_wire, "beside").seconds
        if sent > SLOWEST:
            raise TooSlow(f"{ROUND_TRIPS} times {rows} rows to the next section and back took {sent:.1f} s")
    a_row = sample.seconds / rows / min(2, subject.layers)
    affordable = [
        (most, deep)
        for extents, seconds in ((EXTENTS, BUDGET / SEVERAL), (STOPGAPS, 0.8 * BUDGET))
        for most, deep in extents
        if a_row * (13 * most + 26 * deep) < seconds  # rows times layers of a round, as _runs has them
    ]
    most, deep = affordable[0] if affordable else STOPGAPS[-1]
    return min(most, subject.length), deep


def _runs(subject: Subject, most: int, deep: int) -> Iterator[Trial]:
    """One round. Runs whose difference matters stand side by side."""
    sizes = sorted({n for n in (1, 16, 64, 128, most // 2, most) if 1 <= n <= most})
    for n in sizes:
        yield _run(subject, "serial", n, deep if n <= 16 else 2 if n <= 128 else 1)
    yield from _sums(subject, most, sizes) if len(subject.summing) > 1 else ()
    yield from _sends(subject, most)
    parts = min(subject.slots, 16)
    if 4 <= parts <= most:
        edges = [most * i // parts for i in range(parts + 1)]
        short = Batch(tuple(Segment(i, 0, b - a) for i, (a, b) in enumerate(pairwise(edges))))
        yield _run(subject, "parted", most, 1, batch=short)
    new, earlier = _earlier(subject, most)
    if earlier >= EARLIER:
        for n in sorted({min(128, new), new}):
            yield _run(subject, "past", n, 1, batch=Batch((Segment(0, earlier, n),)))
        yield _run(subject, "past", 1, deep, batch=Batch((Segment(0, earlier, 1),)))
    for n in sorted({n for n in (2, 32, 128, most) if 1 < n <= most}):
        yield _run(subject, "tiles", n, 1, "tiles:2")
    for n in sorted({max(2, most // 4), most}) if len(subject.summing) > 1 and most > 1 else ():
        if subject.outline.scatters and subject.layout is None:
            yield _run(subject, "scattered", n, 1, "rs")
        if n >= 2 * subject.granule:
            yield _run(subject, "cut", n, 2, "iso:2")
            yield _run(subject, "computed", n, 2, "iso:2", scope="compute")
    # Here the round ends: a link saves up for the next one's small sums, which shall not wait for what was sent before.


def _earlier(subject: Subject, most: int) -> tuple[int, int]:
    """Rows, and positions before them, with which it is measured what earlier positions cost."""
    new = most if 2 * most <= subject.length else most // 2
    earlier = min(max(1024, new), 2 * most, subject.length - new)  # which a slow machine can afford to write
    return new, earlier // subject.granule * subject.granule


def _sums(subject: Subject, most: int, sizes: list[int]) -> Iterator[Trial]:
    """Nothing but sums: on each wire, and by each algorithm, where there are several."""
    row = subject.width * subject.elements[subject.first_wire]
    for algorithm in subject.algorithms if len(subject.algorithms) > 1 else ():
        for n in (1, max(2, min(most, int(SOME_BYTES / row)))):
            yield _run(subject, by_name(algorithm), n, 2, scope="network", algorithm=algorithm)
    for n in sizes:
        for wire in [*subject.elements] * (OFTEN if n == sizes[0] else 1):
            layers = -(-(4 if n <= 16 else 2) // subject.sums)  # the first sum finds the link idle
            yield _run(subject, "network", n, layers, wire=wire, scope="beside")


def _sends(subject: Subject, most: int) -> Iterator[Trial]:
    """Nothing but messages between sections."""
    sections = len(subject.layout.sections) if subject.layout is not None else 1
    for number in range(1, sections):
        assert subject.layout is not None
        row = subject.width * subject.elements[subject.first_wire]
        for n in sorted({min(n, most) for n in (1, 64, int(SENT_BYTES / row))} - {0}):
            program = round_trips(subject.outline, subject.layout, number, n)
            for wire in subject.elements:
                yield Trial(sent_to(number), n, one_prompt(n), program, wire, "beside")


def _run(
    subject: Subject, name: str, rows: int, layers: int, strategy: str = "serial", *, batch: Batch | None = None,
    wire: str | None = None, scope: str = "both", algorithm: str = "",
) -> Trial:  # fmt: skip
    """A program of a model that ends after its first layers."""
    batch = batch or one_prompt(rows)
    outline = replace(subject.outline.of(min(subject.layers, layers)), narrows=False)  # layers are to take alike
    program = build(Strategy.parse(strategy), outline, batch, subject.granule)
    program = program.summed_by(lambda _: algorithm) if algorithm else program
    if subject.layout is not None:
        scope = "compute" if scope == "both" and len(subject.summing) == 1 else scope
        program = spread(program, subject.outline, subject.layout, scope in ("both", "compute"))
    return Trial(name, rows, batch, program, wire or subject.first_wire, scope)
