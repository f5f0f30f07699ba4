"""Candidates of a search: which cuts are tried, and which of them is the best one.

One class tries cuts that hide sums behind computation, one tries pieces that keep a pipeline's sections busy. Knows
batches, cuts and costs; what a candidate takes, the search says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import log2
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from weft.parallel.sizes import GROUPS
from weft.plan.wiring import Sum, Wiring
from weft.program.batch import Batch, Rows
from weft.program.stages import Kind
from weft.program.strategy import Cuts, Strategy, on_granule, place
from weft.simulate.clock import Taken
from weft.simulate.cost import Costs
from weft.simulate.predicted import LaidSection, TooLongError
from weft.simulate.run import Work

if TYPE_CHECKING:
    from weft.plan.search import Search

ROUNDS = 3  # that are laid out at most: two nearly always suffice
TRIALS = 12  # candidates that are judged at most: keeps a plan under 2 ms
PIPE_TRIALS, FEW_TRIALS = 20, 8  # of a pipeline, for one prompt and for mixed batches: some 5 ms each
PIECES = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # that flow through sections
LEAST_ROWS = 32  # of a chunk: below, costs are mostly waits for turns of the processor
WORTH = 0.025  # of serial's time: a smaller gain than this is not worth the risk that costs are a little wrong
UNSURE = 0.5  # of what a collective takes beside its bytes: the least certain of all costs
SIMPLER = 0.01  # of the time: what a more complicated plan must gain over a simpler one, or a less exact one

INFINITE = float("inf")

Known = dict[tuple[Work, Rows, tuple[int, ...]], Taken]  # what steps take, on some ranks


class Estimate(NamedTuple):
    """Predicted seconds of a whole pass, and those that it computes and communicates."""

    seconds: float
    compute: float
    network: float


class Judged(NamedTuple):
    """A strategy, and what it and serial are predicted to take, serial on the fastest wire that is allowed.
    `exposed`: of each sum that could travel on a more exact wire, the seconds that the pass would take longer with it
    alone on the next one."""

    strategy: Strategy
    lanes: Estimate
    serial: Estimate
    wiring: Wiring
    exposed: Mapping[Sum, float] = MappingProxyType({})


class LaidPass(NamedTuple):
    """A pass that was laid out; its first step follows `begin` seconds after it begins."""

    begin: float
    sections: list[LaidSection]

    @property
    def seconds(self) -> float:
        return self.begin + max(each.laid.seconds for each in self.sections)

    @property
    def estimate(self) -> Estimate:
        """Of the lanes that communicate, and of the sections, the busiest one."""
        busy = [each.laid.busy for each in self.sections]
        network = max(max(each[1:], default=0.0) for each in busy)
        return Estimate(self.seconds, self.begin + max(each[0] for each in busy), network)


class _Tried(NamedTuple):
    """A candidate that was judged."""

    seconds: float
    strategy: Strategy
    laid: LaidPass


class Searching:
    """One search: candidates and what they are predicted to take. `trials`: that are judged at most."""

    trials = TRIALS

    def __init__(self, search: Search, batch: Batch, costs: Costs, wire: str) -> None:
        self.search, self.batch, self.costs, self.wiring = search, batch, costs, Wiring(wire)
        self.tried: dict[Cuts, _Tried] = {}
        self.known: Known = {}
        self.fewest = INFINITE  # seconds so far

    def best(self) -> Judged:
        serial = self._judge(Strategy(), Cuts())
        alone = serial.laid.estimate
        judged = serial
        if self._may_gain(alone) and self.batch.tokens >= 2 * LEAST_ROWS:
            for strategy in self._propose():
                self._try(strategy)
            self._refine()
            safe = [
                (tried.seconds * (1 + SIMPLER * _complexity(tried.strategy)), number, tried)
                for number, (cuts, tried) in enumerate(self.tried.items())
                if tried.seconds + self._risk(cuts) < (1 - WORTH) * serial.seconds
            ]
            judged = min(safe)[2] if safe else serial
        return Judged(judged.strategy, judged.laid.estimate, alone, self.wiring)

    def _may_gain(self, serial: Estimate) -> bool:
        """There is something to hide."""
        return min(serial.compute, serial.network) >= WORTH * serial.seconds

    def _risk(self, cuts: Cuts) -> float:
        """Seconds that a plan may take longer than predicted for the collectives that it has more than serial."""
        layer = [stage for stage in self.search.outline.layer if stage.collective is Kind.REDUCE]
        sums = sum(len(cuts.ordered if stage.ordered else cuts.others) + 1 for stage in layer)
        a_layer = sums * cuts.tiles * (2 if cuts.scattered else 1)
        fixed = self.costs.wires[self.wiring.usual].fixed + self.costs.contention.fixed
        return UNSURE * (a_layer - len(layer)) * self.search.outline.layers * fixed

    def _try(self, strategy: Strategy) -> float:
        """Seconds of a strategy; of one that has been tried, or that can't be afforded any more, no new ones."""
        cuts = place(strategy, self.batch, self.search.granule)
        if cuts not in self.tried:
            if len(self.tried) >= self.trials or not self._wide(cuts):
                return INFINITE
            try:
                self._judge(strategy, cuts)
            except TooLongError:
                return INFINITE
        return self.tried[cuts].seconds

    def _judge(self, strategy: Strategy, cuts: Cuts) -> _Tried:
        laid = self.search.laid_out(self.batch, cuts, self.costs, self.wiring, self.known, self.fewest)
        self.tried[cuts] = _Tried(laid.seconds, strategy, laid)
        self.fewest = min(self.fewest, laid.seconds)
        return self.tried[cuts]

    def _wide(self, cuts: Cuts) -> bool:
        """True if no chunk or tile is too small to be worth a step of its own."""
        edges = (0, *sorted({*cuts.ordered, *cuts.others}), self.batch.tokens)
        return min(b - a for a, b in pairwise(edges)) >= LEAST_ROWS * (cuts.tiles if cuts.tiles > 1 else 1)

    def _propose(self) -> Iterator[Strategy]:
        """Tiles, scattered sums, cuts between sequences, cuts of equal time; more of a kind only where it leads. No
        scattered sums on wires of few bits: they would round inputs, and nothing makes up for that."""
        chunks = self._even_chunks()
        yield Strategy(chunks=2, other_chunks=4)
        yield _even(min(max(chunks, 3), 4), ahead=True)
        if self._leads(Strategy(tiles=4), _even(2)):
            yield _even(2, tiles=2)
        if len(self.batch.segments) > 1 and self._leads(_even(2, requests=True), _even(2)):
            yield _even(3, requests=True)
        if self._uneven():
            yield self._by_time([1.0] * chunks, 1)
        scatters = self.wiring.usual not in GROUPS and self.search.outline.scatters
        if scatters and self._leads(Strategy(scattered=True), Strategy()):
            yield _even(4, scattered=True)

    def _even_chunks(self) -> int:
        """As many even chunks as pay: long prompts hide their last sum the better the shorter it is."""
        if self._leads(_even(2), _even(4)):
            return 3 if self._leads(_even(3), _even(2)) else 2
        best = 4
        for chunks in (6, 8, 12):
            if not self._try(_even(chunks)) < (1 - SIMPLER) * self._try(_even(best)):
                break
            best = chunks
        return best

    def _leads(self, one: Strategy, other: Strategy) -> bool:
        return self._try(one) < self._try(other)

    def _refine(self) -> None:
        """Other sizes of the best cut's chunks: a short last one leaves little to wait for at the end, and so on."""
        cutting = {c: tried for c, tried in self.tried.items() if c.ordered and c.tiles == 1 and not c.scattered}
        if not cutting:
            return
        best = min(cutting, key=lambda cuts: cutting[cuts].seconds)
        fewest = cutting[best].seconds
        parts = max(1, round((len(best.others) + 1) / (len(best.ordered) + 1)))
        times = self._times(best.ordered)
        for change in (_ramp(0.85), _scale(-1, 0.6), _scale(0, 0.7)):
            changed = change(times)
            seconds = self._try(replace(self._by_time(changed, parts), ahead=best.ahead))
            if seconds < fewest:
                fewest, times = seconds, changed

    def _uneven(self) -> bool:
        """True if equal times are not about equal rows."""
        half = self._by_time([1.0, 1.0], 1).cuts
        return half is not None and abs(half[0] / self.batch.tokens - 0.5) > 0.02

    @cached_property
    def _until(self) -> tuple[list[float], list[float]]:
        """Rows, and the seconds of one layer's computation of all rows until there."""
        return _curve(self.batch, self.costs, [stage.part for stage in self.search.outline.layer])

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


class Piping(Searching):
    """Of a pipeline: pieces that keep all sections busy, cut again where a section's ranks have sums to hide."""

    @property
    def trials(self) -> int:  # type: ignore[override]
        """Fewer where batches differ all the time."""
        return PIPE_TRIALS if len(self.batch.segments) == 1 else FEW_TRIALS

    def _may_gain(self, serial: Estimate) -> bool:
        return True

    def _risk(self, cuts: Cuts) -> float:
        """What a plan has more than serial: messages on the way, and the steps of each piece beside their rows."""
        way, layout, pace = self.costs.wires[self.wiring.usual], self.search.layout, self.costs.pace
        assert layout is not None, "a pipeline has sections"
        parts = [pace.whole[stage.part] for stage in self.search.outline.layer]
        beside = sum(max(0.0, 2 * table.at(LEAST_ROWS) - table.at(2 * LEAST_ROWS)) for table in parts)
        each = way.send.at(0.0) + max(layout.layers) * beside
        more = super()._risk(cuts) if max(map(len, layout.shares)) > 1 else 0.0
        return UNSURE * len(cuts.pieces) * each + more

    def _propose(self) -> Iterator[Strategy]:
        """As many even pieces as pay, pieces of equal time, and these cut in two."""
        best, pieces = INFINITE, 1
        for count in PIECES:
            seconds = self._try(Strategy(pieces=count))
            if seconds > (1 + SIMPLER) * best:
                break
            best, pieces = min((best, pieces), (seconds, count))
        self.pieces = pieces
        if self._uneven():
            yield self._in_pieces([1.0] * pieces)
        layout = self.search.layout
        if layout is not None and max(map(len, layout.shares)) > 1:
            for count in {pieces, max(2, pieces // 2)}:
                yield Strategy(pieces=count, chunks=2, other_chunks=2)
            yield Strategy(chunks=2, other_chunks=2)

    def _refine(self) -> None:
        """Other sizes of the pieces: short ones at the beginning and the end fill and drain sooner."""
        best = min(self.tried, key=lambda cuts: self.tried[cuts].seconds)
        if not best.pieces:
            return
        fewest, strategy = self.tried[best].seconds, self.tried[best].strategy
        times = self._times(best.pieces)
        for change in (_ramp(0.94), _ramp(1.06), _scale(0, 0.6), _scale(-1, 0.6)):
            changed = change(times)
            seconds = self._try(self._in_pieces(changed, chunks=strategy.chunks, other_chunks=strategy.other_chunks))
            if seconds < fewest:
                fewest, times = seconds, changed

    def _in_pieces(self, times: Sequence[float], **more: Any) -> Strategy:
        """Pieces whose computation is in these proportions."""
        cuts = self._by_time(times, 1).cuts
        return Strategy(piece_cuts=cuts, **more) if cuts else Strategy(**more)


def _even(chunks: int, **more: Any) -> Strategy:
    """The same cuts in every stage."""
    return Strategy(chunks=chunks, other_chunks=chunks, **more)


def _complexity(strategy: Strategy) -> float:
    """0 for serial; each thing that a plan has beyond it counts, and twice as many pieces as one thing."""
    written = strategy.cuts is not None or strategy.piece_cuts is not None
    pieces = len(strategy.piece_cuts) + 1 if strategy.piece_cuts else max(1, strategy.pieces)
    things = (strategy != Strategy()) + written + (strategy.tiles > 1) + strategy.scattered + strategy.ahead
    return things + log2(pieces)


_Change = Callable[[list[float]], list[float]]


def _ramp(factor: float) -> _Change:
    """Each chunk longer than the one before by this factor."""
    return lambda times: [time * factor**place for place, time in enumerate(times)]


def _scale(chunk: int, factor: float) -> _Change:
    """One chunk longer."""

    def change(times: list[float]) -> list[float]:
        changed = list(times)
        changed[chunk] *= factor
        return changed

    return change


def _curve(batch: Batch, costs: Costs, parts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Rows and seconds, a few points for every sequence: scores grow with the square of its length."""
    pace = costs.pace
    a_row = sum(pace.whole[part].at(batch.tokens) for part in parts) / batch.tokens
    rows, seconds = [0.0], [0.0]
    for segment, span in zip(batch.segments, batch.spans, strict=True):
        pieces = 8 if span.length >= 256 else 1
        for piece in range(1, pieces + 1):
            at = span.length * piece / pieces
            step, middle = span.length / pieces, segment.start + at - span.length / pieces / 2
            rows.append(span.start + at)
            seconds.append(seconds[-1] + step * (a_row + pace.past * pace.seen(middle)))
    return rows, seconds


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x, straight between the points."""
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    left = right - 1
    width = xs[right] - xs[left]
    return ys[left] + (ys[right] - ys[left]) * ((x - xs[left]) / width if width else 0.0)
