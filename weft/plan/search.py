"""Searches the cuts of a batch: how many, where, for which stages, with tiles or scattered sums.

A candidate is judged by the simulator, which lays out repeated layers only until they repeat. Knows batches, cuts and
costs; knows nothing of how costs were measured. About 0.13 ms a candidate, of which a dozen are judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.layout import Layout
from weft.plan.candidates import INFINITE, ROUNDS, SIMPLER, WORTH, Estimate, Judged, Known, LaidPass, Piping, Searching
from weft.plan.wiring import Sum, Wiring, sums_of
from weft.program.batch import Batch
from weft.program.build import weave
from weft.program.stages import Outline
from weft.program.steps import Program
from weft.program.strategy import Cuts, Strategy, place
from weft.simulate.clock import Taken
from weft.simulate.cost import Costs
from weft.simulate.predicted import lay_out_sections
from weft.simulate.run import Work, taken

MARGIN = 0.08  # by which a link may be slower than it was, and what was to hide still hides


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
        self, batch: Batch, cuts: Cuts, costs: Costs, wiring: Wiring, earlier: Known, limit: float = INFINITE
    ) -> LaidPass:  # fmt: skip
        """The pass; `earlier`: what steps take that were in earlier candidates. Raises `TooLongError` where its lanes
        alone take longer than `limit`."""
        program, wire = wiring.on(self.weave(batch, cuts)), wiring.usual

        def price(work: Work, chunk: int, ranks: tuple[int, ...]) -> Taken:
            key = work, program.rows[chunk], ranks
            if key not in earlier:
                earlier[key] = taken(work, key[1], batch, costs, wire, costs.pace_of(ranks))
            return earlier[key]

        laid = list(lay_out_sections(program.form, costs, wire, price, ROUNDS, limit))
        return LaidPass(costs.pace.begin.at(batch.tokens), laid)

    def weave(self, batch: Batch, cuts: Cuts) -> Program:
        """The program of these cuts."""
        return weave(self.outline, batch.tokens, cuts, self.layout)

    def best(self, batch: Batch, costs: Costs, wires: Sequence[str]) -> Judged:
        """The strategy that is predicted to be fastest, on the most exact of these wires on which it is; serial where
        little is gained."""
        searching = Searching if self.layout is None else Piping
        least = searching(self, batch, costs, wires[-1]).best()
        if len(wires) > 1:
            exact = searching(self, batch, costs, wires[0]).best()
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
        known = {wire: Known() for wire in wires}  # by the usual one

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
