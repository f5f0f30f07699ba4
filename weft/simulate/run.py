"""The simulator: a program and costs in, the `Timeline` out that executing it would give.

Two lanes that run in issue order, edges between them, and contention: while both are busy each goes at a rate of its
own. Knows programs and costs; knows nothing of models or machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weft.program.batch import Batch, Rows
from weft.program.steps import COLLECTIVES, Kind, Program
from weft.simulate.cost import ComputeCosts, Costs, WireCosts
from weft.timeline.timeline import Event, Timeline


class Taken(NamedTuple):
    """What a step takes by itself. Of a collective also the seconds that it takes away from the compute lane, and those
    of its own that it is on the wire."""

    seconds: float
    stolen: float = 0.0
    wire: float = 0.0


class Coupling(NamedTuple):
    """What lies between steps, in seconds: see `Contention`. `credit`: of time on the wire that an idle link has saved
    up when it is idle for long."""

    turn: float
    wake: float
    credit: float


class Example(NamedTuple):
    """One of the steps that take alike: those of all layers, mostly. `entered`: its norm is taken elsewhere."""

    kind: Kind
    part: str
    rows: Rows
    entered: bool


@dataclass(frozen=True)
class Structure:
    """A program's order and edges. `alike`: for each step the place of its like in `examples`."""

    network: tuple[bool, ...]
    after: tuple[tuple[int, ...], ...]
    alike: tuple[int, ...]
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, program: Program, fused: bool = False) -> Structure:
        """Reads a program. `fused`: its sums take the norms that follow them along."""
        known: dict[Example, int] = {}
        gathered, collectives, alike = program.gathered, program.collectives, []
        summed = {step.stage for step in program.steps if step.after} if fused else set()
        for step in program.steps:
            example = Example(step.kind, step.part, step.rows, step.stage in gathered or step.stage in summed)
            alike.append(known.setdefault(example, len(known)))
        return cls(
            tuple(index in collectives for index in range(len(program))), tuple(step.after for step in program.steps),
            tuple(alike), tuple(known),
        )  # fmt: skip


def taken(example: Example, batch: Batch, costs: Costs, wire: WireCosts, rank: ComputeCosts) -> Taken:
    """What it takes by itself, on one rank."""
    kind, part, rows, entered = example
    if kind not in COLLECTIVES:
        return Taken(costs.compute_seconds(rank, kind, part, rows, batch, entered))
    size = costs.size(wire, kind, rows, batch)
    table = wire.table(kind, size)
    seconds = table.at(size)
    return Taken(seconds, costs.contention.taken(wire, size, seconds), max(0.0, seconds - table.at(0.0)))


def coupling(costs: Costs, wire: WireCosts) -> Coupling:
    """Of these costs on this wire."""
    contention = costs.contention
    return Coupling(contention.turn, contention.wake, contention.burst * wire.per_byte)


def lay_out(  # noqa: C901, PLR0912, PLR0915 (one loop: a call for each step would double its time)
    structure: Structure, costs: Sequence[Taken], between: Coupling
) -> tuple[list[float], list[float]]:
    """When each step starts and stops, in seconds. At any moment at most one step of each lane is under way, and the
    time advances to the next end of one. The link is a token bucket: what it saves up while idle, a collective need
    not wait for."""
    network, after, alike = structure.network, structure.after, structure.alike
    count = len(alike)
    starts, stops = [0.0] * count, [-1.0] * count
    queue = [index for index in range(count) if network[index]]
    submitted = sent = issued = 0
    computing = sending = -1  # the step under way, with what is left of it
    compute_left = network_left = now = saved_at = 0.0
    free = 1.0  # the part of its speed that the compute lane has beside the collective under way
    turn, wake, most = between
    saved = 0.0  # batch follows on batch
    while True:
        waited = False
        while computing < 0 and issued < count:  # the compute lane goes on in issue order
            if network[issued]:
                submitted += 1
                issued += 1
                continue
            for edge in after[issued]:
                if stops[edge] < 0:
                    break
            else:
                computing, compute_left, starts[issued] = issued, costs[alike[issued]][0], now
                issued += 1
                continue
            waited = True
            break
        if sending < 0 and sent < submitted:
            sending = queue[sent]
            sent += 1
            seconds, stolen, wire = costs[alike[sending]]
            starts[sending], network_left = now, seconds
            if most:
                saved += now - saved_at + seconds - wire
                if saved > most:  # noqa: PLR1730 (min() takes a third of this loop's time)
                    saved = most
                network_left -= wire if wire < saved else saved
                saved = saved - wire if saved > wire else 0.0
            if computing >= 0:
                network_left += turn
            free = 1 - stolen / network_left if stolen < 0.9 * network_left else 0.1
        if computing >= 0 and sending >= 0:
            if compute_left <= network_left * free:
                step = compute_left / free
                network_left -= step
                ended = computing
            else:
                step = network_left
                compute_left -= step * free
                ended = sending
        elif computing >= 0:
            step, ended = compute_left, computing
        elif sending >= 0:
            step, ended = network_left, sending
        else:
            break
        now += step
        stops[ended] = now
        if ended == computing:
            computing = -1
        else:
            sending, saved_at = -1, now
            if waited:
                now += wake
    assert issued == count and sent == len(queue), "a step waits for one that never ends: the program was not checked"
    return starts, stops


def simulate(program: Program, batch: Batch, costs: Costs, wire: str, title: str = "") -> Timeline:
    """What executing the program would give, predicted. Raises KeyError for a wire without costs."""
    way = costs.wires[wire]
    structure = Structure.of(program, way.fused)
    pace = [taken(example, batch, costs, way, costs.pace) for example in structure.examples]
    starts, stops = lay_out(structure, pace, coupling(costs, way))
    events: list[Event] = []
    for number, rank in enumerate(costs.ranks):
        spans = list(zip(starts, stops, strict=True))
        if len(costs.ranks) > 1:
            own = [taken(example, batch, costs, way, rank) for example in structure.examples]
            spans = _at_its_own_pace(structure, spans, pace, own)
        ranks = range(costs.world) if len(costs.ranks) == 1 else [number]
        for each in ranks:
            events += [
                Event(each, step.kind.lane, step.kind, step.stage, step.rows, start, stop)
                for step, (start, stop) in zip(program.steps, spans, strict=True)
            ]
    return Timeline(tuple(events), "predicted", title)


def _at_its_own_pace(
    structure: Structure, spans: list[tuple[float, float]], pace: Sequence[Taken], own: Sequence[Taken]
) -> list[tuple[float, float]]:  # fmt: skip
    """The steps of a rank that computes faster than the group: the same collectives, and more waiting for them."""
    found, free = list(spans), 0.0
    for index, (start, stop) in enumerate(spans):
        if structure.network[index]:
            continue
        example = structure.alike[index]
        begin = max([free, *(spans[edge][1] for edge in structure.after[index])])
        begin = max(begin, 0.0 if free else start)
        stretched = (stop - start) / pace[example].seconds if pace[example].seconds > 0 else 1.0
        free = begin + own[example].seconds * stretched
        found[index] = (begin, free)
    return found
