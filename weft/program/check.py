"""Legality: is a program sure to give what `serial` gives, on every rank, without hanging?

Knows stages, rows and lanes. A program passes if every row goes through every stage once, nothing is read before
it is there, and chunks of one sequence keep their order in stages that are ordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.program.batch import Batch, Rows
from weft.program.steps import Kind, Lane, Program, ProgramError, Stage, Step


@dataclass
class _Progress:
    """What has been issued of one stage so far."""

    entered: list[Rows] = field(default_factory=list)  # each rank its part
    gathered: list[tuple[Rows, int]] = field(default_factory=list)  # input, with the all_gather's place on its lane
    started: list[Rows] = field(default_factory=list)  # by compute or body
    bodies: list[Rows] = field(default_factory=list)
    partials: list[Rows] = field(default_factory=list)  # by compute or tail
    collected: list[tuple[Rows, int]] = field(default_factory=list)  # with the collective's place on its lane


def check(program: Program, stages: Sequence[Stage], batch: Batch) -> None:
    """Raises `ProgramError`, naming the step, if the program must not run for this batch."""
    _Checker(stages, batch).run(program)


class _Checker:
    def __init__(self, stages: Sequence[Stage], batch: Batch) -> None:
        self.batch = batch
        self.whole = Rows(0, batch.tokens)
        self.stages = {stage.name: stage for stage in stages}
        names = [stage.name for stage in stages]
        self.before = dict(zip(names[1:], stages, strict=False))
        self.progress = {name: _Progress() for name in names}
        self.network: dict[int, int] = {}  # step index -> place on the network lane
        # Rows whose residual stream each rank has its part of only: from their first reduce_scatter on.
        self.spread: list[Rows] = []
        # Both lanes run in order, so one number says all that the compute lane knows to have arrived.
        self.arrived = -1

    def run(self, program: Program) -> None:
        for index, step in enumerate(program):
            if step.stage not in self.stages:
                raise ProgramError(f"{step.name!r}: no such stage in this model")
            if not self.whole.contains(step.rows):
                raise ProgramError(f"{step.name!r}: the batch has only the rows {self.whole}")
            in_parts = step.kind in (Kind.ENTER, Kind.ALL_GATHER)
            if self.stages[step.stage].collective is Kind.GATHER and step.rows != self.whole and not in_parts:
                raise ProgramError(f"{step.name!r}: this stage runs once, for the rows {self.whole}")
            if any(edge >= index for edge in step.after):
                raise ProgramError(f"{step.name!r}: waits for a step that is issued later")
            self._step(index, step)
        for name in self.stages:
            self._complete(name)

    def _step(self, index: int, step: Step) -> None:
        if step.lane is Lane.NETWORK:
            self._collective(index, step)
            return
        waited = [self.network[edge] for edge in step.after if edge in self.network]
        self.arrived = max([self.arrived, *waited])
        match step.kind:
            case Kind.ENTER:
                self._enter(step)
            case Kind.TAIL:
                self._tail(step)
            case _:
                self._compute(step)

    def _compute(self, step: Step) -> None:
        stage, progress = self.stages[step.stage], self.progress[step.stage]
        _once(progress.started, step)
        if step.kind is Kind.BODY and stage.collective is not Kind.REDUCE:
            raise ProgramError(f"{step.name!r}: only a stage that ends in a reduce has a tail")
        if progress.entered or any(rows.intersects(step.rows) for rows in self.spread):
            self._input_gathered(step)
        else:
            self._sums_arrived(step)
        if stage.ordered:
            self._keeps_order(step, progress.started)
        progress.started.append(step.rows)
        if step.kind is Kind.BODY:
            progress.bodies.append(step.rows)
        else:
            progress.partials.append(step.rows)

    def _tail(self, step: Step) -> None:
        progress = self.progress[step.stage]
        if not any(body.contains(step.rows) for body in progress.bodies):
            raise ProgramError(f"{step.name!r}: no body of these rows was issued before")
        _once(progress.partials, step)
        progress.partials.append(step.rows)

    def _enter(self, step: Step) -> None:
        progress = self.progress[step.stage]
        _once(progress.entered, step)
        if progress.started and not progress.gathered:
            raise ProgramError(f"{step.name!r}: {step.stage} was computed without an all_gather before")
        if step.rows not in self.spread:
            raise ProgramError(f"{step.name!r}: no reduce_scatter of just these rows was issued before")
        self._sums_arrived(step)
        progress.entered.append(step.rows)

    def _collective(self, index: int, step: Step) -> None:
        progress = self.progress[step.stage]
        self.network[index] = len(self.network)
        if step.kind is Kind.ALL_GATHER:
            if step.rows not in progress.entered:
                raise ProgramError(f"{step.name!r}: no enter of just these rows was issued before")
            _once([rows for rows, _ in progress.gathered], step)
            progress.gathered.append((step.rows, self.network[index]))
            return
        self._may_end_in(step)
        if not any(partial.contains(step.rows) for partial in progress.partials):
            raise ProgramError(f"{step.name!r}: no single partial holds these rows yet")
        _once([rows for rows, _ in progress.collected], step)
        progress.collected.append((step.rows, self.network[index]))

    def _may_end_in(self, step: Step) -> None:
        """The stage ends in this collective, and rows that are spread over the ranks stay spread alike."""
        collective = self.stages[step.stage].collective
        scatters = step.kind is Kind.REDUCE_SCATTER
        if collective is not (Kind.REDUCE if scatters else step.kind):
            raise ProgramError(f"{step.name!r}: this stage ends in {collective or 'no collective'}")
        if step.kind is Kind.GATHER:
            return
        spread = [rows for rows in self.spread if rows.intersects(step.rows)]
        if spread and not (scatters and spread == [step.rows]):
            raise ProgramError(f"{step.name!r}: since a reduce_scatter, each rank has its part of the rows {spread[0]}")
        if scatters and not spread:
            self.spread.append(step.rows)

    def _sums_arrived(self, step: Step) -> None:
        before = self.before.get(step.stage)
        if before is None:
            return
        progress = self.progress[before.name]
        if before.collective is None:
            there = progress.partials
        else:
            there = [rows for rows, place in progress.collected if place <= self.arrived]
        if _covered(there, step.rows) < step.rows.length:
            raise ProgramError(f"{step.name!r}: not after everything that {before.name} leaves in its rows")

    def _input_gathered(self, step: Step) -> None:
        there = [rows for rows, place in self.progress[step.stage].gathered if place <= self.arrived]
        if _covered(there, step.rows) < step.rows.length:
            raise ProgramError(f"{step.name!r}: not after an all_gather of everything in its rows")

    def _keeps_order(self, step: Step, started: list[Rows]) -> None:
        for _, rows in self.batch.within(step.rows):
            span = next(span for span in self.batch.spans if span.contains(rows))
            earlier = Rows(span.start, rows.start)
            if _covered(started, earlier) < earlier.length:
                raise ProgramError(f"{step.name!r}: earlier rows of the same sequence ({earlier}) come later")

    def _complete(self, name: str) -> None:
        progress, stage = self.progress[name], self.stages[name]
        done = [rows for rows, _ in progress.collected] if stage.collective else progress.partials
        if _covered(done, self.whole) < self.whole.length:
            raise ProgramError(f"{name}: not all of the rows {self.whole} go through it")


def _once(done: list[Rows], step: Step) -> None:
    if any(rows.intersects(step.rows) for rows in done):
        raise ProgramError(f"{step.name!r}: some of these rows were done before")


def _covered(pieces: list[Rows], rows: Rows) -> int:
    """How many of `rows` are in one of the (disjoint) pieces."""
    return sum(piece.clip(rows).length for piece in pieces)
