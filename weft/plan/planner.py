"""Which program runs a batch. Knows strategies, stages and costs; knows nothing of processes or tensors. No torch.

A strategy that the user wrote is taken at its word; `auto` is searched for each shape of batch. Plans are checked
before they are used and kept by the batch's shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from weft.layout import Layout
from weft.plan.candidates import Estimate, Judged
from weft.plan.drift import Drift, Factors
from weft.plan.partition import Partition, partition
from weft.plan.search import Search
from weft.plan.wiring import Wiring, reasons, sums_of, travels
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.build import build, demand_scattering
from weft.program.check import check
from weft.program.stages import Kind, Outline
from weft.program.steps import Program, Step
from weft.program.strategy import AUTO, Strategy, canonical
from weft.simulate.cost import ComputeCosts, Costs
from weft.simulate.predicted import simulate
from weft.timeline.timeline import Timeline, bound
from weft.wires import allowed, needed

KEPT = 256  # plans
NAMED = 6  # chunks of a part that are named one by one

T = TypeVar("T")
_Kept = OrderedDict[tuple[Batch, Factors], T]  # by the batch's shape, and how its costs were corrected


@dataclass(frozen=True)
class Prediction:
    """What a plan will take and what it is measured by, in seconds. `lanes`: with what it keeps the lanes busy;
    `factors`: by which the costs were corrected for it."""

    lanes: Estimate
    factors: Factors
    serial: float
    compute_alone: float
    network_alone: float

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return self.lanes.seconds

    @property
    def bound(self) -> float:
        """What no schedule goes below: serial's longest lane alone, or this plan's, whose sums may travel otherwise."""
        own = max(self.lanes.compute, self.lanes.network)
        return min(own, bound(self.compute_alone, self.network_alone))

    def describe(self) -> str:
        """One line."""
        saved = 1 - self.seconds / self.serial
        text = f"{self.seconds * 1e3:.1f} ms; serial {self.serial * 1e3:.1f} ms; bound {self.bound * 1e3:.1f} ms"
        return text + (f"; saves {saved:.0%} of possible {1 - self.bound / self.serial:.0%}" if saved > 0.005 else "")


@dataclass(frozen=True)
class Plan:
    """What was chosen for one batch, and what that is predicted to take, where costs are known. `wire`: of all sums
    whose steps name no other; `why`: of what travels on less exact wires than it might, a line for each wire."""

    strategy: Strategy
    program: Program
    wire: str
    predicted: Prediction | None = None
    why: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: strategy, chunks of each part, steps, wires."""
        first = [step for block in self.program.form.blocks for step in block.steps if step.layer == 0]
        parts = [f"{part} {self._rows(part)}" for part in dict.fromkeys(step.part for step in first)]
        return f"{self.strategy} · {' · '.join(parts)} · {len(self.program)} steps · {self._wires()}"

    def _wires(self) -> str:
        """The usual one, and the sums that travel on others."""
        form, by_wire = self.program.form, dict[str, list[str]]()
        steps = {step for block in form.blocks for step in block.steps if step.wire and travels(step)}
        for part, chunk in sums_of(form):
            for wire in {step.wire for step in steps if (step.part, step.chunk, step.wanted) == (part, chunk, False)}:
                by_wire.setdefault(wire, []).append(f"{part} {self.program.rows[chunk]}")
        return " · ".join([f"wire {self.wire}", *(f"{wire}: {', '.join(sums)}" for wire, sums in by_wire.items())])

    def _rows(self, part: str) -> str:
        """The first layer's chunks, and the tiles of its tails if there are any."""
        form, rows = self.program.form, self.program.rows
        steps = [step for block in form.blocks for step in block.steps if (step.part, step.layer) == (part, 0)]
        each = [str(rows[s.chunk]) for s in steps if s.kind in (Kind.COMPUTE, Kind.BODY)]
        chunks = " ".join(each) if len(each) <= NAMED else f"{' '.join(each[: NAMED - 1])} … ({len(each)})"
        tiles = sum(step.kind is Kind.TAIL for step in steps)
        return f"{chunks} in {tiles} tiles" if tiles else chunks


class Planner:
    """Makes plans for one model. `granule`: see `strategy.place`. `costs`: without them `auto` is serial. `layout`: of
    the model over the ranks; without it, all of them have all layers.

    `drift` corrects the costs by what batches were observed to take.
    """

    def __init__(
        self, outline: Outline, overlap: str, wire: str, granule: int = 1, costs: Costs | None = None,
        drift: Drift | None = None, layout: Layout | None = None,
    ) -> None:  # fmt: skip
        self.outline, self.wire, self.granule, self.costs = outline, wire, granule, costs
        self.wires = allowed(wire)
        self.overlap = canonical(overlap)
        if self.overlap != AUTO and Strategy.parse(self.overlap).scattered:
            demand_scattering(outline, layout)
        self.drift = drift or Drift()
        self._known: _Kept[Plan] = OrderedDict()
        self._judged: _Kept[Judged] = OrderedDict()
        self.lay(layout)

    def plan(self, batch: Batch) -> Plan:
        """The plan for a batch. Raises `InputError` if the strategy's cuts don't fit it."""
        return self._recalled(self._known, batch, self._make)

    def expect(self, batch: Batch) -> Prediction:
        """What its plan will take. There must be costs of all wires; no program is made, which takes longer."""
        assert self.knows_costs, "nothing can be expected without costs"
        return self._prediction(batch, self._recalled(self._judged, batch, self._judge))

    def _recalled(self, known: _Kept[T], batch: Batch, make: Callable[[Batch], T]) -> T:
        """As it was made for an earlier batch like this one, or is now."""
        key = self._shape(batch), self._factors(batch)
        if key not in known:
            known[key] = make(key[0])
            if len(known) > KEPT:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    def lay(self, layout: Layout | None) -> None:
        """Plans from now on are for another layout; what was planned is forgotten."""
        self.layout = layout
        self.search = Search(self.outline, self.granule, layout if layout is not None and layout.several else None)
        self._forget()

    def like(self, overlap: str, wire: str) -> Planner:
        """A planner of the same model, granule and costs for another strategy and wire, as comparisons need them."""
        return Planner(self.outline, overlap, wire, self.granule, self.costs, self.drift, self.layout)

    def learn(self, costs: Costs | None) -> None:
        """Takes new costs, or none; plans made from earlier ones are forgotten."""
        self.costs, self.drift = costs, Drift()
        self._forget()
        if self.overlap == AUTO and costs is not None:
            self.plan(one_prompt(1000))  # so that the first prompt need not wait for what all searches share

    def observe(self, plan: Plan, batch: Batch, compute: float, network: float) -> bool:
        """Tells what a batch took, in seconds that its lanes were busy; True if the costs were corrected for it."""
        if plan.predicted is None or self.costs is None or batch.pools:  # these rows see no output head
            return False
        predicted = plan.predicted
        if self.layout is not None and self.layout.several:  # what ranks wait for each other counts as communication
            network = 0.0
        return self.drift.observe(self._small(batch), predicted.lanes, predicted.factors, compute, network)

    def predict(self, plan: Plan, batch: Batch, title: str = "") -> Timeline:
        """The timeline that executing the plan would give. There must be costs."""
        assert self.costs is not None, "nothing can be predicted without costs"
        return simulate(plan.program, batch, self._costs_for(batch), plan.wire, title)

    def shares_by_speed(self, shares: Sequence[float], rows: int = 512) -> tuple[float, ...]:
        """Parts of the model with which all ranks take equally long, from what they take with `shares` for `rows` rows.

        The largest is 1. There must be costs, of every rank its own.
        """
        assert self.costs is not None, "shares follow from costs"
        seconds = [self._a_layer(rank, rows) for rank in self.costs.ranks]
        speeds = [share / taken for share, taken in zip(shares, seconds, strict=True)]
        return tuple(round(speed / max(speeds), 2) for speed in speeds)

    def layers_by_speed(self, most: Sequence[int], rows: int = 512) -> Partition:
        """Layers with which all sections take about equally long for `rows` rows of a prompt. `most`: layers that each
        has room for. There must be costs, of every rank its own."""
        assert self.costs is not None and self.layout is not None, "layers follow from costs"
        paces = [self.costs.pace_of(section.ranks) for section in self.layout.sections]
        ends = [0.0] * len(paces)
        ends[0] += sum(paces[0].whole[stage.part].at(rows) for stage in self.outline.before)
        ends[-1] += sum(paces[-1].whole[stage.part].at(1) for stage in self.outline.after)
        ends[-1] -= self._spared(paces[-1], rows) if self.outline.narrows else 0.0
        return partition(self.outline.layers, [self._a_layer(pace, rows) for pace in paces], ends, most)

    def _spared(self, rank: ComputeCosts, rows: int) -> float:
        """Of the last layer's seconds, what rows that nobody wants do without: all but what they leave behind."""
        [stored] = [stage.part for stage in self.outline.layer if stage.part == rank.scored]
        return self._a_layer(rank, rows) - rank.kept * rank.body[stored].at(rows)

    def _a_layer(self, rank: ComputeCosts, rows: int) -> float:
        scores = rank.scores(one_prompt(rows), Rows(0, rows))
        return scores + sum(rank.whole[stage.part].at(rows) for stage in self.outline.layer)

    def _shape(self, batch: Batch) -> Batch:
        """What a plan depends on. Where sequences start changes with every token; an eighth more or less does not
        change a plan, and for single tokens not even a third."""
        if self._by_sequence:
            return Batch(tuple(self._alike(segment, number) for number, segment in enumerate(batch.segments)))
        return one_prompt(batch.tokens)  # programs depend on rows alone

    def _alike(self, segment: Segment, number: int) -> Segment:
        start = segment.start
        if segment.decoding and start >= 4:
            start = 3 << (start.bit_length() - 2)  # between a power of two and the next
        elif self.granule == 1 and start >= 16:
            grain = 1 << (start.bit_length() - 3)
            start = start // grain * grain
        return replace(segment, sequence=number, start=start, prompt=0)

    @property
    def _by_sequence(self) -> bool:
        if self.overlap == AUTO or self.costs is not None:
            return self.costs is not None
        return self.granule > 1 or Strategy.parse(self.overlap).requests

    def _make(self, batch: Batch) -> Plan:
        if not self.knows_costs:
            strategy = Strategy() if self.overlap == AUTO else Strategy.parse(self.overlap)
            wiring = Wiring(self.wires[-1])
            program = wiring.on(build(strategy, self.outline, batch, self.granule, self.layout))
            self._check(program, batch)
            return Plan(strategy, program, wiring.usual)
        costs, judged = self._costs_for(batch), self._recalled(self._judged, batch, self._judge)
        program = build(judged.strategy, self.outline, batch, self.granule, self.layout)
        usual = judged.wiring.usual
        program = self._by_cost(judged.wiring.on(program), batch, costs, usual)
        self._check(program, batch)
        why = reasons(judged.wiring, judged.exposed, self.wires, program)
        return Plan(judged.strategy, program, usual, self._prediction(batch, judged), why)

    def _judge(self, batch: Batch) -> Judged:
        """What is predicted to be fastest, or the strategy that was asked for."""
        costs = self._costs_for(batch)
        if self.overlap == AUTO:
            return self.search.best(batch, costs, self.wires)
        return self.search.judge(Strategy.parse(self.overlap), batch, costs, self.wires)

    def _prediction(self, batch: Batch, judged: Judged) -> Prediction:
        serial = judged.serial
        return Prediction(judged.lanes, self._factors(batch), serial.seconds, serial.compute, serial.network)

    def _forget(self) -> None:
        self._known.clear()
        self._judged.clear()

    def _check(self, program: Program, batch: Batch) -> None:
        check(program, self.outline, batch, self.layout.world if self.layout is not None else 1)

    @property
    def knows_costs(self) -> bool:
        """Of all wires that it may use."""
        return self.costs is not None and set(needed(self.wire)) <= set(self.costs.wires)

    def _by_cost(self, program: Program, batch: Batch, costs: Costs, usual: str) -> Program:
        """Each sum by the algorithm that is cheapest for its bytes."""
        if len(costs.wires[usual].sums) == 1:
            return program

        def cheapest(step: Step) -> str:
            way = costs.wires[step.wire or usual]
            return way.cheapest(costs.size(way, step.kind, step.part, program.rows[step.chunk], batch, step.wanted))

        return program.summed_by(cheapest)

    def _costs_for(self, batch: Batch) -> Costs:
        """The costs, corrected for what was observed of batches like this one."""
        assert self.costs is not None
        return self.drift.corrected(self.costs, self._small(batch))

    def _factors(self, batch: Batch) -> Factors:
        return self.drift.factors[self._small(batch)] if self.costs is not None else Factors()

    def _small(self, batch: Batch) -> bool:
        """True for batches whose sums take one hop, as those of decoding do."""
        assert self.costs is not None
        wire = self.costs.wires.get(self.wires[-1])
        return wire is not None and wire.element * self.costs.width * batch.tokens <= wire.limit
