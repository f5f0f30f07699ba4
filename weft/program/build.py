"""Builders: from stages and cuts to a program.

One weave serves every strategy, because a strategy is only where rows are cut and how sums travel: serial has no
cut, ISO cuts inside a sequence, request overlap between sequences, GEMM-tile overlap cuts each stage's last
projection alone, and a sum travels whole or as reduce-scatter and all-gather.
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
    collective of the last chunks travels while the next stage computes the first ones. With `cuts.ahead`, one chunk is
    in attention while another is in the MLP, so that long and short computations alternate: what travels behind a
    short one need not wait for the next stage.
    """
    weaver = (_ScatteringWeaver if cuts.scattered else _Weaver)(cuts.tiles)
    work: list[tuple[int, int, Rows]] = []  # place of the stage, of the chunk
    for index, stage in enumerate(stages):
        offsets = cuts.attention if stage.ordered else cuts.others if stage.collective is Kind.REDUCE else ()
        work += [(index, number, rows) for number, rows in enumerate(chunks(tokens, offsets))]
    if cuts.ahead:
        last = len(stages) - 1  # it runs once, after everything
        work.sort(key=lambda entry: (entry[0] == last, entry[0] + entry[1], -entry[1]))
    for index, _, rows in work:
        weaver.chunk(stages[index], rows, stages[index + 1] if index + 1 < len(stages) else None)
    return Program(tuple(weaver.steps))


class _Weaver:
    """Appends steps and remembers which collectives a later stage has to wait for."""

    def __init__(self, tiles: int) -> None:
        self.steps: list[Step] = []
        self._tiles = tiles
        self._awaited: dict[str, list[tuple[int, Rows]]] = {}  # by the stage that waits: collectives, with their rows

    def chunk(self, stage: Stage, rows: Rows, following: Stage | None) -> None:
        """One chunk of a stage; `following` is the stage that comes next."""
        start, stop = rows
        after = tuple([i for i, (a, b) in self._awaited.get(stage.name, ()) if a < stop and start < b])
        if stage.collective is not Kind.REDUCE or self._tiles == 1:
            self._add(Kind.COMPUTE, stage, rows, *after)
            self._collective(stage, rows, following)
            return
        self._add(Kind.BODY, stage, rows, *after)
        for tile in _even_tiles(rows, self._tiles):
            self._add(Kind.TAIL, stage, tile)
            self._collective(stage, tile, following)

    def _collective(self, stage: Stage, rows: Rows, following: Stage | None) -> None:
        if stage.collective is not None:
            self._awaits(following, self._add(stage.collective, stage, rows), rows)

    def _awaits(self, stage: Stage | None, collective: int, rows: Rows) -> None:
        if stage is not None:
            self._awaited.setdefault(stage.name, []).append((collective, rows))

    def _add(self, kind: Kind, stage: Stage, rows: Rows, *after: int) -> int:
        self.steps.append(Step(kind, stage.name, rows, after))
        return len(self.steps) - 1


class _ScatteringWeaver(_Weaver):
    """Sums as reduce-scatter, `enter` on each rank's part of the rows, all-gather.

    The last two of a chunk come one chunk later, so that the reduce-scatter travels behind that chunk's computation.
    """

    def __init__(self, tiles: int) -> None:
        super().__init__(tiles)
        self._scattered: tuple[Stage, Rows, int] | None = None  # the stage that wants them, rows, reduce_scatter

    def chunk(self, stage: Stage, rows: Rows, following: Stage | None) -> None:
        if self._scattered is not None and self._scattered[0] is stage and self._scattered[1].intersects(rows):
            self._gather()  # no chunk lies between
        super().chunk(stage, rows, following)

    def _collective(self, stage: Stage, rows: Rows, following: Stage | None) -> None:
        self._gather()
        if stage.collective is not Kind.REDUCE or following is None:
            super()._collective(stage, rows, following)
        else:
            self._scattered = following, rows, self._add(Kind.REDUCE_SCATTER, stage, rows)

    def _gather(self) -> None:
        """What the chunk before left, if it is not under way yet."""
        if self._scattered is not None:
            stage, rows, scattered = self._scattered
            self._add(Kind.ENTER, stage, rows, scattered)
            self._awaits(stage, self._add(Kind.ALL_GATHER, stage, rows), rows)
            self._scattered = None


def _even_tiles(rows: Rows, count: int) -> tuple[Rows, ...]:
    edges = sorted({rows.start + round(rows.length * i / count) for i in range(count + 1)})
    return tuple(Rows(a, b) for a, b in pairwise(edges))
