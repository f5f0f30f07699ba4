"""One turn of the engine's loop: a batch that is under way, and what it came to. Knows batches, plans and results."""

from __future__ import annotations

from dataclasses import dataclass

from weft.batching.scheduled import Scheduled
from weft.execute.results import RunResult, Submitted
from weft.plan.planner import Plan


@dataclass(frozen=True)
class Flight:
    """A batch under way."""

    scheduled: Scheduled
    plan: Plan
    submitted: Submitted


@dataclass
class Turn:
    """One turn of the loop, for who looks on. `wall`: seconds of all of it."""

    scheduled: Scheduled
    plan: Plan
    wall: float
    result: RunResult

    @property
    def run(self) -> float:
        """Seconds of the slowest worker's part: the program, then the choice of tokens."""
        return self.result.seconds + self.result.sampling
