"""Measures strategies against each other on one prompt: interleaved rounds, with both terms of the bound.

Knows the engine's probe; knows nothing of how results are shown. Links and machines drift, so every figure that
compares is the median of per-round ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.engine import Engine
from weft.execute.controller import RunOptions, RunResult
from weft.plan.planner import Plan, Planner
from weft.program.batch import one_prompt
from weft.timeline.timeline import Timeline, bound, median, overlap_efficiency


@dataclass(frozen=True)
class Round:
    """Seconds of one round: both lanes alone, serial, and each strategy by its name."""

    compute_alone: float
    network_alone: float
    serial: float
    strategies: dict[str, float]

    @property
    def bound(self) -> float:
        """What no schedule of two lanes goes below."""
        return bound(self.compute_alone, self.network_alone)


@dataclass(frozen=True)
class Measured:
    """One strategy's figures over all rounds. Times in seconds; `timeline` is of its fastest round."""

    overlap: str
    plan: str
    seconds: list[float]
    saving: float
    saving_bound: float
    overlap_efficiency: float | None
    bytes_on_wire: int
    timeline: Timeline

    @property
    def median(self) -> float:
        """Of its seconds."""
        return median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """All rounds of one prompt, and what each strategy came to."""

    tokens: int
    rounds: list[Round]
    strategies: list[Measured]

    @property
    def compute_alone(self) -> float:
        """Median seconds."""
        return median(r.compute_alone for r in self.rounds)

    @property
    def network_alone(self) -> float:
        """Median seconds."""
        return median(r.network_alone for r in self.rounds)

    @property
    def serial(self) -> float:
        """Median seconds."""
        return median(r.serial for r in self.rounds)

    @property
    def bound(self) -> float:
        """Median seconds."""
        return median(r.bound for r in self.rounds)


def compare(
    engine: Engine, tokens: list[int], overlaps: Sequence[str], rounds: int = 5,
    tick: Callable[[], None] = lambda: None,
) -> Comparison:  # fmt: skip
    """Runs serial, both lanes alone and every strategy once a round; the first round warms up and doesn't count.

    The order rotates from round to round, so that nothing always follows the same.
    """
    batch, old = one_prompt(len(tokens)), engine.planner
    plans = {name: Planner(old.stages, name, old.wire, old.granule).plan(batch) for name in ("serial", *overlaps)}
    runs = [(name, "both") for name in plans] + [("serial", "compute"), ("serial", "network")]
    best: dict[str, RunResult] = {}
    kept: list[Round] = []
    for number in range(rounds + 1):
        seconds: dict[tuple[str, str], float] = {}
        for run in runs[number % len(runs) :] + runs[: number % len(runs)]:
            name, part = run
            result = engine.probe(tokens, plans[name], RunOptions(part, timeline=True))
            seconds[run] = result.seconds
            if number and part == "both" and (name not in best or result.seconds < best[name].seconds):
                best[name] = result
        if number:
            both = {name: seconds[name, "both"] for name in plans}
            kept.append(Round(seconds["serial", "compute"], seconds["serial", "network"], both["serial"], both))
        tick()
    return Comparison(len(tokens), kept, [_measured(name, plans[name], kept, best[name]) for name in overlaps])


def _measured(name: str, plan: Plan, rounds: list[Round], best: RunResult) -> Measured:
    efficiencies = [overlap_efficiency(r.serial, r.strategies[name], r.bound) for r in rounds]
    known = [value for value in efficiencies if value is not None]
    assert best.timeline is not None
    return Measured(
        overlap=name, plan=plan.describe(), seconds=[r.strategies[name] for r in rounds],
        saving=median(1 - r.strategies[name] / r.serial for r in rounds),
        saving_bound=median(1 - r.bound / r.serial for r in rounds),
        overlap_efficiency=median(known) if known else None, bytes_on_wire=max(best.bytes_sent),
        timeline=best.timeline,
    )  # fmt: skip
