"""Measures strategies against each other on one batch: interleaved rounds, with both terms of the bound.

Knows the engine's probe; knows nothing of how results are shown. Links and machines drift, so every figure that
compares is the median of per-round ratios, and like is compared with like: each wire with its own serial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from weft.engine import Engine
from weft.execute.results import RunOptions, RunResult
from weft.program.batch import Batch, one_prompt
from weft.program.steps import Program
from weft.timeline.timeline import Timeline, bound, median, overlap_efficiency
from weft.wires import allowed


class Variant(NamedTuple):
    """What is compared."""

    overlap: str
    wire: str

    @property
    def like(self) -> str:
        """The least exact wire that it may use. It is held against serial on that, or exact where that is faster."""
        return allowed(self.wire)[-1]


@dataclass(frozen=True)
class Round:
    """Seconds of one round: computation alone, each wire's messages alone, what those take of a rank's computation
    where its threads keep all its cores busy, and each variant."""

    compute_alone: float
    network_alone: dict[str, float]
    taken: dict[str, float]
    seconds: dict[Variant, float]

    def bound(self, wire: str) -> float:
        """What no schedule of two lanes goes below."""
        return bound(self.compute_alone, self.network_alone[wire])

    def floor(self, wire: str) -> float:
        """The same, where sending takes time from computation."""
        return bound(self.compute_alone + self.taken[wire], self.network_alone[wire])

    def serial(self, wire: str) -> float:
        """Seconds of serial on this wire."""
        return self.seconds[Variant("serial", wire)]

    def times_exact(self, variant: Variant) -> float | None:
        """How many times as fast as serial with all sums exact, if that was run."""
        exact = self.seconds.get(Variant("serial", "exact"))
        return None if exact is None else exact / self.seconds[variant]


@dataclass(frozen=True)
class Measured:
    """One variant's figures over all rounds: medians, but for `seconds` (every round) and `saving_range`.

    Times in seconds. `exposed`: beyond computation alone. `bytes_on_wire`: as the program counts them, on the rank
    that sends most; `bytes_on_device`: as that rank's network device counts them, headers included, where it is one
    that nothing else uses. `floor`: max(compute alone + the messages' processor time, network alone), the bound where
    a rank's threads keep all its cores busy; `floor_efficiency`: against that. `predicted`: seconds, from costs that
    were measured before. `timeline`: of the fastest round. `like`: the wire whose serial it is held against;
    `times_exact`: how many times as fast as serial with all sums exact. `why`: see `Plan`.
    """

    overlap: str
    wire: str
    like: str
    plan: str
    why: list[str]
    times_exact: float | None
    seconds: list[float]
    compute_alone: float
    network_alone: float
    bound: float
    floor: float
    serial_median: float
    saving: float
    saving_range: tuple[float, float]
    saving_bound: float
    overlap_efficiency: float | None
    floor_efficiency: float | None
    exposed: float
    bytes_on_wire: int
    bytes_on_device: int | None
    predicted: float | None
    timeline: Timeline
    predicted_timeline: Timeline | None

    @property
    def median(self) -> float:
        """Of its seconds."""
        return median(self.seconds)

    @property
    def above_ceiling(self) -> bool:
        """True if it saves more than can be saved: then something was measured wrongly, or the machine drifted."""
        return self.overlap != "serial" and self.saving > self.saving_bound + TOLERANCE


ALONE = ("compute", "network", "beside")  # runs of one side

# Of a saving, in parts of serial's time: what runs of one round differ by on a quiet machine.
TOLERANCE = 0.02


class _Measurement(NamedTuple):
    """One run, and the bytes that each rank's device sent for it, where that is known."""

    result: RunResult
    device: list[int] | None


class Comparing:
    """One batch, measured round by round. The first round warms up and doesn't count: costs are corrected by what it
    took, as they are by every batch of a server, and `auto` is planned anew. Variants that come to the same program on
    the same wire (`auto` is one of the others, mostly) are run once.

    tokens: ids of the flattened batch. `sent`: bytes that each rank's device has sent so far, where it has one of its
    own.
    """

    def __init__(
        self, engine: Engine, batch: Batch, tokens: list[int], variants: Sequence[Variant],
        sent: Callable[[], list[int]] | None = None,
    ) -> None:  # fmt: skip
        self._engine, self._batch, self._tokens, self._sent = engine, batch, tokens, sent
        chosen = ["exact"] if any(variant.like != variant.wire for variant in variants) else []
        wires = list(dict.fromkeys([*chosen, *(variant.like for variant in variants)]))
        both = list(dict.fromkeys([*(Variant("serial", wire) for wire in wires), *variants]))
        self._planners = {variant: engine.planner.like(*variant) for variant in both}
        self._alone = [(Variant("serial", wire), part) for wire in wires for part in ("network", "beside")]
        self._alone.append((both[0], "compute"))
        self._plan()
        self._best: dict[Variant, _Measurement] = {}  # of the rounds that count
        self._started = 0
        self.rounds: list[Round] = []

    def round(self) -> None:
        """Runs everything once. The order rotates from round to round, so that nothing always follows the same."""
        shift = self._started % len(self._runs)
        done = {run: self._run(*run) for run in self._runs[shift:] + self._runs[:shift]}
        self._started += 1
        if self._started == 1:
            self._correct({variant: run.result for (variant, part), run in done.items() if part == "both"})
            return
        both = {variant: done[same, "both"] for variant, same in self._run_as.items()}
        alone = {part: {v.wire: run.result for (v, p), run in done.items() if p == part} for part in ALONE}
        [compute] = alone["compute"].values()
        threads = self._engine.config.threads
        self.rounds.append(
            Round(
                compute.seconds, {wire: result.seconds for wire, result in alone["network"].items()},
                {wire: max(result.processor) / threads for wire, result in alone["beside"].items()},
                {variant: run.result.seconds for variant, run in both.items()},
            )
        )  # fmt: skip
        for variant, run in both.items():
            if run.result.seconds <= self._best.get(variant, run).result.seconds:
                self._best[variant] = run

    def _plan(self) -> None:
        """What is run in a round."""
        self._plans = {variant: planner.plan(self._batch) for variant, planner in self._planners.items()}
        first: dict[tuple[Program, str], Variant] = {}
        self._run_as = {v: first.setdefault((plan.program, plan.wire), v) for v, plan in self._plans.items()}
        self._runs = [*((variant, "both") for variant in first.values()), *self._alone]

    def _correct(self, results: dict[Variant, RunResult]) -> None:
        """Costs by what the first round took, and plans by the costs."""
        for variant, result in results.items():
            self._planners[variant].observe(self._plans[variant], self._batch, result.compute, result.network)
        self._plan()

    def _run(self, variant: Variant, part: str) -> _Measurement:
        before = self._sent() if self._sent else None
        result = self._engine.probe(self._batch, self._tokens, self._plans[variant], RunOptions(part, timeline=True))
        device = [b - a for a, b in zip(before, self._sent(), strict=True)] if self._sent and before else None
        return _Measurement(result, device)

    def result(self) -> list[Measured]:
        """What the rounds came to so far (at least one), in the order of the variants, each wire's serial first."""
        return [self._measured(variant, self._best[variant]) for variant in self._plans]

    def _like(self, variant: Variant) -> str:
        """The wire whose serial, and whose bound, it is held against: its own; of those that choose, the faster one."""
        if variant.like == variant.wire:
            return variant.wire
        return min(("exact", variant.like), key=lambda wire: median(r.serial(wire) for r in self.rounds))

    def _efficiency(self, variant: Variant, wire: str, least: Sequence[float]) -> float | None:
        """Against the bound or the floor of each round."""
        rounds = [(r.serial(wire), r.seconds[variant], each) for r, each in zip(self.rounds, least, strict=True)]
        serial = median(serial for serial, _, _ in rounds)
        saved, possible = (median(s - taken[place] for s, *taken in rounds) for place in (0, 1))
        return overlap_efficiency(serial, serial - saved, serial - possible)

    def _measured(self, variant: Variant, fastest: _Measurement) -> Measured:
        rounds, wire, best, device = self.rounds, self._like(variant), fastest.result, fastest.device
        times_exact = [times for times in (r.times_exact(variant) for r in rounds) if times is not None]
        savings = [1 - r.seconds[variant] / r.serial(wire) for r in rounds]
        most = max(range(len(best.bytes_sent)), key=lambda rank: best.bytes_sent[rank])
        assert best.timeline is not None
        plan, planner = self._plans[variant], self._planners[variant]
        title = f"{variant.overlap}, wire {variant.wire}"
        predicted = planner.predict(plan, self._batch, title) if plan.predicted else None
        return Measured(
            overlap=variant.overlap, wire=variant.wire, like=wire, plan=plan.describe(), why=list(plan.why),
            times_exact=median(times_exact) if times_exact else None,
            seconds=[r.seconds[variant] for r in rounds], compute_alone=median(r.compute_alone for r in rounds),
            network_alone=median(r.network_alone[wire] for r in rounds), bound=median(r.bound(wire) for r in rounds),
            floor=median(r.floor(wire) for r in rounds),
            serial_median=median(r.serial(wire) for r in rounds), saving=median(savings),
            saving_range=(min(savings), max(savings)),
            saving_bound=max(0.0, median(1 - r.bound(wire) / r.serial(wire) for r in rounds)),
            overlap_efficiency=self._efficiency(variant, wire, [r.bound(wire) for r in rounds]),
            floor_efficiency=self._efficiency(variant, wire, [r.floor(wire) for r in rounds]),
            exposed=median(r.seconds[variant] - r.compute_alone for r in rounds),
            bytes_on_wire=best.bytes_sent[most], bytes_on_device=device[most] if device is not None else None,
            predicted=plan.predicted.seconds if plan.predicted else None,
            timeline=replace(best.timeline, title=title), predicted_timeline=predicted,
        )  # fmt: skip


def compare(
    engine: Engine, tokens: list[int], overlaps: Sequence[str], rounds: int = 5,
    tick: Callable[[], None] = lambda: None,
) -> list[Measured]:  # fmt: skip
    """Serial and every strategy on one prompt, on the engine's own wire. `tick` is called after every round."""
    variants = [Variant(overlap, engine.config.wire) for overlap in overlaps]
    comparing = Comparing(engine, one_prompt(len(tokens)), tokens, variants)
    for _ in range(rounds + 1):
        comparing.round()
        tick()
    return comparing.result()
