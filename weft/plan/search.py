"""Searches the cuts of a batch: how many, where, for which stages, with tiles or scattered sums.

A candidate is judged by the simulator, which lays out repeated layers only until they repeat. Knows batches, cuts and
costs; knows nothing of how costs were measured. About 0.13 ms a candidate, of which a dozen are judged.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

from weft.layout import Layout
from weft.parallel.sizes import GROUPS
from weft.plan.wiring import Sum, Wiring, sums_of
from weft.program.batch import Batch, Rows
from weft.program.build import weave
from weft.program.stages import Kind, Outline
from weft.program.steps import Program
from weft.program.strategy import Cuts, Strategy, on_granule, place
from weft.simulate.cost import Costs
from weft.simulate.predicted import LaidSection, TooLongError, lay_out_sections
from weft.simulate.run import Taken, Work, taken

ROUNDS = 3  # that are laid out at most: two nearly always suffice
TRIALS = 12  # candidates that are judged at most: keeps a plan under 2 ms
LEAST_ROWS = 32  # of a chunk: below, costs are mostly waits for turns of the processor
WORTH = 0.025  # of serial's time: a smaller gain than this is not worth the risk that costs are a little wrong
UNSURE = 0.5  # of what a collective takes beside its bytes: the least certain of all costs
SIMPLER = 0.01  # of the time: what a more complicated plan must gain over a simpler one, or a less exact one
MARGIN = 0.08  # by which a link may be slower than it was, and what was to hide still hides

INFINITE = float("inf")

_Known = dict[tuple[Work, Rows, tuple[int, ...]], Taken]  # what steps take, on some ranks


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


class _LaidPass(NamedTuple):
    """A pass that was laid out; its first step follows `begin` seconds after it begins."""

    begin: float
    sections: list[LaidSection]

    @property
    def seconds(self) -> float:
        return self.begin + max(each.laid.seconds for each in self.sections)

    @property
    def estimate(self) -> Estimate:
        """Lanes are those of the section where they are busiest."""
        busy = [each.laid.busy for each in self.sections]
        return Estimate(self.seconds, self.begin + max(each[0] for each in busy), max(sum(each[1:]) for each in busy))


class Search:
    """Judges and finds cuts for one model. `granule`: see `strategy.place`. `layout`: of several sections, if it is."""

    def __init__(self, outline: Outline, granule: int = 1, layout: Layout | None = None) -> None:
        self.outline, self.granule, self.layout = outline, granule, layout

    def estimate(self, batch: Batch, cuts: Cuts, costs: Costs, wiring: Wiring) -> Estimate:
        """What a pass with these cuts takes. Raises KeyError for a wire without costs."""
        return self.laid_out(batch, cuts, costs, wiring, {}).estimate

    def judge(self, strategy: Strategy, batch: Batch, costs: Costs, wires: Sequence[str]) -> Judged:
        """What a strategy takes, on the most exact of these wires that hide. Raises `InputError` if its cuts don't fit
        the batch."""
        cuts, least = place(strategy, batch, self.granule), Wiring(wires[-1])
        judged = Judged(strategy, self.estimate(batch, cuts, costs, least), self._serial(batch, costs, wires), least)
        return self._as_exact_as_hides(judged, batch, costs, wires)

    def _serial(self, batch: Batch, costs: Costs, wires: Sequence[str]) -> Estimate:
        """What serial takes, on the one of these wires on which that is shortest."""
        return min((self.estimate(batch, Cuts(), costs, Wiring(wire)) for wire in wires), key=lambda e: e.seconds)

    def laid_out(
        self, batch: Batch, cuts: Cuts, costs: Costs, wiring: Wiring, earlier: _Known, limit: float = INFINITE
    ) -> _LaidPass:  # fmt: skip
        """The pass; `earlier`: what steps take that were in earlier candidates. Raises `TooLongError` where its lanes
        alone take longer than `limit`."""
        program, wire = wiring.on(self.weave(batch, cuts)), wiring.usual

        def price(work: Work, chunk: int, ranks: tuple[int, ...]) -> Taken:
            key = work, program.rows[chunk], ranks
            if key not in earlier:
                earlier[key] = taken(work, key[1], batch, costs, wire, costs.pace_of(ranks))
            return earlier[key]

        laid = list(lay_out_sections(program.form, costs, wire, price, ROUNDS, limit))
        return _LaidPass(costs.pace.begin.at(batch.tokens), laid)

    def weave(self, batch: Batch, cuts: Cuts) -> Program:
        """The program of these cuts."""
        return weave(self.outline, batch.tokens, cuts, self.layout)

    def best(self, batch: Batch, costs: Costs, wires: Sequence[str]) -> Judged:
        """The strategy that is predicted to be fastest, on the most exact of these wires on which it is; serial where
        little is gained."""
        least = _Searching(self, batch, costs, wires[-1]).best()
        if len(wires) > 1:
            exact = _Searching(self, batch, costs, wires[0]).best()
            least = least._replace(serial=self._serial(batch, costs, wires))
            if exact.lanes.seconds * (1 - WORTH) <= least.lanes.seconds:
                return exact._replace(serial=least.serial)
        return self._as_exact_as_hides(least, batch, costs, wires)

    def _as_exact_as_hides(self, least: Judged, batch: Batch, costs: Costs, wires: Sequence[str]) -> Judged:
        """The same strategy with each sum on the most exact wire on which the pass takes hardly longer, also should the
        network be slower than it is said to be. `least`: with all sums on the last of the wires."""
        if len(wires) == 1:
            return least
        cuts, careful = place(least.strategy, batch, self.granule), costs.scaled(1.0, 1 + MARGIN)
        known = {wire: _Known() for wire in wires}  # by the usual one

        def seconds(wiring: Wiring) -> float:
            return self.laid_out(batch, cuts, careful, wiring, known[wiring.usual]).seconds

        base, limit = least.wiring.usual, seconds(least.wiring) * (1 + SIMPLER)
        for wire in wires[:-1]:  # all of them alike, first: most of the way at once
            if seconds(Wiring(wire)) <= limit:
                base = wire
                break
        others = dict[Sum, str]()
        sums = [each for each in sums_of(self.weave(batch, cuts).form) if each[0] not in self.outline.aside]
        for each in sums:
            for wire in wires[: wires.index(base)]:
                if seconds(Wiring(base, {**others, each: wire})) <= limit:
                    others[each] = wire
                    break
        chosen, exposed = {each: others.get(each, base) for each in sums}, dict[Sum, float]()
        wiring = Wiring.by_sum(chosen)
        lanes = self.estimate(batch, cuts, costs, wiring)
        for each, wire in chosen.items():
            if wire != wires[0]:
                up = Wiring.by_sum({**chosen, each: wires[wires.index(wire) - 1]})
                exposed[each] = self.estimate(batch, cuts, costs, up).seconds - lanes.seconds
        return Judged(least.strategy, lanes, least.serial, wiring, exposed)


class _Tried(NamedTuple):
    """A candidate that was judged."""

    seconds: float
    strategy: Strategy
    laid: _LaidPass


class _Searching:
    """One search: candidates and what they are predicted to take."""

    def __init__(self, search: Search, batch: Batch, costs: Costs, wire: str) -> None:
        self.search, self.batch, self.costs, self.wiring = search, batch, costs, Wiring(wire)
        self.tried: dict[Cuts, _Tried] = {}
        self.known: _Known = {}
        self.fewest = INFINITE  # seconds so far

    def best(self) -> Judged:
        serial = self._judge(Strategy(), Cuts())
        alone = serial.laid.estimate
        judged = serial
        if min(alone.compute, alone.network) >= WORTH * serial.seconds and self.batch.tokens >= 2 * LEAST_ROWS:
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
            if len(self.tried) >= TRIALS or not self._wide(cuts):
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


def _even(chunks: int, **more: Any) -> Strategy:
    """The same cuts in every stage."""
    return Strategy(chunks=chunks, other_chunks=chunks, **more)


def _complexity(strategy: Strategy) -> int:
    """0 for serial; each thing that a plan has beyond it counts."""
    written = strategy.cuts is not None
    return (strategy != Strategy()) + written + (strategy.tiles > 1) + strategy.scattered + strategy.ahead


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
