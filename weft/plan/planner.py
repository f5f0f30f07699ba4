"""Which program runs a batch. Knows strategies, stages and costs; knows nothing of processes or tensors. No torch.

A strategy that the user wrote is taken at its word; `auto` is searched for each shape of batch. Plans are checked
before they are used and kept by the batch's shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weft.plan.drift import Drift, Factors
from weft.plan.search import Estimate, Search
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.steps import Kind, Program, Stage
from weft.program.strategy import AUTO, Cuts, Strategy, canonical, place
from weft.simulate.cost import Costs
from weft.simulate.run import simulate
from weft.timeline.timeline import Timeline, bound

KEPT = 256  # plans
CHECKED = 5  # stages of the program that is checked: embed and two layers; the others repeat them


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
        """What no schedule goes below."""
        return bound(self.compute_alone, self.network_alone)

    def describe(self) -> str:
        """One line."""
        saved = 1 - self.seconds / self.serial
        text = f"{self.seconds * 1e3:.1f} ms; serial {self.serial * 1e3:.1f} ms; bound {self.bound * 1e3:.1f} ms"
        return text + (f"; saves {saved:.0%} of possible {1 - self.bound / self.serial:.0%}" if saved > 0.005 else "")


@dataclass(frozen=True)
class Plan:
    """What was chosen for one batch, and what that is predicted to take, where costs are known."""

    strategy: Strategy
    program: Program
    wire: str
    predicted: Prediction | None = None

    def describe(self) -> str:
        """One line: strategy, chunks of each part, steps, wire."""
        parts = [f"{part} {self._rows(part)}" for part in ("attention", "mlp")]
        return f"{self.strategy} · {' · '.join(parts)} · {len(self.program)} steps · wire {self.wire}"

    def _rows(self, part: str) -> str:
        """The first layer's chunks, and the tiles of its tails if there are any."""
        steps = [step for step in self.program if step.stage == f"L0.{part}"]
        chunks = " ".join(str(s.rows) for s in steps if s.kind in (Kind.COMPUTE, Kind.BODY))
        tiles = sum(step.kind is Kind.TAIL for step in steps)
        return f"{chunks} in {tiles} tiles" if tiles else chunks


class Planner:
    """Makes plans for one model. `granule`: see `strategy.place`. `costs`: without them `auto` is serial.

    `drift` corrects the costs by what batches were observed to take.
    """

    def __init__(
        self, stages: tuple[Stage, ...], overlap: str, wire: str, granule: int = 1, costs: Costs | None = None,
        drift: Drift | None = None,
    ) -> None:  # fmt: skip
        self.stages, self.wire, self.granule, self.costs = stages, wire, granule, costs
        self.overlap = canonical(overlap)
        self.drift = drift or Drift()
        self.search = Search(stages, granule)
        self._checked = stages[:CHECKED] + stages[-1:] if len(stages) > CHECKED + 1 else stages
        self._known: OrderedDict[tuple[Batch, int], Plan] = OrderedDict()

    def plan(self, batch: Batch) -> Plan:
        """The plan for a batch. Raises `InputError` if the strategy's cuts don't fit it."""
        key = self._shape(batch), self.drift.changes
        if key not in self._known:
            self._known[key] = self._make(key[0])
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def like(self, overlap: str, wire: str) -> Planner:
        """A planner of the same model, granule and costs for another strategy and wire, as comparisons need them."""
        return Planner(self.stages, overlap, wire, self.granule, self.costs, self.drift)

    def learn(self, costs: Costs) -> None:
        """Takes new costs; plans made from earlier ones are forgotten."""
        self.costs, self.drift = costs, Drift()
        self._known.clear()
        if self.overlap == AUTO:
            self.plan(one_prompt(1000))  # so that the first prompt need not wait for what all searches share

    def observe(self, plan: Plan, batch: Batch, compute: float, network: float) -> bool:
        """Tells what a batch took, in seconds that its lanes were busy; True if the costs were corrected for it."""
        if plan.predicted is None or self.costs is None:
            return False
        known = plan.predicted
        return self.drift.observe(self._small(batch), known.lanes, known.factors, compute, network)

    def predict(self, plan: Plan, batch: Batch, title: str = "") -> Timeline:
        """The timeline that executing the plan would give. There must be costs."""
        assert self.costs is not None, "nothing can be predicted without costs"
        return simulate(plan.program, batch, self._costs_for(batch), plan.wire, title)

    def _shape(self, batch: Batch) -> Batch:
        """What a plan depends on. Where sequences start changes with every token; an eighth more or less does not
        change a plan, and for single tokens not even a third."""
        if self._by_sequence:
            return Batch(tuple(self._alike(segment, number) for number, segment in enumerate(batch.segments)))
        return one_prompt(batch.tokens)  # programs depend on rows alone

    def _alike(self, segment: Segment, number: int) -> Segment:
        start = segment.start
        if segment.length == 1 and start >= 4:
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
        predicted = None
        if self.costs is not None and self.wire in self.costs.wires:
            costs = self._costs_for(batch)
            if self.overlap == AUTO:
                strategy = self.search.best(batch, costs, self.wire)
            else:
                strategy = Strategy.parse(self.overlap)
            predicted = self._prediction(strategy, batch, costs)
        else:
            strategy = Strategy() if self.overlap == AUTO else Strategy.parse(self.overlap)
        check(build(strategy, self._checked, batch, self.granule), self._checked, batch)
        return Plan(strategy, build(strategy, self.stages, batch, self.granule), self.wire, predicted)

    def _prediction(self, strategy: Strategy, batch: Batch, costs: Costs) -> Prediction:
        cuts = place(strategy, batch, self.granule)
        serial = self.search.estimate(batch, Cuts(), costs, self.wire)
        lanes = serial if cuts == Cuts() else self.search.estimate(batch, cuts, costs, self.wire)
        return Prediction(lanes, self.drift.factors[self._small(batch)], serial.seconds, serial.compute, serial.network)

    def _costs_for(self, batch: Batch) -> Costs:
        """The costs, corrected for what was observed of batches like this one."""
        assert self.costs is not None
        return self.drift.corrected(self.costs, self._small(batch))

    def _small(self, batch: Batch) -> bool:
        """True for batches whose sums take one hop, as those of decoding do."""
        assert self.costs is not None
        wire = self.costs.wires.get(self.wire)
        return wire is not None and wire.element * self.costs.width * batch.tokens <= wire.limit


def shares_by_speed(costs: Costs, shares: Sequence[float], rows: int = 512) -> tuple[float, ...]:
    """Parts of the model with which all ranks take equally long, from what they take with `shares` for so many rows.

    The largest is 1. Costs must hold every rank of its own.
    """
    seconds = [
        sum(table.at(rows) for part in ("attention", "mlp") for table in (rank.body[part], rank.tail[part]))
        for rank in costs.ranks
    ]
    speeds = [share / taken for share, taken in zip(shares, seconds, strict=True)]
    return tuple(round(speed / max(speeds), 2) for speed in speeds)
