"""Builders: from stages and cuts to a program.

One weave serves every strategy, because a strategy is only where rows are cut and how sums travel: serial has no
cut, ISO cuts inside a sequence, request overlap between sequences, GEMM-tile overlap cuts each stage's last
projection alone, and a sum travels whole or as reduce-scatter and all-gather. pipe.py puts weaves of some layers and
rows together, for layouts with several sections.
Knows nothing of costs: which cuts are good is the planner's question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from weft.errors import InputError
from weft.layout import Layout
from weft.program.batch import Batch, Rows
from weft.program.fold import Issue, folded
from weft.program.pipe import SomeLayers, piped
from weft.program.stages import Kind, Outline, Stage
from weft.program.steps import Form, Program
from weft.program.strategy import Cuts, Strategy, chunks, place

FORMS = 256  # that are kept
BEFORE = -1  # the place of all that comes before a section's first stage


def build(
    strategy: Strategy, outline: Outline, batch: Batch, granule: int = 1, layout: Layout | None = None
) -> Program:  # fmt: skip
    """The program of `strategy` for `batch`; see `strategy.place` for `granule` and errors. `layout`: of the model over
    the ranks; without it, all of them have all layers."""
    return weave(outline, batch.tokens, place(strategy, batch, granule), layout)


def demand_scattering(outline: Outline, layout: Layout | None = None) -> None:
    """Raises `InputError` for a model, or a layout, with which sums can't be scattered."""
    if layout is not None and layout.several:
        raise InputError(
            f"--overlap rs: sums can't be scattered where rows go on to other ranks, as they do with {layout}; leave "
            "rs out"
        )
    if not outline.scatters:
        raise InputError(
            "--overlap rs: sums of this model can't be scattered, because a stage needs more than the one before it "
            "(norms over all heads), or not all of them; leave rs out"
        )


def weave(outline: Outline, tokens: int, cuts: Cuts, layout: Layout | None = None) -> Program:
    """The program of these cuts, for so many rows."""
    pattern, offsets = numbered(tokens, cuts)
    return Program(form_of(outline, pattern, layout if layout is not None and layout.several else None), offsets)


class Pattern(NamedTuple):
    """What is alike in batches that are cut alike: offsets have numbers, 0 for the first row and `last` for the end.

    `ordered`, `others`: those that cut ordered stages and the others. `tiles`: of each chunk that has a tail of its
    own, the edges of its tiles. `pieces`: see `strategy.Cuts`.
    """

    ordered: tuple[int, ...]
    others: tuple[int, ...]
    last: int
    tiles: tuple[tuple[int, ...], ...]
    scattered: bool
    ahead: bool
    pieces: tuple[int, ...] = ()

    def chunks(self, stage: Stage) -> tuple[Rows, ...]:
        """Those that a stage's rows are cut into."""
        edges = self.ordered if stage.ordered else self.others if stage.collective is Kind.REDUCE else ()
        return chunks(Rows(0, self.last), edges)

    def piece(self, rows: Rows) -> Pattern:
        """Of some rows by themselves, whose first one's offset gets the number 0."""

        def here(offsets: Sequence[int]) -> tuple[int, ...]:
            return tuple([each - rows.start for each in offsets if rows.start < each < rows.stop])

        tiles = tuple(
            tuple(edge - rows.start for edge in edges)
            for edges in self.tiles
            if rows.contains(Rows(edges[0], edges[-1]))
        )
        return Pattern(here(self.ordered), here(self.others), rows.length, tiles, self.scattered, self.ahead)


def numbered(tokens: int, cuts: Cuts) -> tuple[Pattern, tuple[int, ...]]:
    """The pattern of some cuts, and the offsets that it numbers."""
    tiles: list[tuple[int, ...]] = []
    if cuts.tiles > 1:
        rows = dict.fromkeys(chunk for cut in (cuts.ordered, cuts.others) for chunk in chunks(Rows(0, tokens), cut))
        tiles = [_even(chunk, cuts.tiles) for chunk in rows]
    offsets = tuple(sorted({0, tokens, *cuts.ordered, *cuts.others, *(edge for edges in tiles for edge in edges)}))
    number = {offset: place for place, offset in enumerate(offsets)}
    ordered, others, *parts = (tuple([number[offset] for offset in e]) for e in (cuts.ordered, cuts.others, *tiles))
    pieces = tuple([number[offset] for offset in cuts.pieces])
    return Pattern(ordered, others, number[tokens], tuple(parts), cuts.scattered, cuts.ahead, pieces), offsets


def _even(rows: Rows, count: int) -> tuple[int, ...]:
    return tuple(sorted({rows.start + round(rows.length * i / count) for i in range(count + 1)}))


@lru_cache(maxsize=FORMS)
def form_of(outline: Outline, pattern: Pattern, layout: Layout | None = None) -> Form:
    """The form of all programs that are cut alike. `layout`: one of several sections."""
    if layout is None and not pattern.pieces:
        return folded(outline, lambda short: issued(short, pattern))
    rows = chunks(Rows(0, pattern.last), pattern.pieces)
    return piped(outline, rows, layout, lambda piece, part: part_of(outline, pattern.piece(piece), part))


@lru_cache(maxsize=FORMS)
def part_of(outline: Outline, pattern: Pattern, part: SomeLayers) -> Form:
    """Some layers' part of a form, for one piece's rows. Its first steps stand for the sends that bring them."""

    def issue(short: Outline) -> list[Issue]:
        entry = pattern.chunks(outline.layer[0])  # as the next ranks begin with them
        weaver = _Weaver(short, pattern.tiles, part.narrows, () if part.begins else entry)
        _weave(weaver, pattern)
        if not part.ends:
            weaver.send(entry)
        return weaver.issues

    before = outline.before if part.begins else ()
    return folded(replace(outline, before=before, after=(), layers=part.layers), issue)


def issued(outline: Outline, pattern: Pattern) -> list[Issue]:
    """Stage after stage, chunk after chunk, each chunk's collective right behind its computation.

    A chunk waits for those collectives of the stages before that hold its rows, and for nothing else: so the
    collective of the last chunks travels while the next stage computes the first ones. With `ahead`, one chunk is
    in attention while another is in the MLP, so that long and short computations alternate: what travels behind a
    short one need not wait for the next stage.
    """
    return _weave((_ScatteringWeaver if pattern.scattered else _Weaver)(outline, pattern.tiles), pattern).issues


def _weave(weaver: _Weaver, pattern: Pattern) -> _Weaver:
    stages = weaver.outline.stages
    work = [
        (index, number, rows)  # place of the stage, of the chunk
        for index, stage in enumerate(stages)
        for number, rows in enumerate(pattern.chunks(stage))
    ]
    if pattern.ahead:  # the head runs once, after everything
        work.sort(key=lambda entry: (stages[entry[0]].collective is Kind.GATHER, entry[0] + entry[1], -entry[1]))
    for index, _, rows in work:
        weaver.chunk(index, rows)
    return weaver


class _Weaver:
    """Issues steps and remembers which collectives a later stage has to wait for. `narrows`: rows that nobody wants
    stop here; `arriving`: rows that are sent here, by steps that are issued elsewhere and stand first."""

    def __init__(
        self, outline: Outline, tiles: Sequence[Sequence[int]], narrows: bool = True, arriving: Sequence[Rows] = ()
    ) -> None:  # fmt: skip
        self.outline = outline
        self.issues: list[Issue] = []
        self._narrow_from = outline.narrow_from if narrows else len(outline.stages)
        self._tiles = {Rows(edges[0], edges[-1]): [Rows(*pair) for pair in pairwise(edges)] for edges in tiles}
        self._sums: dict[int, list[tuple[int, Rows]]] = {}  # by stage: what brings its contribution, with the rows
        for rows in arriving:
            self._summed(BEFORE, len(self.issues), rows)
            self.issues.append(Issue(Kind.SEND, "", None, rows))

    def chunk(self, place: int, rows: Rows) -> None:
        """One chunk of a stage."""
        since = self.outline.input_until(place - 1) + 1 if place else BEFORE  # the stage before waited for the others
        after = self._brought(range(since, self.outline.input_until(place) + 1), rows)
        stage = self.outline.stages[place]
        if stage.collective is not Kind.REDUCE or stage.aside or rows not in self._tiles:
            self._issue(Kind.COMPUTE, place, rows, *after)
            self._collective(place, rows)
            return
        self._issue(Kind.BODY, place, rows, *after)
        for tile in self._tiles[rows]:
            self._issue(Kind.TAIL, place, tile)
            self._collective(place, tile)

    def send(self, chunks: Sequence[Rows]) -> None:
        """All that came to these rows, on to other ranks."""
        last = len(self.outline.stages) - 1
        since = self.outline.input_until(last) + 1  # the last stage waited for the others
        for rows in chunks:
            self._issue(Kind.SEND, last, rows, *self._brought(range(since, last + 1), rows))

    def _brought(self, stages: range, rows: Rows) -> list[int]:
        """What brings these stages' contributions to some rows."""
        return [index for stage in stages for index, there in self._sums.get(stage, ()) if there.intersects(rows)]

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
