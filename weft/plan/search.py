"""Searches the cuts of a batch: how many, where, for which stages, with tiles or scattered sums.

A candidate is judged by laying out three layers of it, from which the rest follows, because layers repeat. Knows
batches, cuts and costs; knows nothing of how costs were measured. About 0.05 ms a candidate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from weft.program.batch import Batch, Rows
from weft.program.build import weave
from weft.program.steps import Kind, Stage
from weft.program.strategy import Cuts, Strategy, on_granule, place
from weft.simulate.cost import Costs
from weft.simulate.run import Example, Structure, Taken, coupling, lay_out, taken

LAYERS = 3  # the first to fill the lanes, two to see what one more takes
TRIALS = 22  # candidates that are judged at most: keeps a plan under 3 ms
LEAST_ROWS = 32  # of a chunk: below, costs are mostly waits for turns of the processor
WORTH = 0.025  # of serial's time: a smaller gain than this is not worth the risk that costs are a little wrong
UNSURE = 0.5  # of what a collective takes beside its bytes: the least certain of all costs
SIMPLER = 0.01  # of the time: what a more complicated plan must gain over a simpler one

# What steps take by kind, part, first row, the one after the last, and whether they were entered elsewhere.
_Known = dict[tuple[Kind, str, int, int, bool], Taken]


class Estimate(NamedTuple):
    """Predicted seconds of a whole pass, and those that its lanes are busy."""

    seconds: float
    compute: float
    network: float


@dataclass(frozen=True)
class Template:
    """The structure of all candidates whose cuts come in the same order; edges are numbered, rows between follow.

    `columns`: for each of the structure's examples kind, part and whether it was entered elsewhere, then for its first
    row and for the one after its last the edge, and the part of the way to the next one, in `grain` parts. `layers`:
    where the last two layers start, in steps.
    """

    structure: Structure
    columns: tuple[tuple[Kind, str, bool, int, int, int, int], ...]
    layers: tuple[int, int]
    grain: int


@lru_cache(maxsize=512)
def template(
    attention: tuple[int, ...], others: tuple[int, ...], count: int, tiles: int, scattered: bool, ahead: bool,
    stages: tuple[Stage, ...], fused: bool,
) -> Template:  # fmt: skip
    """`attention` and `others` hold which of the `count` inner edges cut those stages, from 1 on."""
    grain = max(tiles, 2)
    cuts = Cuts(tuple(e * grain for e in attention), tuple(e * grain for e in others), tiles, scattered, ahead)
    program = weave(stages, (count + 1) * grain, cuts)
    structure = Structure.of(program, fused)
    columns = tuple(
        (e.kind, e.part, e.entered, *divmod(e.rows.start, grain), *divmod(e.rows.stop, grain))
        for e in structure.examples
    )
    starts = [
        index for index, step in enumerate(program.steps)
        if step.part == "attention" and step.rows.start == 0 and step.kind in (Kind.COMPUTE, Kind.BODY)
    ]  # fmt: skip
    return Template(structure, columns, (starts[-2], starts[-1]) if len(starts) > 1 else (0, 0), grain)


@dataclass(frozen=True)
class _LaidOut:
    """A few layers of a candidate; `more` of them follow, and `begin` seconds go before."""

    form: Template
    starts: list[float]
    stops: list[float]
    begin: float
    more: int

    @property
    def seconds(self) -> float:
        """Of all layers. One more takes as long as the last one did, but where queues still grow no less than its
        lanes are busy."""
        first, second = self.form.layers
        period = max(self.starts[second] - self.starts[first], *self._busy(first, second))
        return self.begin + max(self.stops) + self.more * period

    @property
    def estimate(self) -> Estimate:
        """With what the lanes are busy."""
        repeated, once = self._busy(*self.form.layers), self._busy(0, len(self.starts))
        compute, network = (a + self.more * b for a, b in zip(once, repeated, strict=True))
        return Estimate(self.seconds, self.begin + compute, network)

    def _busy(self, first: int, stop: int) -> list[float]:
        """Seconds of the compute and of the network lane, from one step to another."""
        both = [0.0, 0.0]
        for index in range(first, stop):
            both[self.form.structure.network[index]] += self.stops[index] - self.starts[index]
        return both


class Search:
    """Judges and finds cuts for one model. `stages`: all of the model's; `granule`: see `strategy.place`."""

    def __init__(self, stages: tuple[Stage, ...], granule: int = 1) -> None:
        self.layers, self.granule = (len(stages) - 2) // 2, granule
        self.short = stages[: 1 + 2 * LAYERS] + stages[-1:] if self.layers > LAYERS else stages

    def estimate(self, batch: Batch, cuts: Cuts, costs: Costs, wire: str) -> Estimate:
        """What a pass with these cuts takes. Raises KeyError for a wire without costs."""
        return self._laid_out(batch, cuts, costs, wire, {}).estimate

    def seconds(self, batch: Batch, cuts: Cuts, costs: Costs, wire: str, known: _Known) -> float:
        """The same, in less time; `known`: what steps take that were in earlier candidates."""
        return self._laid_out(batch, cuts, costs, wire, known).seconds

    def _laid_out(self, batch: Batch, cuts: Cuts, costs: Costs, wire: str, known: _Known) -> _LaidOut:
        edges = [0, *sorted({*cuts.attention, *cuts.others}), batch.tokens]
        number = {edge: place for place, edge in enumerate(edges)}
        form = template(
            tuple([number[edge] for edge in cuts.attention]), tuple([number[edge] for edge in cuts.others]),
            len(edges) - 2, cuts.tiles, cuts.scattered, cuts.ahead, self.short, costs.wires[wire].fused,
        )  # fmt: skip
        each = self._taken(form, edges, batch, costs, wire, known)
        starts, stops = lay_out(form.structure, each, coupling(costs, costs.wires[wire]))
        return _LaidOut(form, starts, stops, costs.pace.begin.at(batch.tokens), max(0, self.layers - LAYERS))

    def _taken(
        self, form: Template, edges: Sequence[int], batch: Batch, costs: Costs, wire: str, known: _Known
    ) -> list[Taken]:  # fmt: skip
        """What each of the form's examples takes, with the rows of this candidate."""
        found, way, pace, grain = [], costs.wires[wire], costs.pace, form.grain
        for kind, part, entered, first, start_part, last, stop_part in form.columns:
            start, stop = edges[first], edges[last]
            if start_part:
                start += round((edges[first + 1] - start) * start_part / grain)
            if stop_part:
                stop += round((edges[last + 1] - stop) * stop_part / grain)
            key = kind, part, start, stop, entered
            if key not in known:
                known[key] = taken(Example(kind, part, Rows(start, stop), entered), batch, costs, way, pace)
            found.append(known[key])
        return found

    def best(self, batch: Batch, costs: Costs, wire: str) -> Strategy:
        """The strategy that is predicted to be fastest; serial where little is gained."""
        return _Searching(self, batch, costs, wire).best()


class _Searching:
    """One search: candidates and what they are predicted to take."""

    def __init__(self, search: Search, batch: Batch, costs: Costs, wire: str) -> None:
        self.search, self.batch, self.costs, self.wire = search, batch, costs, wire
        self.tried: dict[Cuts, tuple[float, Strategy]] = {}
        self.known: _Known = {}

    def best(self) -> Strategy:
        serial = self._try(Strategy())
        alone = self.search.estimate(self.batch, Cuts(), self.costs, self.wire)
        if min(alone.compute, alone.network) < WORTH * serial or self.batch.tokens < 2 * LEAST_ROWS:
            return Strategy()
        for strategy in self._first():
            self._try(strategy)
        self._refine()
        safe = [
            (seconds * (1 + SIMPLER * _complexity(strategy)), number, strategy)
            for number, (cuts, (seconds, strategy)) in enumerate(self.tried.items())
            if seconds + self._risk(cuts) < (1 - WORTH) * serial
        ]
        return min(safe)[2] if safe else Strategy()

    def _risk(self, cuts: Cuts) -> float:
        """Seconds that a plan may take longer than predicted for the collectives that it has more than serial."""
        a_layer = (len(cuts.attention) + len(cuts.others) + 2) * cuts.tiles * (2 if cuts.scattered else 1)
        fixed = self.costs.wires[self.wire].small.at(0.0) + self.costs.contention.fixed
        return UNSURE * (a_layer - 2) * self.search.layers * fixed

    def _try(self, strategy: Strategy) -> float:
        """Seconds of a strategy; of one that has been tried, or that can't be afforded any more, no new ones."""
        cuts = place(strategy, self.batch, self.search.granule)
        if cuts not in self.tried:
            if len(self.tried) >= TRIALS or not self._wide(cuts):
                return float("inf")
            seconds = self.search.seconds(self.batch, cuts, self.costs, self.wire, self.known)
            self.tried[cuts] = seconds, strategy
        return self.tried[cuts][0]

    def _wide(self, cuts: Cuts) -> bool:
        """True if no chunk or tile is too small to be worth a step of its own."""
        edges = (0, *sorted({*cuts.attention, *cuts.others}), self.batch.tokens)
        return min(b - a for a, b in pairwise(edges)) >= LEAST_ROWS * (cuts.tiles if cuts.tiles > 1 else 1)

    def _first(self) -> Iterator[Strategy]:
        """Even cuts, tiles, scattered sums, cuts between sequences, cuts of equal time."""
        for chunks, others in ((2, 2), (3, 3), (4, 4), (2, 4)):
            yield Strategy(chunks=chunks, other_chunks=others)
        for chunks in (3, 4):
            yield Strategy(chunks=chunks, other_chunks=chunks, ahead=True)
        most = self._more_chunks()
        yield Strategy(tiles=4)
        yield Strategy(chunks=2, other_chunks=2, tiles=2)
        if len(self.batch.segments) > 1:
            for chunks in (2, 3):
                yield Strategy(chunks=chunks, other_chunks=chunks, requests=True)
        if self._uneven():
            for chunks in sorted({2, 3, most}):
                yield self._by_time([1.0] * chunks, 1)
        if self._leads(Strategy(scattered=True), Strategy()):
            yield Strategy(chunks=4, other_chunks=4, scattered=True)

    def _more_chunks(self) -> int:
        """As many even chunks as still pay: long prompts hide their last sum the better the shorter it is."""
        best = 4
        for chunks in (6, 8, 12):
            fewer, more = (Strategy(chunks=count, other_chunks=count) for count in (best, chunks))
            if self._try(more) > (1 - SIMPLER) * self._try(fewer):
                break
            best = chunks
        return best

    def _leads(self, one: Strategy, other: Strategy) -> bool:
        return self._try(one) < self._try(other)

    def _refine(self) -> None:
        """Other sizes of the best cut's chunks: a short last one leaves little to wait for at the end, and so on."""
        cutting = {c: entry for c, entry in self.tried.items() if c.attention and c.tiles == 1 and not c.scattered}
        if not cutting:
            return
        best, (seconds, _) = min(cutting.items(), key=lambda item: item[1][0])
        parts = max(1, round((len(best.others) + 1) / (len(best.attention) + 1)))
        times, ahead = self._times(best.attention), best.ahead
        last = len(times) - 1
        for ramp, at, factor in ((0.85, last, 1.0), (1.15, last, 1.0), (1.0, last, 0.6), (1.0, 0, 0.7), (1.0, 0, 1.3)):
            changed = [time * ramp**place * (factor if place == at else 1.0) for place, time in enumerate(times)]
            taken = self._try(replace(self._by_time(changed, parts), ahead=ahead))
            if taken < seconds:
                seconds, times = taken, changed

    def _uneven(self) -> bool:
        """True if equal times are not about equal rows."""
        half = self._by_time([1.0, 1.0], 1).cuts
        return half is not None and abs(half[0] / self.batch.tokens - 0.5) > 0.02

    @cached_property
    def _until(self) -> tuple[list[float], list[float]]:
        """Rows, and the seconds of one layer's computation of all rows until there."""
        return _curve(self.batch, self.costs)

    def _times(self, cuts: Iterable[int]) -> list[float]:
        rows, seconds = self._until
        edges = [0, *cuts, self.batch.tokens]
        at = [_between(rows, seconds, edge) for edge in edges]
        return [b - a for a, b in pairwise(at)]

    def _by_time(self, times: Sequence[float], parts: int) -> Strategy:
        """Chunks whose computation is in these proportions, the other stages' in `parts` of equal rows each."""
        rows, seconds = self._until
        total = sum(times)
        wanted = [seconds[-1] * done / total for done in accumulate(times)][:-1]
        attention = self._snapped(_between(seconds, rows, each) for each in wanted)
        edges = (0, *attention, self.batch.tokens)
        others = attention if parts == 1 else self._snapped(
            a + (b - a) * part / parts for a, b in pairwise(edges) for part in range(parts)
        )  # fmt: skip
        return Strategy(cuts=attention, other_cuts=others) if attention else Strategy()

    def _snapped(self, offsets: Iterable[float]) -> tuple[int, ...]:
        """On the granule; without one on multiples of 8 rows, where kernels like to end."""
        grain = self.search.granule
        placed = {on_granule(self.batch, 8 * round(offset / 8), grain) for offset in offsets}
        return tuple(sorted(placed - {0, self.batch.tokens}))


def _complexity(strategy: Strategy) -> int:
    """0 for serial; each thing that a plan has beyond it counts."""
    written = strategy.cuts is not None
    return (strategy != Strategy()) + written + (strategy.tiles > 1) + strategy.scattered + strategy.ahead


def _curve(batch: Batch, costs: Costs) -> tuple[list[float], list[float]]:
    """Rows and seconds, a few points for every sequence: scores grow with the square of its length."""
    pace = costs.pace
    a_row = sum(
        table.at(batch.tokens) for part in ("attention", "mlp") for table in (pace.body[part], pace.tail[part])
    ) / batch.tokens  # fmt: skip
    rows, seconds = [0.0], [0.0]
    for segment, span in zip(batch.segments, batch.spans, strict=True):
        pieces = 8 if span.length >= 256 else 1
        for piece in range(1, pieces + 1):
            at = span.length * piece / pieces
            step, middle = span.length / pieces, segment.start + at - span.length / pieces / 2
            pairs = min(middle, pace.window) if pace.window else middle
            rows.append(span.start + at)
            seconds.append(seconds[-1] + step * (a_row + pace.past * pairs))
    return rows, seconds


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x, straight between the points."""
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    left = right - 1
    width = xs[right] - xs[left]
    return ys[left] + (ys[right] - ys[left]) * ((x - xs[left]) / width if width else 0.0)
