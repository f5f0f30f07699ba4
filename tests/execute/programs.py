"""Random legal programs: any cuts, any tiles, any order of issue that the rules allow, sums whole or scattered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st

from weft.program.batch import Batch, Rows, Segment
from weft.program.steps import Kind, Program, Stage, Step

SEGMENTS = (Segment(0, 0, 23), Segment(1, 0, 1), Segment(2, 0, 16))
TOKENS = 40


@st.composite
def legal_programs(draw: st.DrawFn, stages: Sequence[Stage]) -> Program:
    """Draws chunks for every stage, then issues whatever may come next in any order."""
    return _Drawn(draw, stages).program()


class _Drawn:
    """`spread`: the pieces that each rank has its part of, in the stages from `scatters_from` on."""

    def __init__(self, draw: st.DrawFn, stages: Sequence[Stage]) -> None:
        self.draw, self.stages = draw, list(stages)
        reducing = [i for i, stage in enumerate(stages) if stage.collective is Kind.REDUCE]
        self.scatters_from = draw(st.sampled_from([*reducing, len(stages), len(stages)]))
        whole = Rows(0, TOKENS)
        self.spread = self._chunks(whole, 4)
        self.todo = {
            stage.name: [whole] if stage.collective is Kind.GATHER else self._pieces(stage, whole, 4)
            for stage in stages
        }
        self.steps: list[Step] = []
        self.issuable: list[tuple[Kind, Stage, Rows]] = []  # tails, collectives and enters
        self.there: dict[str, list[int]] = {stage.name: [] for stage in stages}  # steps that bring a stage's input

    def program(self) -> Program:
        while any(self.todo.values()) or self.issuable:
            ready = [(Kind.COMPUTE, stage, rows) for stage in self.stages for rows in self._ready(stage)]
            choice = self.draw(st.sampled_from(ready + self.issuable))
            if choice in self.issuable:
                self.issuable.remove(choice)
            self._issue(*choice)
        return Program(tuple(self.steps))

    def _issue(self, kind: Kind, stage: Stage, rows: Rows) -> None:
        if kind is Kind.COMPUTE:
            self._compute(stage, rows)
        elif kind is Kind.TAIL:
            self.steps.append(Step(kind, stage.name, rows))
            self._collectives(stage, rows)
        elif kind is Kind.ENTER:
            before = self.stages[self.stages.index(stage) - 1]
            scattered = self.steps.index(Step(Kind.REDUCE_SCATTER, before.name, rows))
            self.steps.append(Step(kind, stage.name, rows, (scattered,)))
            self.issuable.append((Kind.ALL_GATHER, stage, rows))
        else:
            self._collective(kind, stage, rows)

    def _compute(self, stage: Stage, rows: Rows) -> None:
        self.todo[stage.name].remove(rows)
        after = tuple(i for i in self.there[stage.name] if self.steps[i].rows.intersects(rows))
        if stage.collective is Kind.REDUCE and self.draw(st.booleans()):
            self.steps.append(Step(Kind.BODY, stage.name, rows, after))
            self.issuable += [(Kind.TAIL, stage, tile) for tile in self._pieces(stage, rows, 3)]
            return
        self.steps.append(Step(Kind.COMPUTE, stage.name, rows, after))
        self._collectives(stage, rows)

    def _collectives(self, stage: Stage, rows: Rows) -> None:
        """What may travel once a partial of these rows is there."""
        if stage.collective is Kind.GATHER:
            self.issuable.append((Kind.GATHER, stage, rows))
        elif stage.collective is Kind.REDUCE and self._scatters(stage):
            self.issuable += [(Kind.REDUCE_SCATTER, stage, piece) for piece in self.spread if rows.contains(piece)]
        elif stage.collective is Kind.REDUCE:
            self.issuable += [(Kind.REDUCE, stage, piece) for piece in self._chunks(rows, 2)]

    def _collective(self, kind: Kind, stage: Stage, rows: Rows) -> None:
        self.steps.append(Step(kind, stage.name, rows))
        following = self.stages[self.stages.index(stage) + 1 :]
        if kind is Kind.REDUCE_SCATTER:
            self.issuable.append((Kind.ENTER, following[0], rows))
        elif kind is Kind.ALL_GATHER:
            self.there[stage.name].append(len(self.steps) - 1)
        elif following:
            self.there[following[0].name].append(len(self.steps) - 1)

    def _scatters(self, stage: Stage) -> bool:
        return self.stages.index(stage) >= self.scatters_from

    def _pieces(self, stage: Stage, rows: Rows, most: int) -> list[Rows]:
        """Some chunks; where sums are scattered, of whole pieces of what is spread."""
        if not self._scatters(stage):
            return self._chunks(rows, most)
        edges = [piece.start for piece in self.spread if rows.start < piece.start < rows.stop]
        return _between(rows, self.draw(st.sets(st.sampled_from(edges))) if edges else set())

    def _chunks(self, rows: Rows, most: int) -> list[Rows]:
        if rows.length == 1:
            return [rows]
        return _between(rows, self.draw(st.sets(st.integers(rows.start + 1, rows.stop - 1), max_size=most - 1)))

    def _ready(self, stage: Stage) -> list[Rows]:
        """Chunks whose inputs have been issued; in ordered stages only the first of what is left of a sequence."""
        left = self.todo[stage.name]
        return [
            rows for rows in left
            if self._input_there(stage, rows) and not (stage.ordered and _follows_another(rows, left))
        ]  # fmt: skip

    def _input_there(self, stage: Stage, rows: Rows) -> bool:
        index = self.stages.index(stage)
        if index == 0:
            return True
        before = self.stages[index - 1]
        if before.collective is None:
            return not any(left.intersects(rows) for left in self.todo[before.name])
        return sum(self.steps[i].rows.clip(rows).length for i in self.there[stage.name]) == rows.length


def _between(rows: Rows, inside: set[int]) -> list[Rows]:
    return [Rows(a, b) for a, b in pairwise([rows.start, *sorted(inside), rows.stop])]


def _follows_another(rows: Rows, left: list[Rows]) -> bool:
    return any(
        other.start < rows.start and other.intersects(span) and rows.intersects(span)
        for other in left
        for span in Batch(SEGMENTS).spans
    )
