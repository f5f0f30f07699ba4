"""Builders: from stages and cuts to a program.

One weave serves every strategy, because a strategy is only where rows are cut and how sums travel: serial has no
cut, ISO cuts inside a sequence, request overlap between sequences, GEMM-tile overlap cuts each stage's last
projection alone, and a sum travels whole or as reduce-scatter and all-gather.
Knows nothing of costs: which cuts are good is the planner's question.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from weft.errors import InputError
from weft.program.batch import Batch, Rows
from weft.program.fold import Issue, folded
from weft.program.stages import Kind, Outline
from weft.program.steps import Form, Program
from weft.program.strategy import Cuts, Strategy, chunks, place

FORMS = 256  # that are kept


def build(strategy: Strategy, outline: Outline, batch: Batch, granule: int = 1) -> Program:
    """The program of `strategy` for `batch`; see `strategy.place` for `granule` and errors."""
    return weave(outline, batch.tokens, place(strategy, batch, granule))


def demand_scattering(outline: Outline) -> None:
    """Raises `InputError` for a model whose sums can't be scattered."""
    if not outline.scatters:
        raise InputError(
            "--overlap rs: sums of this model can't be scattered, because a stage needs more than the one before it "
            "(norms over all heads), or not all of them; leave rs out"
        )


def weave(outline: Outline, tokens: int, cuts: Cuts) -> Program:
    """The program of these cuts, for so many rows."""
    pattern, offsets = numbered(tokens, cuts)
    return Program(form_of(outline, pattern), offsets)


class Pattern(NamedTuple):
    """What is alike in batches that are cut alike: offsets have numbers, 0 for the first row and `last` for the end.

    `ordered`, `others`: those that cut ordered stages and the others. `tiles`: of each chunk that has a tail of its
    own, the edges of its tiles.
    """

    ordered: tuple[int, ...]
    others: tuple[int, ...]
    last: int
    tiles: tuple[tuple[int, ...], ...]
    scattered: bool
    ahead: bool


def numbered(tokens: int, cuts: Cuts) -> tuple[Pattern, tuple[int, ...]]:
    """The pattern of some cuts, and the offsets that it numbers."""
    tiles: list[tuple[int, ...]] = []
    if cuts.tiles > 1:
        rows = dict.fromkeys((*chunks(tokens, cuts.ordered), *chunks(tokens, cuts.others)))
        tiles = [_even(chunk, cuts.tiles) for chunk in rows]
    offsets = tuple(sorted({0, tokens, *cuts.ordered, *cuts.others, *(edge for edges in tiles for edge in edges)}))
    number = {offset: place for place, offset in enumerate(offsets)}
    ordered, others, *parts = (tuple([number[offset] for offset in e]) for e in (cuts.ordered, cuts.others, *tiles))
    return Pattern(ordered, others, number[tokens], tuple(parts), cuts.scattered, cuts.ahead), offsets


def _even(rows: Rows, count: int) -> tuple[int, ...]:
    return tuple(sorted({rows.start + round(rows.length * i / count) for i in range(count + 1)}))


@lru_cache(maxsize=FORMS)
def form_of(outline: Outline, pattern: Pattern) -> Form:
    """The form of all programs that are cut alike."""
    return folded(outline, lambda short: issued(short, pattern))


def issued(outline: Outline, pattern: Pattern) -> list[Issue]:
    """Stage after stage, chunk after chunk, each chunk's collective right behind its computation.

    A chunk waits for those collectives of the stages before that hold its rows, and for nothing else: so the
    collective of the last chunks travels while the next stage computes the first ones. With `ahead`, one chunk is
    in attention while another is in the MLP, so that long and short computations alternate: what travels behind a
    short one need not wait for the next stage.
    """
    weaver = (_ScatteringWeaver if pattern.scattered else _Weaver)(outline, pattern.tiles)
    work: list[tuple[int, int, Rows]] = []  # place of the stage, of the chunk
    for index, stage in enumerate(outline.stages):
        edges = pattern.ordered if stage.ordered else pattern.others if stage.collective is Kind.REDUCE else ()
        work += [(index, number, rows) for number, rows in enumerate(chunks(pattern.last, edges))]
    if pattern.ahead:
        last = len(outline.stages) - 1  # it runs once, after everything
        work.sort(key=lambda entry: (entry[0] == last, entry[0] + entry[1], -entry[1]))
    for index, _, rows in work:
        weaver.chunk(index, rows)
    return weaver.issues


class _Weaver:
    """Issues steps and remembers which collectives a later stage has to wait for."""

    def __init__(self, outline: Outline, tiles: Sequence[Sequence[int]]) -> None:
        self.outline = outline
        self.issues: list[Issue] = []
        self._narrow_from = outline.narrow_from
        self._tiles = {Rows(edges[0], edges[-1]): [Rows(*pair) for pair in pairwise(edges)] for edges in tiles}
        self._sums: dict[int, list[tuple[int, Rows]]] = {}  # by stage: what brings its contribution, with the rows

    def chunk(self, place: int, rows: Rows) -> None:
        """One chunk of a stage."""
        since = self.outline.input_until(place - 1) + 1 if place else 0  # the stage before waited for the others
        after = [
            index
            for stage in range(since, self.outline.input_until(place) + 1)
            for index, summed in self._sums.get(stage, ())
            if summed.intersects(rows)
        ]
        stage = self.outline.stages[place]
        if stage.collective is not Kind.REDUCE or stage.aside or rows not in self._tiles:
            self._issue(Kind.COMPUTE, place, rows, *after)
            self._collective(place, rows)
            return
        self._issue(Kind.BODY, place, rows, *after)
        for tile in self._tiles[rows]:
            self._issue(Kind.TAIL, place, tile)
            self._collective(place, tile)

    def _collective(self, place: int, rows: Rows) -> None:
        collective = self.outline.stages[place].collective
        if collective is not None:
            self._summed(place, self._issue(collective, place, rows), rows)

    def _summed(self, place: int, collective: int, rows: Rows) -> None:
        self._sums.setdefault(place, []).append((collective, rows))

    def _issue(self, kind: Kind, place: int, rows: Rows, *after: int) -> int:
        stage = self.outline.stages[place]
        leaves = place - 1 if kind in (Kind.ENTER, Kind.ALL_GATHER) else place  # whose rows these are
        self.issues.append(Issue(kind, stage.part, stage.layer, rows, after, leaves >= self._narrow_from))
        return len(self.issues) - 1


class _ScatteringWeaver(_Weaver):
    """Sums as reduce-scatter, `enter` on each rank's part of the rows, all-gather.

    The last two of a chunk come one chunk later, so that the reduce-scatter travels behind that chunk's computation.
    """

    def __init__(self, outline: Outline, tiles: Sequence[Sequence[int]]) -> None:
        super().__init__(outline, tiles)
        demand_scattering(outline)
        self._narrow_from = len(outline.stages) - 1  # before that, each rank has its part of the rows
        self._scattered: tuple[int, Rows, int] | None = None  # the stage that wants them, rows, reduce_scatter

    def chunk(self, place: int, rows: Rows) -> None:
        if self._scattered is not None and self._scattered[0] == place and self._scattered[1].intersects(rows):
            self._gather()  # no chunk lies between
        super().chunk(place, rows)

    def _collective(self, place: int, rows: Rows) -> None:
        self._gather()
        if self.outline.stages[place].collective is not Kind.REDUCE or place + 1 == len(self.outline.stages):
            super()._collective(place, rows)
        else:
            self._scattered = place + 1, rows, self._issue(Kind.REDUCE_SCATTER, place, rows)

    def _gather(self) -> None:
        """What the chunk before left, if it is not under way yet."""
        if self._scattered is not None:
            place, rows, scattered = self._scattered
            self._issue(Kind.ENTER, place, rows, scattered)
            self._summed(place - 1, self._issue(Kind.ALL_GATHER, place, rows), rows)
            self._scattered = None
