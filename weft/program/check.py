"""Legality: is a program sure to give what `serial` gives, on every rank, without hanging?

Knows stages, rows and lanes. A program passes if every row goes through every stage once, nothing is read before
it is there, and chunks of one sequence keep their order in stages that are ordered. Of rounds that repeat, as many are
looked at as it takes until one leaves everything as the one before it did: the rest of them are then proven too. Where
steps are for some ranks only, this is proven of each rank's own steps, and of all together what divided.py says.

No wait is for ever: edges lead back, to steps of the same ranks, and each lane runs in issue order on all of them, so
the first step that has not ended can always go on. As that order is one for all ranks, so is that of their exchanges.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import Any

from weft.program.batch import Batch, Rows, Segment
from weft.program.divided import demand_ranks, demand_whole, representatives
from weft.program.progress import Arrival, Progress, covered, once
from weft.program.stages import ALGORITHMS, COLLECTIVES, COMPUTE, ROWS_TRAVEL, Kind, Outline, Stage
from weft.program.steps import Block, Form, Issued, Program, ProgramError
from weft.wires import WIRES

PROVEN = 256  # of which it is remembered
REMEMBERED = 24  # unfinished stages, up to which rounds are compared


def check(program: Program, outline: Outline, batch: Batch, world: int = 1) -> None:
    """Raises `ProgramError`, naming the step, if the program must not run for this batch on `world` ranks."""
    offsets, chunks = program.offsets, program.form.chunks
    if not program.form.blocks or list(offsets) != sorted({0, *offsets}):
        raise ProgramError("the program has no steps, or its rows don't begin with the batch's first")
    if any(not 0 <= first < last < len(offsets) for first, last in chunks) or any(
        step.chunk not in range(len(chunks)) for block in program.form.blocks for step in block.steps
    ):
        raise ProgramError("a chunk lies between offsets that the program doesn't have")
    if program.offsets[0] == 0 and program.offsets[-1] == batch.tokens:
        ends = [span.stop for span in batch.spans]
        number = {offset: place for place, offset in enumerate(sorted({*program.offsets, *ends}))}
        with suppress(ProgramError):  # the same is said again below, with the batch's rows
            numbered = (tuple([number[at] for at in each]) for each in (program.offsets, ends))
            _prove(program.form, outline, *numbered, world)
            return
    _demand_legal(program, outline, batch, world)


@lru_cache(maxsize=PROVEN)
def _prove(form: Form, outline: Outline, offsets: tuple[int, ...], ends: tuple[int, ...], world: int) -> None:
    """Legality depends on the order of offsets and sequences' ends alone, so that it is proven once for all batches in
    which they come in the same order. Raises `ProgramError`."""
    segments = tuple(Segment(slot, 0, stop - start) for slot, (start, stop) in enumerate(pairwise((0, *ends))))
    _demand_legal(Program(form, offsets), outline, Batch(segments), world)


def _demand_legal(program: Program, outline: Outline, batch: Batch, world: int) -> None:
    """On all ranks; those that run the same steps are alike."""
    demand_ranks(program.form, world)
    if not program.form.ranks:
        _Checker(program, outline, batch, 0).run()
        return
    for rank in representatives(program.form, world):
        try:
            _Checker(program, outline, batch, rank).run()
        except ProgramError as error:
            raise ProgramError(f"on rank {rank}: {error}") from None
    demand_whole(program, outline, Rows(0, batch.tokens), world)


class _Checker:
    """The steps of one rank.

    `first`: the first stage of which something is still to come; those before it are complete, and forgotten.

    `places`: how many steps each lane has. `network`: of each collective its lane and place, by its place in issue
    order. `arrived`: on each lane, the place up to which the compute lane knows that all has ended: lanes run in order,
    so one number says that. `spread`: rows whose residual stream each rank has its part of only. `gone`: rows with
    which other ranks go on.
    """

    def __init__(self, program: Program, outline: Outline, batch: Batch, rank: int) -> None:
        self.program, self.outline, self.batch, self.rank = program, outline, batch, rank
        self.whole = Rows(0, batch.tokens)
        self.first = self.index = 0
        self.progress: dict[int, Progress] = {}
        self.places = dict.fromkeys(program.form.lanes, 0)
        self.arrived = dict.fromkeys(program.form.lanes, -1)
        self.network: dict[int, tuple[str, int]] = {}
        self.spread: list[Rows] = []
        self.gone: list[Rows] = []
        self.narrow = self._narrow()

    def _narrow(self) -> int:
        """The place of the first stage that leaves wanted rows only: the last one at the latest. Raises if a later one
        would miss the others."""
        stages = self.outline.stages
        narrow = min((self._left(each) for each in self._ends() if each.step.wanted), default=len(stages) - 1)
        for issued in self._ends():
            place = self._place(issued)
            if issued.step.wanted != (self._left(issued) >= narrow):
                raise ProgramError(
                    f"{issued.name!r}: from {stages[narrow].name} on, all steps are about wanted rows only"
                )
            if place > narrow and stages[place].ordered:
                raise ProgramError(f"{issued.name!r}: this stage remembers all rows, but only wanted ones come to it")
        return narrow

    def _ends(self) -> Iterable[Issued]:
        """The steps of every block's first and last round."""
        for block in self.program.form.blocks:
            for number in {0, block.rounds - 1}:
                for step in block.steps:
                    later = step.later(number * block.layers)
                    yield Issued(0, later, later.layer, self._rows(step.chunk))

    def _rows(self, chunk: int) -> Rows:
        return self.program.rows[chunk]

    def _place(self, issued: Issued) -> int:
        place = self.outline.place(issued.step.part, issued.layer)
        if place is None:
            raise ProgramError(f"{issued.name!r}: no such stage in this model")
        return place

    def _left(self, issued: Issued) -> int:
        """The place of the stage whose rows these are, as they leave it."""
        place = self._place(issued)
        return place - 1 if issued.kind in (Kind.ENTER, Kind.ALL_GATHER) else place

    def run(self) -> None:
        for block in self.program.form.blocks:
            self._block(block)
        for place in range(self.first, len(self.outline.stages)):
            if not self._complete(place) and not (self.program.form.ranks and self._complete_here(place)):
                name = self.outline.stages[place].name
                raise ProgramError(f"{name}: not all of the rows {self.whole} go through it")

    def _block(self, block: Block) -> None:
        """All rounds, or as many as tell of the others."""
        before, places = None, dict(self.places)
        for number in range(block.rounds):
            for step in block.steps:
                layer = None if step.layer is None else step.layer + number * block.layers
                if step.concerns(self.rank):
                    self._step(Issued(self.index, step, layer, self._rows(step.chunk)))
                self.index += 1
            if len(self.progress) > REMEMBERED:  # of pieces that flow, no round is like another
                continue
            if before == (now := self._state(block, number)):
                taken = {lane: place - places[lane] for lane, place in self.places.items()}
                self._skip(block, block.rounds - 1 - number, taken)
                return
            before, places = now, dict(self.places)

    def _state(self, block: Block, number: int) -> Any:
        """All that later steps depend on, as seen from the end of a round."""
        passed = number * block.layers * len(self.outline.layer)
        stages = {place - passed: progress.since(self.places) for place, progress in self.progress.items()}
        arrived = {lane: place - self.places[lane] for lane, place in self.arrived.items()}
        edges = [
            (lane, place - self.places[lane])
            for lane, place in (self.network.get(self.index - back, ("", 0)) for back in range(1, block.reach + 1))
            if lane
        ]
        return self.first - passed, stages, arrived, edges, self.spread[:], self.gone[:]

    def _skip(self, block: Block, rounds: int, taken: dict[str, int]) -> None:
        """As if so many more rounds had been issued, with the steps that one takes on each lane."""
        steps, stages = rounds * len(block.steps), rounds * block.layers * len(self.outline.layer)
        places = {lane: rounds * count for lane, count in taken.items()}
        self.index += steps
        self.first += stages
        self.progress = {place + stages: progress for place, progress in self.progress.items()}
        for progress in self.progress.values():
            progress.moved(places)
        self.network = {i + steps: (lane, place + places[lane]) for i, (lane, place) in self.network.items()}
        for each in (self.places, self.arrived):
            each.update({lane: place + places[lane] for lane, place in each.items()})

    def _demand_sound(self, step: Issued, place: int, stage: Stage) -> None:
        """What each step must be by itself."""
        if not self.whole.contains(step.rows):
            raise ProgramError(f"{step.name!r}: the batch has only the rows {self.whole}")
        in_parts = step.kind in (Kind.ENTER, Kind.ALL_GATHER)
        if stage.collective is Kind.GATHER and step.rows != self.whole and not in_parts:
            raise ProgramError(f"{step.name!r}: this stage runs once, for the rows {self.whole}")
        if any(edge < 0 or edge >= step.number for edge in step.after):
            raise ProgramError(f"{step.name!r}: waits for a step that is issued later, or before the first one")
        if (step.lane == COMPUTE) == (step.kind in COLLECTIVES):
            raise ProgramError(f"{step.name!r}: computation runs on the compute lane, and collectives on another")
        self._demand_way(step)
        if place < self.first:
            raise ProgramError(f"{step.name!r}: some of these rows were done before")

    def _demand_way(self, step: Issued) -> None:
        """How it travels is known, and said only of what travels so."""
        wire, algorithm = step.step.wire, step.step.algorithm
        if wire not in ("", *WIRES) or algorithm not in ("", *ALGORITHMS):
            allowed = f"wires are {', '.join(WIRES)}; algorithms {', '.join(ALGORITHMS)}"
            raise ProgramError(f"{step.name!r}: travels in a way that is not known; {allowed}")
        if (wire and step.kind not in ROWS_TRAVEL) or (algorithm and step.kind is not Kind.REDUCE):
            raise ProgramError(f"{step.name!r}: a wire is a sum's or an all_gather's, an algorithm a reduce's")

    def _step(self, step: Issued) -> None:
        place = self._place(step)
        stage = self.outline.stages[place]
        self._demand_sound(step, place, stage)
        if step.kind in COLLECTIVES and step.kind is not Kind.SEND:
            self._collective(step, place, stage)
            return
        for edge in step.after:
            lane, at = self.network.get(edge, (COMPUTE, -1))
            self.arrived[lane] = max(self.arrived[lane], at)
        if any(rows.intersects(step.rows) for rows in self.gone):
            raise ProgramError(f"{step.name!r}: other ranks go on with some of these rows since a send")
        match step.kind:
            case Kind.SEND:
                self._send(step, place, stage)
            case Kind.ENTER:
                self._enter(step, place)
            case Kind.TAIL:
                self._tail(step, place)
            case _:
                self._compute(step, place, stage)

    def _of(self, place: int) -> Progress:
        return self.progress.setdefault(place, Progress())

    def _compute(self, step: Issued, place: int, stage: Stage) -> None:
        progress = self._of(place)
        once(progress.started, step)
        if step.kind is Kind.BODY and stage.collective is not Kind.REDUCE:
            raise ProgramError(f"{step.name!r}: only a stage that ends in a reduce has a tail")
        if progress.entered or any(rows.intersects(step.rows) for rows in self.spread):
            self._input_gathered(step, progress)
        else:
            self._sums_arrived(step, place)
        self._read_by_those_before(step, place)
        if stage.ordered:
            self._keeps_order(step, progress)
        progress.started.append(step.rows)
        (progress.bodies if step.kind is Kind.BODY else progress.partials).append(step.rows)
        self._forget()

    def _tail(self, step: Issued, place: int) -> None:
        progress = self._of(place)
        if not any(body.contains(step.rows) for body in progress.bodies):
            raise ProgramError(f"{step.name!r}: no body of these rows was issued before")
        once(progress.partials, step)
        progress.partials.append(step.rows)

    def _enter(self, step: Issued, place: int) -> None:
        progress = self._of(place)
        once(progress.entered, step)
        if progress.started and not progress.gathered:
            raise ProgramError(f"{step.name!r}: {step.stage} was computed without an all_gather before")
        if step.rows not in self.spread:
            raise ProgramError(f"{step.name!r}: no reduce_scatter of just these rows was issued before")
        self._sums_arrived(step, place)
        progress.entered.append(step.rows)

    def _send(self, step: Issued, place: int, stage: Stage) -> None:
        """The rank that sends has all that came to these rows; to one that receives, it comes from all those stages."""
        if place + 1 >= len(self.outline.stages) or stage.aside or self.outline.input_until(place + 1) != place:
            raise ProgramError(f"{step.name!r}: no stage reads all that came to these rows up to here, and goes on")
        if any(rows.intersects(step.rows) for rows in self.spread):
            raise ProgramError(f"{step.name!r}: since a reduce_scatter, each rank has its part of these rows only")
        at = self._number(step)
        if self.rank in step.step.ranks:
            self._sums_arrived(step, place + 1)
            self.gone.append(step.rows)
            return
        for before in range(self.first, place + 1):
            progress = self._of(before)
            once(progress.started, step)
            progress.receive(step.rows, step.lane, at)
        self._forget()

    def _number(self, step: Issued) -> int:
        """The place of a collective on its lane."""
        at = self.places[step.lane]
        self.network[step.number] = step.lane, at
        self.places[step.lane] += 1
        return at

    def _collective(self, step: Issued, place: int, stage: Stage) -> None:
        progress, at = self._of(place), self._number(step)
        if step.kind is Kind.GATHER and self.program.form.ranks and not progress.started:
            return  # this rank has no part of the vocabulary, and is told
        if step.kind is Kind.ALL_GATHER:
            if step.rows not in progress.entered:
                raise ProgramError(f"{step.name!r}: no enter of just these rows was issued before")
            once([rows for rows, _, _ in progress.gathered], step)
            progress.gathered.append((step.rows, step.lane, at))
            return
        self._may_end_in(step, stage)
        if not any(partial.contains(step.rows) for partial in progress.partials):
            raise ProgramError(f"{step.name!r}: no single partial holds these rows yet")
        once([rows for rows, _, _ in progress.collected], step)
        progress.collected.append((step.rows, step.lane, at))

    def _may_end_in(self, step: Issued, stage: Stage) -> None:
        """The stage ends in this collective, and rows that are spread over the ranks stay spread alike."""
        scatters = step.kind is Kind.REDUCE_SCATTER
        if stage.collective is not (Kind.REDUCE if scatters else step.kind):
            raise ProgramError(f"{step.name!r}: this stage ends in {stage.collective or 'no collective'}")
        if step.kind is Kind.GATHER:
            return
        if scatters and not self.outline.scatters:
            raise ProgramError(f"{step.name!r}: a stage of this model needs more, or less, than the sum before it")
        if scatters and self.narrow < len(self.outline.stages) - 1:
            raise ProgramError(f"{step.name!r}: wanted rows go on alone, but each rank has its part of all rows only")
        spread = [rows for rows in self.spread if rows.intersects(step.rows)]
        if spread and not (scatters and spread == [step.rows]):
            raise ProgramError(f"{step.name!r}: since a reduce_scatter, each rank has its part of the rows {spread[0]}")
        if scatters and not spread:
            self.spread.append(step.rows)

    def _sums_arrived(self, step: Issued, place: int) -> None:
        since = self.outline.input_until(place - 1) + 1 if self._begun(place - 1, step.rows) else 0
        for before in range(max(since, self.first), self.outline.input_until(place) + 1):
            there = self._left_by(before)
            if covered(there, step.rows) < step.rows.length:
                name = self.outline.stages[before].name
                raise ProgramError(f"{step.name!r}: not after everything that {name} leaves in its rows")

    def _begun(self, place: int, rows: Rows) -> bool:
        """A stage was computed here of all these rows: what it had to wait for need not be looked at once more."""
        progress = self.progress.get(place)
        if progress is None or not progress.started:
            return False
        here = progress.started
        if progress.received:
            here = [started for started in here if started not in progress.received]
        return covered(here, rows) == rows.length

    def _read_by_those_before(self, step: Issued, place: int) -> None:
        """There is one residual stream: what a stage reads is changed by no later one, and from where wanted rows go on
        alone, the others are not needed any more."""
        until, known = self.outline.input_until(place), self._begun(place - 1, step.rows)
        for before in range(place - 1, self.first - 1, -1):
            if known and self.outline.input_until(before) < self.outline.input_until(place - 1):
                return  # the stage before has looked at these
            changes = self.outline.input_until(before) < until or before == self.narrow
            if changes and covered(self._of(before).started, step.rows) < step.rows.length:
                name = self.outline.stages[before].name
                raise ProgramError(
                    f"{step.name!r}: {name} has not read all of these rows yet, and this would change them"
                )

    def _left_by(self, place: int) -> list[Rows]:
        """Rows whose contribution by a stage is known to be there."""
        progress = self._of(place)
        alone = progress.partials if self.outline.stages[place].collective is None else []
        return [*alone, *self._there(progress.collected)]

    def _there(self, arrivals: list[Arrival]) -> list[Rows]:
        return [rows for rows, lane, at in arrivals if at <= self.arrived[lane]]

    def _input_gathered(self, step: Issued, progress: Progress) -> None:
        if covered(self._there(progress.gathered), step.rows) < step.rows.length:
            raise ProgramError(f"{step.name!r}: not after an all_gather of everything in its rows")

    def _keeps_order(self, step: Issued, progress: Progress) -> None:
        started = progress.started
        if progress.received:  # what others store is not here
            started = [rows for rows in started if rows not in progress.received]
        for _, span, rows in self.batch.within(step.rows):
            earlier = Rows(span.start, rows.start)
            if earlier.length and covered(started, earlier) < earlier.length:
                raise ProgramError(f"{step.name!r}: earlier rows of the same sequence ({earlier}) come later")

    def _complete(self, place: int) -> bool:
        return covered(self._done(place), self.whole) == self.whole.length

    def _complete_here(self, place: int) -> bool:
        """What this rank has begun of it has ended."""
        done = self._done(place)
        return all(covered(done, rows) == rows.length for rows in self._of(place).started)

    def _done(self, place: int) -> list[Rows]:
        """Rows that have gone through a stage."""
        progress = self._of(place)
        alone = progress.partials if self.outline.stages[place].collective is None else []
        return [*alone, *(rows for rows, _, _ in progress.collected)]

    def _forget(self) -> None:
        """Stages that are complete, and whose contribution all rows of a later one have read."""
        while (reader := self.outline.readers[self.first]) is not None:
            read = self.progress[reader].started if reader in self.progress else []
            if not self._complete(self.first) or covered(read, self.whole) < self.whole.length:
                return
            self.progress.pop(self.first)
            self.first += 1
