"""The simulator: a program and costs in, the `Timeline` out that executing it would give.

Lanes that run in issue order, edges between them, and contention: lanes that are busy at once each go at a rate of
their own. Knows programs and costs; knows nothing of models or machines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import NamedTuple

from weft.program.batch import Batch, Rows
from weft.program.stages import COLLECTIVES, COMPUTE, Kind
from weft.program.steps import Block, Form, Step
from weft.simulate.cost import ComputeCosts, Costs, WireCosts
from weft.simulate.divided import Spot

INFINITE = float("inf")
LEAST = 0.1  # of its speed that a lane keeps, whatever happens beside it
NEVER: Mapping[Spot, float] = MappingProxyType({})
REPEATS = 1e-12  # seconds: smaller differences between two rounds are those of floating point


class Taken(NamedTuple):
    """What a step takes by itself. Of a collective also the seconds that it takes away from the compute lane, and those
    of its own that it is on the wire."""

    seconds: float
    stolen: float = 0.0
    wire: float = 0.0


class Coupling(NamedTuple):
    """What lies between steps, in seconds: see `Contention`. `credit`: of time on the wire that an idle link has saved
    up when it is idle for long. `shared`: for each two lanes the part of its speed that the first one loses while the
    second one is busy too."""

    turn: float
    wake: float
    credit: float
    shared: tuple[tuple[float, ...], ...]


class Work(NamedTuple):
    """What steps have in common that take alike for the same rows. `entered`: their norm is taken elsewhere."""

    kind: Kind
    part: str
    entered: bool
    wanted: bool
    lane: str
    wire: str
    algorithm: str


_Step = tuple[int, int, tuple[int, ...]]  # number of its work, of its lane, edges


@dataclass(frozen=True)
class Structure:
    """What there is to know of a form before its rows are known: `works` with their chunks, each once; and for each
    block and step which of them it is, its lane's number, and its edges."""

    form: Form
    works: tuple[tuple[Work, int], ...]
    blocks: tuple[tuple[_Step, ...], ...]

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
    def steps(self) -> Iterator[_Step]:
        """Those of all rounds."""
        for block, steps in zip(self.form.blocks, self.blocks, strict=True):
            for _ in range(block.rounds):
                yield from steps


@lru_cache(maxsize=512)
def structure_of(form: Form, fused: bool = False) -> Structure:
    """Reads a form of one section. `fused`: its sums take the norms that follow them along."""
    numbers: dict[tuple[Work, int], int] = {}
    lanes = {lane: number for number, lane in enumerate(form.lanes)}
    blocks: list[tuple[_Step, ...]] = []
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


class _Clock:
    """All lanes at one moment, and when steps started and stopped; the compute lane is lane 0.

    `now`, in seconds; of each lane the step under way (-1: none), how much of it is `left`, the `speed` that it has
    beside the others, and what waits for it; `sending`: the lanes that communicate just now. A link is a token bucket:
    what it saves up while idle, a collective need not wait for.
    """

    __slots__ = (
        "credit", "left", "now", "queued", "queues", "saved", "saved_at", "sending", "several", "shared", "speed",
        "starts", "stolen", "stops", "turn", "under_way", "waiting", "wake",
    )  # fmt: skip

    def __init__(self, lanes: int, between: Coupling) -> None:
        self.turn, self.wake, self.credit, self.shared = between
        self.now, self.waiting, self.queued = 0.0, False, 0
        self.starts: list[float] = []
        self.stops: list[float] = []
        self.under_way, self.left, self.speed = [-1] * lanes, [0.0] * lanes, [1.0] * lanes
        self.queues: list[deque[tuple[int, Taken]]] = [deque() for _ in range(lanes)]
        self.sending: list[int] = []
        self.several = lanes > 2
        self.stolen, self.saved, self.saved_at = [0.0] * lanes, [0.0] * lanes, [0.0] * lanes

    def issue(self, lane: int, after: tuple[int, ...], cost: Taken, earliest: float = 0.0) -> None:
        """The next step in issue order: the walk goes on once the computation before it has ended, and waits for what
        the step waits for, and until `earliest`, when what it needs comes from elsewhere."""
        stops = self.stops
        while self.under_way[0] >= 0:
            self._advance()
        number = len(stops)
        for distance in after:
            while stops[number - distance] < 0:
                self.waiting = True
                self._advance()
        self.waiting = False
        if earliest > self.now:
            self._pass(earliest)
        if lane:
            self.queues[lane].append((number, cost))
            self.queued += 1
        else:
            self.under_way[0], self.left[0] = number, cost[0]
        self.starts.append(self.now)
        stops.append(-1.0)

    def _pass(self, until: float) -> None:
        """Nothing is computed until then, and a little longer."""
        while self.sending or self.queued:
            self._start()
            if min(self.now + self.left[lane] / self.speed[lane] for lane in self.sending) > until:
                break
            self._advance()
        for lane in self.sending:
            self.left[lane] -= (until - self.now) * self.speed[lane]
        self.now = until + self.wake
        for lane in self.sending:
            self.left[lane] = max(0.0, self.left[lane] - self.wake * self.speed[lane])

    def finish(self) -> None:
        """Until all has ended."""
        while self.under_way[0] >= 0 or self.sending or self.queued:
            self._advance()

    def _advance(self) -> None:
        """To the next end of a step; lanes on which something waits start with it first."""
        under_way, left, speed = self.under_way, self.left, self.speed
        if self.queued:
            self._start()
        seconds, ended = (left[0] / speed[0], 0) if under_way[0] >= 0 else (INFINITE, -1)
        for lane in self.sending:
            until = left[lane] / speed[lane]
            if until < seconds:
                seconds, ended = until, lane
        assert ended >= 0, "a step waits for one that never ends: the program was not checked"
        self.now += seconds
        for lane in self.sending:
            left[lane] -= seconds * speed[lane]
        self.stops[under_way[ended]], under_way[ended] = self.now, -1
        if ended:
            left[0] -= seconds * speed[0]
            self.saved_at[ended], self.stolen[ended] = self.now, 0.0
            self.sending.remove(ended)
            self._share()
            if self.waiting:
                self.now += self.wake

    def _start(self) -> None:
        """What waits for a lane that is free."""
        for lane, queue in enumerate(self.queues):
            if queue and self.under_way[lane] < 0:
                self._send(lane, *queue.popleft())

    def _send(self, lane: int, number: int, cost: Taken) -> None:
        """A collective starts."""
        left, stolen, wire = cost
        if self.credit:
            saved = min(self.credit, self.saved[lane] + self.now - self.saved_at[lane] + left - wire)
            left -= min(wire, saved)
            self.saved[lane] = max(0.0, saved - wire)
        if self.under_way[0] >= 0 and cost.seconds:
            left += self.turn
        self.under_way[lane], self.left[lane], self.starts[number] = number, left, self.now
        self.stolen[lane] = stolen / left if stolen < (1 - LEAST) * left else 1 - LEAST
        self.queued -= 1
        self.sending.append(lane)
        self._share()

    def _share(self) -> None:
        """What lanes keep of their speed beside each other."""
        free = 1.0 - sum(self.stolen)
        self.speed[0] = free if free > LEAST else LEAST
        if self.several:
            for lane in self.sending:
                lost = sum([self.shared[lane][other] for other in self.sending if other != lane])
                self.speed[lane] = max(LEAST, 1.0 - lost)

    def state(self) -> object:
        """All that what follows depends on, where the next step is one that computes."""
        count = len(self.stops)
        under_way = [
            (count - number, round(left / REPEATS)) if number >= 0 else None
            for number, left in zip(self.under_way, self.left, strict=True)
        ]
        queued = [len(queue) for queue in self.queues]
        saved = [
            round(min(self.credit, saved + self.now - at) / REPEATS)
            for saved, at in zip(self.saved, self.saved_at, strict=True)
        ]
        return under_way, queued, saved

    def busy(self, steps: Sequence[_Step], costs: Sequence[Taken]) -> list[float]:
        """Seconds that each lane works on the round that was issued last. What has not ended counts as in the round
        before, or by itself."""
        total, first = [0.0] * len(self.left), len(self.stops) - len(steps)
        for number, (work, lane, _) in enumerate(steps, start=first):
            ended = number if self.stops[number] >= 0 else number - len(steps)
            has_ended = ended >= 0 and self.stops[ended] >= 0
            total[lane] += self.stops[ended] - self.starts[ended] if has_ended else costs[work].seconds
        return total

    def skip(self, seconds: float) -> None:
        """As if rounds that take so long had gone by."""
        self.now += seconds
        for number in self.under_way:
            if number >= 0:
                self.starts[number] += seconds
        self.saved_at = [at + seconds for at in self.saved_at]


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
    clock = _Clock(len(structure.form.lanes), between)
    laid: list[int] = []
    for place, (block, steps) in enumerate(zip(structure.form.blocks, structure.blocks, strict=True)):
        begin, before, number = 0.0, None, 0
        if block.rounds == 1:
            for at, (work, lane, after) in enumerate(steps):
                clock.issue(lane, _nearer(after, len(clock.stops)), costs[work], come.get((place, at), 0.0))
            number = 1
        while number < block.rounds:
            if most is not None and number:
                period, state = clock.now - begin, clock.state()
                if state == before or number >= most:
                    period = period if state == before else max(period, *clock.busy(steps, costs))
                    clock.skip((block.rounds - number) * period)
                    break
                before = state
            begin, number = clock.now, number + 1
            for work, lane, after in steps:
                clock.issue(lane, after, costs[work])
        laid.append(number)
    clock.finish()
    return LaidOut(structure, clock.starts, clock.stops, tuple(laid))


def _nearer(after: tuple[int, ...], issued: int) -> tuple[int, ...]:
    """Edges that lead back over rounds that were not laid out: those there have ended, or the first step has."""
    return tuple([min(distance, issued) for distance in after])
