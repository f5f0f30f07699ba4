"""Random legal programs: any cuts, any tiles, any order of issue that the rules allow, sums whole or scattered, on any
lane, by any algorithm, of all rows or of the wanted ones at the end, on all ranks or on one group after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st

from weft.program.batch import Batch, Rows, Segment
from weft.program.fold import Issue, plain
from weft.program.stages import Kind, Outline, Stage
from weft.program.steps import Program

SEGMENTS = (
    Segment(0, 0, 13), Segment(3, 0, 10, wanted=10, pooled=True), Segment(1, 0, 1), Segment(2, 0, 16, wanted=3),
)  # fmt: skip
TOKENS = 40
LANES, WIRES, ALGORITHMS = ("", "", "network2"), ("", "exact"), ("", "", "one-shot", "two-shot", "star", "hierarchical")


@st.composite
def legal_programs(draw: st.DrawFn, outline: Outline, groups: Sequence[tuple[int, ...]] = ((),)) -> Program:
    """Draws chunks for every stage, then issues whatever may come next in any order. Several `groups` of ranks have
    some of the stages each, in this order."""
    return _Drawn(draw, outline, groups).program()


class _Drawn:
    """Stages by their places. `spread`: the pieces that each rank has its part of, in the stages from `scatters_from`
    on. `narrow`: the stage from which on only wanted rows leave. `firsts`: of each group of ranks but the first one,
    the stage that it begins with."""

    def __init__(self, draw: st.DrawFn, outline: Outline, groups: Sequence[tuple[int, ...]]) -> None:
        self.draw, self.outline, self.stages, self.groups = draw, outline, outline.stages, groups
        self.firsts = self._firsts()
        reducing = [place for place, stage in enumerate(self.stages) if stage.collective is Kind.REDUCE]
        scattering = [place for place in reducing if place >= max(self.firsts, default=0)]  # rows then stay there
        never = [len(self.stages)] * 2
        self.scatters_from = draw(st.sampled_from(scattering + never if outline.scatters else never))
        scatters = self.scatters_from < len(self.stages)
        self.narrow = (
            len(self.stages) - 1 if scatters else draw(st.sampled_from(range(outline.narrow_from, len(self.stages))))
        )
        whole = Rows(0, TOKENS)
        self.spread = self._chunks(whole, 4)
        self.todo = [
            [whole] if stage.collective is Kind.GATHER else self._pieces(place, whole, 4)
            for place, stage in enumerate(self.stages)
        ]
        self.issues: list[Issue] = []
        self.issuable: list[tuple[Kind, int, Rows]] = []  # tails, collectives and enters
        self.there: list[list[int]] = [[] for _ in self.stages]  # steps that bring a stage's contribution

    def _firsts(self) -> list[int]:
        places, few = range(1, len(self.stages)), len(self.groups) - 1
        return sorted(self.draw(st.sets(st.sampled_from(places), min_size=few, max_size=few))) if few else []

    def _ranks(self, place: int) -> tuple[int, ...]:
        """Those that have a stage."""
        return self.groups[sum(first <= place for first in self.firsts)]

    def program(self) -> Program:
        while any(self.todo) or self.issuable:
            ready = [(Kind.COMPUTE, place, rows) for place in range(len(self.stages)) for rows in self._ready(place)]
            choice = self.draw(st.sampled_from(ready + self.issuable))
            if choice in self.issuable:
                self.issuable.remove(choice)
            self._issue(*choice)
        return plain(self.issues)

    def _issue(self, kind: Kind, place: int, rows: Rows) -> None:
        if kind is Kind.COMPUTE:
            self._compute(place, rows)
        elif kind is Kind.TAIL:
            self._add(kind, place, rows)
            self._collectives(place, rows)
        elif kind is Kind.SEND:
            brought = [index for index in self.there[place] if self.issues[index].rows.intersects(rows)]
            for index in brought:
                self.there[place].remove(index)
            self.there[place].append(self._add(kind, place, rows, *brought))
        elif kind is Kind.ENTER:
            scattered = next(
                index for index, issue in enumerate(self.issues)
                if (issue.kind, issue.rows) == (Kind.REDUCE_SCATTER, rows) and self._at(issue) == place - 1
            )  # fmt: skip
            self._add(kind, place, rows, scattered)
            self.issuable.append((Kind.ALL_GATHER, place, rows))
        else:
            self._collective(kind, place, rows)

    def _add(self, kind: Kind, place: int, rows: Rows, *after: int) -> int:
        stage, travels = self.stages[place], kind.lane == "network"
        leaves = place - 1 if kind in (Kind.ENTER, Kind.ALL_GATHER) else place
        lane = self.draw(st.sampled_from(LANES)) if travels else ""
        wire = self.draw(st.sampled_from(WIRES)) if travels and kind is not Kind.GATHER else ""
        algorithm = self.draw(st.sampled_from(ALGORITHMS)) if kind is Kind.REDUCE else ""
        ranks, to = self._ranks(place), self._ranks(place + 1) if kind is Kind.SEND else ()
        issue = Issue(
            kind, stage.part, stage.layer, rows, after, leaves >= self.narrow, lane, wire, algorithm,
            () if kind is Kind.GATHER else ranks, to,
        )  # fmt: skip
        self.issues.append(issue)
        return len(self.issues) - 1

    def _at(self, issue: Issue) -> int:
        place = self.outline.place(issue.part, issue.layer)
        assert place is not None
        return place

    def _compute(self, place: int, rows: Rows) -> None:
        self.todo[place].remove(rows)
        after = [index for index in self._brings(place) if self.issues[index].rows.intersects(rows)]
        if self.stages[place].collective is Kind.REDUCE and self.draw(st.booleans()):
            self._add(Kind.BODY, place, rows, *after)
            self.issuable += [(Kind.TAIL, place, tile) for tile in self._pieces(place, rows, 3)]
            return
        index = self._add(Kind.COMPUTE, place, rows, *after)
        self._collectives(place, rows)
        if self.stages[place].collective is None and place + 1 in self.firsts:
            self.there[place].append(index)
            self.issuable.append((Kind.SEND, place, rows))

    def _brings(self, place: int) -> list[int]:
        """Steps that bring what a stage reads: what came before these was awaited by the stages that left it."""
        until = self.outline.input_until(place)
        mine = [before for before in (until - 1, until) if before >= 0 and self._ranks(before) == self._ranks(place)]
        return [index for before in {*mine, until} if before >= 0 for index in self.there[before]]

    def _collectives(self, place: int, rows: Rows) -> None:
        """What may travel once a partial of these rows is there."""
        stage = self.stages[place]
        if stage.collective is Kind.GATHER:
            self.issuable.append((Kind.GATHER, place, rows))
        elif stage.collective is Kind.REDUCE and self._scatters(place):
            self.issuable += [(Kind.REDUCE_SCATTER, place, piece) for piece in self.spread if rows.contains(piece)]
        elif stage.collective is Kind.REDUCE:
            self.issuable += [(Kind.REDUCE, place, piece) for piece in self._chunks(rows, 2)]

    def _collective(self, kind: Kind, place: int, rows: Rows) -> None:
        index = self._add(kind, place, rows)
        if kind is Kind.REDUCE_SCATTER:
            self.issuable.append((Kind.ENTER, place + 1, rows))
        else:
            self.there[place - 1 if kind is Kind.ALL_GATHER else place].append(index)
        if kind is Kind.REDUCE and place + 1 in self.firsts:
            self.issuable.append((Kind.SEND, place, rows))

    def _scatters(self, place: int) -> bool:
        return place >= self.scatters_from

    def _pieces(self, place: int, rows: Rows, most: int) -> list[Rows]:
        """Some chunks; where sums are scattered, of whole pieces of what is spread."""
        if not self._scatters(place):
            return self._chunks(rows, most)
        edges = [piece.start for piece in self.spread if rows.start < piece.start < rows.stop]
        return _between(rows, self.draw(st.sets(st.sampled_from(edges))) if edges else set())

    def _chunks(self, rows: Rows, most: int) -> list[Rows]:
        if rows.length == 1:
            return [rows]
        return _between(rows, self.draw(st.sets(st.integers(rows.start + 1, rows.stop - 1), max_size=most - 1)))

    def _ready(self, place: int) -> list[Rows]:
        """Chunks whose inputs have been issued; in ordered stages only the first of what is left of a sequence."""
        left = self.todo[place]
        return [
            rows for rows in left
            if self._input_there(place, rows) and not (self.stages[place].ordered and _follows_another(rows, left))
        ]  # fmt: skip

    def _input_there(self, place: int, rows: Rows) -> bool:
        until = self.outline.input_until(place)
        unread = any(
            left.intersects(rows)
            for before in range(place)
            if before == self.narrow or self.outline.input_until(before) < until
            for left in self.todo[before]
        )
        return not unread and all(self._came(before, rows) for before in range(until + 1))

    def _came(self, place: int, rows: Rows) -> bool:
        sends = place + 1 in self.firsts
        if self.stages[place].collective is None and not sends:
            return not any(left.intersects(rows) for left in self.todo[place])
        there = [self.issues[index] for index in self.there[place]]
        return sum(each.rows.clip(rows).length for each in there if each.to or not sends) == rows.length


def lagging(outline: Outline, *lags: int) -> Outline:
    """The same model, with layers' stages that go without so many of the sums before them."""
    stages = tuple(
        Stage(stage.part, stage.collective, stage.ordered, lag) for stage, lag in zip(outline.layer, lags, strict=True)
    )
    return Outline(outline.before, stages, outline.after, outline.layers)


def _between(rows: Rows, inside: set[int]) -> list[Rows]:
    return [Rows(a, b) for a, b in pairwise([rows.start, *sorted(inside), rows.stop])]


def _follows_another(rows: Rows, left: list[Rows]) -> bool:
    return any(
        other.start < rows.start and other.intersects(span) and rows.intersects(span)
        for other in left
        for span in Batch(SEGMENTS).spans
    )
