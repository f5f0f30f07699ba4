"""All lanes at one moment, and how they go on: in issue order, with edges between them, and contention, where lanes
that are busy at once each go at a rate of their own.

Knows seconds; knows nothing of what steps are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

INFINITE = float("inf")
LEAST = 0.1  # of its speed that a lane keeps, whatever happens beside it
REPEATS = 1e-12  # seconds: smaller differences between two rounds are those of floating point
Laid = tuple[int, int, tuple[int, ...]]  # a step: number of its work, of its lane, edges


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


class Clock:
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

    def busy(self, steps: Sequence[Laid], costs: Sequence[Taken]) -> list[float]:
        """Seconds that each lane works on the round that was issued last. What has not ended counts as in the round
        before, or by itself."""
        total, first = [0.0] * len(self.left), len(self.stops) - len(steps)
        for number, (work, lane, _) in enumerate(steps, start=first):
            ended = number if self.stops[number] >= 0 else number - len(steps)
            has_ended = ended >= 0 and self.stops[ended] >= 0
            total[lane] += self.stops[ended] - self.starts[ended] if has_ended else costs[work].seconds
        return total

    def go_round(self, rounds: int, steps: Sequence[Laid], costs: Sequence[Taken], most: int | None) -> int:
        """So many rounds of these steps; returns how many of them were laid out, see `lay_out`. What other lanes still
        have shares the link with the first ones; those that follow it are looked at anew."""
        lanes, left, laid, alike, begin, before = {lane for _, lane, _ in steps}, rounds, 0, 0, 0.0, None
        while left:
            if most is not None and alike:
                period, state = self.now - begin, self.state()
                if state == before or alike >= most:
                    period = period if state == before else max(period, *self.busy(steps, costs))
                    others = self.others(lanes)
                    skipped = min(left, int(others / period)) if others and period else left
                    self.skip(skipped * period, lanes)
                    left, alike, state = left - skipped, 0, None
                before = state
            if left:
                begin, left, laid, alike = self.now, left - 1, laid + 1, alike + 1
                for work, lane, after in steps:
                    self.issue(lane, after, costs[work])
        return laid

    def others(self, lanes: Collection[int]) -> float:
        """Seconds until all that is under way, or waits, on other lanes has ended, if nothing slows it."""
        until = [
            (self.left[lane] if self.under_way[lane] >= 0 else 0.0) + sum(cost.seconds for _, cost in self.queues[lane])
            for lane in range(1, len(self.left)) if lane not in lanes
        ]  # fmt: skip
        return max(until, default=0.0)

    def skip(self, seconds: float, lanes: Collection[int]) -> None:
        """As if rounds that take so long, and have steps on these lanes, had gone by."""
        others = [lane for lane in range(1, len(self.left)) if lane not in lanes]
        for lane in others:
            self._go_on(lane, self.now + seconds)
        self.now += seconds
        for lane in set(range(len(self.left))) - set(others):
            if (number := self.under_way[lane]) >= 0:
                self.starts[number] += seconds
            self.saved_at[lane] += seconds

    def _go_on(self, lane: int, until: float) -> None:
        """A lane by itself, until then."""
        begin = self.now
        while self.under_way[lane] >= 0 or self.queues[lane]:
            if self.under_way[lane] < 0:
                self._send(lane, *self.queues[lane].popleft())
            ends = self.now + self.left[lane] / self.speed[lane]
            if ends > until:
                self.left[lane] -= (until - self.now) * self.speed[lane]
                break
            self.now = self.stops[self.under_way[lane]] = self.saved_at[lane] = ends
            self.under_way[lane], self.stolen[lane] = -1, 0.0
            self.sending.remove(lane)
            self._share()
        self.now = begin
