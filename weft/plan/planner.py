"""Which program runs a batch. Knows strategies and stages; knows nothing of processes or tensors. No torch.

The user's strategy is taken at its word; plans are checked before they are used and kept by the batch's shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from weft.program.batch import Batch, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.steps import Kind, Program, Stage
from weft.program.strategy import Strategy


@dataclass(frozen=True)
class Plan:
    """What was chosen for one batch."""

    strategy: Strategy
    program: Program
    wire: str

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
    """Makes plans for one model. `granule`: see `strategy.place`."""

    def __init__(self, stages: tuple[Stage, ...], overlap: str, wire: str, granule: int = 1) -> None:
        self.stages, self.wire, self.granule = stages, wire, granule
        self.strategy = Strategy.parse(overlap)
        self._known = lru_cache(maxsize=256)(self._make)

    def plan(self, batch: Batch) -> Plan:
        """The plan for a batch. Raises `InputError` if the strategy's cuts don't fit it."""
        # Programs depend on rows alone, unless cuts have to follow sequences or positions.
        return self._known(batch if self._by_sequence else one_prompt(batch.tokens))

    def like(self, overlap: str, wire: str) -> Planner:
        """A planner of the same model and granule for another strategy and wire, as comparisons need them."""
        return Planner(self.stages, overlap, wire, self.granule)

    @property
    def _by_sequence(self) -> bool:
        return self.granule > 1 or self.strategy.requests

    def _make(self, batch: Batch) -> Plan:
        program = build(self.strategy, self.stages, batch, self.granule)
        check(program, self.stages, batch)
        return Plan(self.strategy, program, self.wire)
