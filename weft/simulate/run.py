"""The simulator: a program's form and costs in, when each of its steps starts and stops out.

What steps take, and how rounds that repeat need not be laid out. Knows programs and costs; knows nothing of models or
machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import NamedTuple

from weft.program.batch import Batch, Rows
from weft.program.stages import COLLECTIVES, COMPUTE, Kind
from weft.program.steps import Block, Form, Step
from weft.simulate.clock import Clock, Coupling, Laid, Taken
from weft.simulate.cost import ComputeCosts, Costs, WireCosts
from weft.simulate.divided import Spot

NEVER: Mapping[Spot, float] = MappingProxyType({})


class Work(NamedTuple):
    """What steps have in common that take alike for the same rows. `entered`: their norm is taken elsewhere."""

    kind: Kind
    part: str
    entered: bool
    wanted: bool
    lane: str
    wire: str
    algorithm: str


@dataclass(frozen=True)
class Structure:
    """What there is to know of a form before its rows are known: `works` with their chunks, each once; and for each
    block and step which of them it is, its lane's number, and its edges."""

    form: Form
    works: tuple[tuple[Work, int], ...]
    blocks: tuple[tuple[Laid, ...], ...]

    @cached_property
    def counts(self) -> list[tuple[int, int]]:
        """Of each work its lane, and how often it is done."""
        counted: dict[int, list[int]] = {}
        for block, steps in zip(self.form.blocks, self.blocks, strict=True):
            for work, lane, _ in steps:
                counted.setdefault(work, [lane, 0])[1] += block.rounds
        return [(lane, count) for _, (lane, count) in sorted(counted.items())]

    def bound(self, costs: Sequence[Taken], credit: float) -> float:
        """Seconds of the longest lane alone, which no order of steps goes below. Of what is on the wire a link may have
        saved up `credit`; what collectives take beside it, it can't save."""
        beside, wire = [0.0] * len(self.form.lanes), [-credit] * len(self.form.lanes)
        for (lane, count), cost in zip(self.counts, costs, strict=True):
            beside[lane] += count * (cost.seconds - cost.wire)
            wire[lane] += count * cost.wire
        return max(max(each, other) for each, other in zip(beside, wire, strict=True))

    @property
    def steps(self) -> Iterator[Laid]:
        """Those of all rounds."""
        for block, steps in zip(self.form.blocks, self.blocks, strict=True):
            for _ in range(block.rounds):
                yield from steps


@lru_cache(maxsize=512)
def structure_of(form: Form, fused: bool = False) -> Structure:
    """Reads a form of one section. `fused`: its sums take the norms that follow them along."""
    numbers: dict[tuple[Work, int], int] = {}
    lanes = {lane: number for number, lane in enumerate(form.lanes)}
    blocks: list[tuple[Laid, ...]] = []
    for place, block in enumerate(form.blocks):
        steps = []
        for at, step in enumerate(block.steps):
            entered = step.kind not in COLLECTIVES and _entered(form, place, at, step, fused)
            work = Work(step.kind, step.part, entered, step.wanted, step.lane, step.wire, step.algorithm)
            number = numbers.setdefault((work, step.chunk), len(numbers))
            steps.append((number, lanes[step.lane], step.after))
        blocks.append(tuple(steps))
    return Structure(form, tuple(numbers), tuple(blocks))


def _entered(form: Form, block: int, at: int, step: Step, fused: bool) -> bool:
    """Something that it waits for has taken its norm along."""
    waited = (_before(form.blocks, block, at - distance) for distance in step.after)
    return any(fused or other.kind is Kind.ALL_GATHER for other in waited)


def _before(blocks: Sequence[Block], block: int, at: int) -> Step:
    """A step of a block, or of those before it where `at` is below zero."""
    while at < 0:
        block -= 1
        at += len(blocks[block].steps) * blocks[block].rounds
    return blocks[block].steps[at % len(blocks[block].steps)]


def taken(work: Work, rows: Rows, batch: Batch, costs: Costs, wire: str, rank: ComputeCosts) -> Taken:
    """What it takes by itself, on one rank; `wire`: where the step names none. Raises KeyError for an unknown one."""
    kind = work.kind
    if kind not in COLLECTIVES:
        return Taken(costs.compute_seconds(rank, kind, work.part, rows, batch, work.entered, work.wanted))
    way = costs.wires[work.wire or wire]
    size = costs.size(way, kind, work.part, rows, batch, work.wanted)
    if not size:
        return Taken(0.0)
    table = way.table(kind, size, work.algorithm)
    seconds = table.at(size)
    stolen = costs.contention_of(COMPUTE, work.lane).taken(way, size, seconds)
    return Taken(seconds, stolen, max(0.0, seconds - table.at(0.0)))


def coupling(costs: Costs, wire: WireCosts, lanes: Sequence[str]) -> Coupling:
    """Of these costs on this wire."""
    contention = costs.contention
    shared = tuple(
        tuple(0.0 if COMPUTE in (one, other) else costs.contention_of(one, other).part for other in lanes)
        for one in lanes
    )
    return Coupling(contention.turn, contention.wake, contention.burst * wire.per_byte, shared)


@dataclass(frozen=True)
class LaidOut:
    """When steps start and stop, in seconds, in issue order. `laid`: of each block, how many rounds are there; the last
    one stands for those that are not."""

    structure: Structure
    starts: list[float]
    stops: list[float]
    laid: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """From the first step to the end of the last one."""
        return max(self.stops)

    def ended(self, spot: Spot) -> float:
        """When a step of a block that is issued once stops."""
        pairs = zip(self.structure.blocks[: spot[0]], self.laid, strict=False)
        return self.stops[sum(len(steps) * laid for steps, laid in pairs) + spot[1]]

    @cached_property
    def busy(self) -> list[float]:
        """Seconds that each lane works."""
        total, index = [0.0] * len(self.structure.form.lanes), 0
        for block, steps, laid in zip(self.structure.form.blocks, self.structure.blocks, self.laid, strict=True):
            for number in range(laid):
                times = 1 if number < laid - 1 else block.rounds - laid + 1
                for _, lane, _ in steps:
                    total[lane] += times * (self.stops[index] - self.starts[index])
                    index += 1
        return total


def lay_out(
    structure: Structure, costs: Sequence[Taken], between: Coupling, most: int | None = None,
    come: Mapping[Spot, float] = NEVER,
) -> LaidOut:  # fmt: skip
    """When each step starts and stops, where `costs` has what each of the structure's works takes. `come`: of steps
    that wait for others' rows, when these come.

    With `most`, rounds are laid out only until one leaves all lanes as the one before it did, which is exact, and at
    most so many: then each further one takes as long as the last one did, but, where queues grow, no less than its
    lanes are busy, which is nearly so.
    """
    clock = Clock(len(structure.form.lanes), between)
    laid: list[int] = []
    for place, (block, steps) in enumerate(zip(structure.form.blocks, structure.blocks, strict=True)):
        if block.rounds == 1:
            for at, (work, lane, after) in enumerate(steps):
                clock.issue(lane, _nearer(after, len(clock.stops)), costs[work], come.get((place, at), 0.0))
        laid.append(1 if block.rounds == 1 else clock.go_round(block.rounds, steps, costs, most))
    clock.finish()
    return LaidOut(structure, clock.starts, clock.stops, tuple(laid))


def _nearer(after: tuple[int, ...], issued: int) -> tuple[int, ...]:
    """Edges that lead back over rounds that were not laid out: those there have ended, or the first step has."""
    return tuple([min(distance, issued) for distance in after])
