"""Builders: from stages and cuts to a program.

One weave serves every strategy, because a strategy is only where rows are cut: serial has no cut, ISO cuts
inside a sequence, request overlap between sequences, GEMM-tile overlap cuts each stage's last projection alone.
Knows nothing of costs: which cuts are good is the planner's question.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from weft.program.batch import Batch, Rows
from weft.program.steps import Kind, Program, Stage, Step
from weft.program.strategy import Cuts, Strategy, chunks, place


def build(strategy: Strategy, stages: Sequence[Stage], batch: Batch, granule: int = 1) -> Program:
    """The program of `strategy` for `batch`; see `strategy.place` for `granule` and errors."""
    return weave(stages, batch.tokens, place(strategy, batch, granule))


def weave(stages: Sequence[Stage], tokens: int, cuts: Cuts) -> Program:
    """Stage after stage, chunk after chunk, each chunk's collective right behind its computation.

    A chunk waits for those collectives of the stage before that hold its rows, and for nothing else: so the
    collective of the last chunks travels while the next stage computes the first ones.
    """
    weaver = _Weaver()
    for stage in stages:
        offsets = cuts.attention if stage.ordered else cuts.others if stage.collective is Kind.REDUCE else ()
        for rows in chunks(tokens, offsets):
            weaver.chunk(stage, rows, cuts.tiles)
        weaver.next_stage()
    return Program(tuple(weaver.steps))


class _Weaver:
    """Appends steps and remembers which collectives the next stage has to wait for."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._previous: list[int] = []  # collectives of the stage before
        self._current: list[int] = []  # collectives of this stage

    def chunk(self, stage: Stage, rows: Rows, tiles: int) -> None:
        after = tuple(i for i in self._previous if self.steps[i].rows.intersects(rows))
        if stage.collective is not Kind.REDUCE or tiles == 1:
            self.steps.append(Step(Kind.COMPUTE, stage.name, rows, after))
            self._collective(stage, rows)
            return
        self.steps.append(Step(Kind.BODY, stage.name, rows, after))
        for tile in _even_tiles(rows, tiles):
            self.steps.append(Step(Kind.TAIL, stage.name, tile))
            self._collective(stage, tile)

    def _collective(self, stage: Stage, rows: Rows) -> None:
        if stage.collective is not None:
            self._current.append(len(self.steps))
            self.steps.append(Step(stage.collective, stage.name, rows))

    def next_stage(self) -> None:
        self._previous, self._current = self._current, []


def _even_tiles(rows: Rows, count: int) -> tuple[Rows, ...]:
    edges = sorted({rows.start + round(rows.length * i / count) for i in range(count + 1)})
    return tuple(Rows(a, b) for a, b in pairwise(edges))
