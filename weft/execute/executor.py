"""Runs a program on one rank: walks its steps on the compute lane and hands collectives to the lanes that communicate.

Knows programs, the model's four functions and the group; knows no strategy by name. Every partial has a buffer of
its own, which nobody touches between its collective's submission and the wait for it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from weft.execute.draws import Slice
from weft.execute.held import HeldFeatures, HeldRows
from weft.execute.lanes import Lanes, Pending
from weft.execute.owed import Owed
from weft.execute.residual import Residual
from weft.execute.sampler import likeliest
from weft.model.decoder import Decoder, StageFunctions
from weft.model.forward import Extent, Forward
from weft.parallel.allreduce import all_gather, all_reduce, hand_over, reduce_scatter, shard, swap
from weft.parallel.codec import Codec, codec_named
from weft.parallel.group import Group
from weft.program.batch import Rows
from weft.program.stages import COLLECTIVES, COMPUTE, SUMS, Kind, Outline
from weft.program.steps import Form, Program, Step

FORMS = 64  # that are kept as the walk wants them


class Scope(StrEnum):
    """How much of a program to run: all of it, or one side alone (the two terms of the bound)."""

    BOTH = "both"
    COMPUTE = "compute"  # a rank's own partial stands in for the sum: same work, meaningless numbers
    NETWORK = "network"  # the same messages, with nothing computed
    BESIDE = "beside"  # that, on the threads which send beside a computation, and which never wait in a loop

    @property
    def computes(self) -> bool:
        """False where messages travel alone."""
        return self not in (Scope.NETWORK, Scope.BESIDE)


@dataclass(frozen=True)
class Result:
    """What one run left on this rank.

    `logits` [wanted rows, this rank's vocabulary]; `told`: of each rank, `sampler.likeliest` of its logits. `spans`:
    start and end of every step, in seconds of this machine's monotonic clock. `busy`: seconds of each lane.
    `checksums`: by number, of the steps after which all their ranks hold the same, if asked for. `pooled`: of each of
    the batch's pooled segments its rows' last hidden states [M] added up in float64, on the rank whose slice begins the
    vocabulary.
    """

    logits: Tensor | None
    told: list[Tensor]
    spans: list[tuple[float, float]]
    busy: dict[str, float]
    checksums: dict[int, int]
    pooled: list[Tensor]


class _PreparedStep(NamedTuple):
    """One of this rank's steps in a block's first round, the block's step number `at`. `place`: of its stage in that
    round; `grows`: by how much with each round. `urgent`: in a round that another one follows; `urgent_last`: in the
    last one."""

    at: int
    step: Step
    place: int
    grows: int
    urgent: bool
    urgent_last: bool


class _Prepared(NamedTuple):
    """A form as a rank's executor walks it: of each block how often its steps come, and all ranks' number of them.
    `narrow_from`: the place of the stage that wanted rows leave alone. `alone`: a partial is the sum already, where no
    other rank has a part of this one's stages; its steps are left out."""

    blocks: tuple[tuple[int, int, tuple[_PreparedStep, ...]], ...]
    narrow_from: int
    alone: bool


@lru_cache(maxsize=FORMS)
def prepare(outline: Outline, form: Form, rank: int, world: int) -> _Prepared:
    """Reads a form for a model and a rank."""
    blocks, narrow = [], len(outline.stages)
    alone = _sums_alone(form, rank, world)
    for block, (between, last) in zip(form.blocks, form.urgent(rank), strict=True):
        grows = block.layers * len(outline.layer)
        steps = []
        for at, (step, *urgent) in enumerate(zip(block.steps, between, last, strict=True)):
            place = outline.place(step.part, step.layer)
            assert place is not None, "a stage that this model hasn't: the program was not checked"
            if step.wanted and step.kind in (Kind.COMPUTE, Kind.BODY):
                narrow = min(narrow, place)
            if step.concerns(rank) and not (alone and step.kind is Kind.REDUCE):
                steps.append(_PreparedStep(at, step, place, 0 if step.layer is None else grows, *urgent))
        blocks.append((block.rounds, len(block.steps), tuple(steps)))
    return _Prepared(tuple(blocks), narrow, alone)


def _sums_alone(form: Form, rank: int, world: int) -> bool:
    """None of this rank's sums is over others too, nor on a lane with a send: who waits for a sum waits for that."""
    mine = [step for block in form.blocks for step in block.steps if step.concerns(rank)]
    sums, sending = [step for step in mine if step.kind in SUMS], {step.lane for step in mine if step.to}
    return all(s.kind is Kind.REDUCE and (len(s.ranks) or world) == 1 and s.lane not in sending for s in sums)


class _Now(NamedTuple):
    """The step that the walk has come to: its place in issue order, its stage's place in the model and functions."""

    number: int
    step: Step
    place: int
    stage: StageFunctions
    extent: Extent


class _Elsewhere:
    """A stage that other ranks have."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("a stage that this rank hasn't: the program is of another layout")


ELSEWHERE = cast(StageFunctions, _Elsewhere())


class Executor:
    """Runs programs of one model with one group and the lanes of one rank. `part`: what it has of the vocabulary."""

    def __init__(self, decoder: Decoder, outline: Outline, group: Group, lanes: Lanes, part: Slice) -> None:
        self.decoder, self.outline, self.group, self.lanes, self.part = decoder, outline, group, lanes, part
        self.stages = [decoder.stages.get((stage.part, stage.layer), ELSEWHERE) for stage in outline.stages]

    def groups(self, form: Form) -> dict[tuple[str, tuple[int, ...]], Group]:
        """For each lane that communicates, and the ranks that do it there: all (), or some. Ranks meet to make one, so
        each asks for all that it is in, in the same order, also where it has no step itself."""
        rank = self.group.rank
        return {(lane, some): self.group.on(lane, some) for lane, some in form.meetings if not some or rank in some}

    def run(
        self, program: Program, forward: Forward, codec: Codec, scope: Scope = Scope.BOTH, checksums: bool = False
    ) -> Result:  # fmt: skip
        """One forward pass. Raises what a step raised; the group is of no use then."""
        return _Pass(self, program, forward, codec, scope, checksums).all_steps()


class _Pass:
    """One run."""

    def __init__(
        self, owner: Executor, program: Program, forward: Forward, codec: Codec, scope: Scope, checksums: bool
    ) -> None:
        self.outline, self.stages, self.lanes = owner.outline, owner.stages, owner.lanes
        self.group, self.part, self.factor = owner.group, owner.part, owner.decoder.logit_factor
        self.groups = owner.groups(program.form)
        self.program, self.forward, self.codec, self.scope = program, forward, codec, scope
        self.prepared = prepare(owner.outline, program.form, owner.group.rank, owner.group.world)
        self.spans = [(0.0, 0.0)] * len(program)
        self.busy = dict.fromkeys(program.form.lanes, 0.0)
        self.checksums: dict[int, int] = {}
        self.with_checksums = checksums
        self.pending: dict[int, Pending] = {}
        self.latest: dict[str, Pending] = {}  # of each lane
        self.residual = Residual(owner.decoder, owner.outline, self.prepared.narrow_from, forward)
        wires = {step.wire for block in program.form.blocks for step in block.steps} - {""}
        self.owed = Owed(self.residual) if any(c.error for c in (codec, *map(codec_named, wires))) else None
        self.inputs, self.bodies, self.partials = HeldRows(), HeldFeatures(), HeldRows()
        self.headed: Tensor | None = None  # what came gathered to the output head, of all wanted rows
        self.logits: Tensor | None = None
        self.told: list[Tensor] = []

    def all_steps(self) -> Result:
        if not self.scope.computes:
            self.residual.commit()  # before the clock matters
        try:
            for now, urgent in self._steps():
                if now.step.to:
                    self._send(now, urgent)
                elif now.step.kind in COLLECTIVES:
                    self._collective(now, urgent)
                elif self.scope.computes:
                    self._compute(now)
        finally:
            for waiting in self.pending.values():
                waiting.wait()
        return Result(self.logits, self.told, self.spans, self.busy, self.checksums, self._pooled())

    def _pooled(self) -> list[Tensor]:
        batch = self.forward.batch
        if not (batch.pools and self.scope is Scope.BOTH and self.part.width and not self.part.first):
            return []
        head, every = self.stages[-1], Rows(0, batch.tokens)
        if self.headed is None and self.inputs.has(head, every):  # of which no row went through the head
            self.headed = self.residual.pick(self.inputs.take(head, every), every)
        if self.headed is None:
            extent = Extent(every, self.residual.wanted(every))
            self.headed = head.enter(self.forward, extent, self.residual.left())
        return [self.headed[rows.start : rows.stop].double().sum(dim=0) / self.factor for rows in batch.pooled_parts]

    def _steps(self) -> Iterator[tuple[_Now, bool]]:
        """All of them, with whether one is urgent."""
        number, stages = 0, self.stages
        whole = [Extent(rows, rows) for rows in self.program.rows]
        wanted = [Extent(rows, self.residual.wanted(rows)) for rows in self.program.rows]
        pools, predicting, head = self.forward.batch.pools, self.forward.batch.predicting, len(stages) - 1
        headed = [Extent(rows, predicting(rows)) for rows in self.program.rows] if pools else wanted
        for rounds, length, steps in self.prepared.blocks:
            for round_ in range(rounds):
                last = round_ == rounds - 1
                for at, step, first, grows, urgent, urgent_last in steps:
                    place = first + round_ * grows
                    extents = (wanted if place < head else headed) if step.wanted else whole
                    now = _Now(number + at, step, place, stages[place], extents[step.chunk])
                    yield now, urgent_last if last else urgent
                number += length

    def _wait(self, number: int, step: Step) -> None:
        """For what must have ended before a step."""
        for distance in step.after:
            if (waited := self.pending.get(number - distance)) is not None:
                waited.wait()

    def _compute(self, now: _Now) -> None:
        number, step, place, stage, extent = now
        if self.pending:
            self._wait(number, step)
        kind = step.kind
        if not extent.leaves.length and (kind is Kind.TAIL or not self.outline.stages[place].ordered):
            return  # nobody wants what would leave, and nothing is remembered here
        begin = time.perf_counter()
        if kind is Kind.COMPUTE:
            self._contribute(extent, place, stage)
        elif kind is Kind.BODY:
            self.bodies.put(stage, extent.leaves, stage.body(self.forward, extent, self._input(extent, place, stage)))
        elif kind is Kind.TAIL:
            self._leave(extent, place, stage, self.bodies.take(stage, extent.leaves))
        else:
            self._enter(step, extent, place, stage)
        self._ended(number, COMPUTE, begin)

    def _ended(self, number: int, lane: str, begin: float) -> None:
        end = time.perf_counter()
        self.spans[number] = begin, end
        self.busy[lane] += end - begin

    def _contribute(self, extent: Extent, place: int, stage: StageFunctions) -> None:
        """All of a stage: step by step, if it isn't faster at once."""
        if self.inputs.has(stage, extent.rows):
            entered = self._input(extent, place, stage)
        else:
            hidden = self.residual.read(place, extent.rows)
            if (whole := stage.whole(self.forward, extent, hidden)) is not None:
                self._left(extent, place, stage, whole)
                return
            entered = stage.enter(self.forward, extent, hidden)
        self._leave(extent, place, stage, stage.body(self.forward, extent, entered))

    def _input(self, extent: Extent, place: int, stage: StageFunctions) -> Tensor:
        """A stage's input: brought by an all_gather, or entered here."""
        if not self.inputs.has(stage, extent.rows):
            return stage.enter(self.forward, extent, self.residual.read(place, extent.rows))
        gathered = self.inputs.take(stage, extent.rows)
        if extent.leaves == extent.rows:
            return gathered
        picked = self.residual.pick(gathered, extent.rows)
        if place < len(self.stages) - 1:
            return picked
        self.headed = picked
        return self.forward.predicting(picked, extent.rows)

    def _enter(self, step: Step, extent: Extent, place: int, stage: StageFunctions) -> None:
        """This rank's part of the rows; the all_gather that follows fills in the rest, in the same memory."""
        hidden, mine = self.residual.stream(place, extent.rows), self._shard(step, extent.rows)
        # Alone, the compute lane gets numbers of the usual size for the others' part: some are slow to compute with.
        whole = torch.empty_like(hidden) if self.scope is Scope.BOTH else hidden.clone()
        whole[mine] = stage.enter(self.forward, extent, hidden[mine])
        self.inputs.put(stage, extent.rows, whole)

    def _leave(self, extent: Extent, place: int, stage: StageFunctions, features: Any) -> None:
        """A partial for the collective that follows; that of a stage without one is the sum already."""
        if not extent.leaves.length:
            return
        self._left(extent, place, stage, stage.tail(self.forward, extent, features))

    def _left(self, extent: Extent, place: int, stage: StageFunctions, left: Tensor) -> None:
        """A partial comes where the next one looks for it."""
        if (kind := self.outline.stages[place].collective) is None or (kind is Kind.REDUCE and self.prepared.alone):
            self.residual.put(place, stage, extent, left)
        else:
            self.partials.put(stage, extent.leaves, left)

    def _collective(self, now: _Now, urgent: bool) -> None:
        number, step, place, stage, extent = now
        kind, rows, world = step.kind, extent.leaves, len(step.ranks) or self.group.world
        if not rows.length:
            self._nothing_travels(number, step)
            return
        tensor = self._outgoing(kind, stage, rows, place)
        if kind is Kind.REDUCE:
            self.residual.put(place, stage, extent, tensor)
        elif kind is Kind.REDUCE_SCATTER:
            mine = self._shard(step, rows)
            part = Rows(rows.start + mine.start, rows.start + mine.stop)
            self.residual.put(place, stage, Extent(part, part), tensor[mine])
        elif kind is Kind.ALL_GATHER:
            self.inputs.put(stage, rows, tensor)
        elif world == 1 or self.scope is not Scope.COMPUTE:
            self.logits = tensor
        if world == 1:  # nothing travels: a partial is the sum already
            self._nothing_travels(number, step)
            if kind is Kind.GATHER:
                self.told = [likeliest(tensor, self.part.first)]
        elif self.scope is not Scope.COMPUTE:
            self._submit(now, tensor, urgent)

    def _outgoing(self, kind: Kind, stage: StageFunctions, rows: Rows, place: int) -> Tensor:
        """What travels: all of it is this rank's partial, or the rows that it entered."""
        if not self.scope.computes:
            return self._stand_in(kind, rows, place)
        if kind is Kind.GATHER and not self.partials.has(stage, rows):
            assert not self.part.width, "a rank with a part of the vocabulary, and a program without its head"
            return self._stand_in(kind, rows, place)
        return (self.inputs if kind is Kind.ALL_GATHER else self.partials).take(stage, rows)

    def _submit(self, now: _Now, tensor: Tensor, urgent: bool) -> None:
        lane, work = now.step.lane, partial(self._communicate, now, tensor)
        urgent = urgent and self.scope is not Scope.BESIDE
        self.pending[now.number] = self.latest[lane] = self.lanes.submit(lane, work, urgent)

    def _nothing_travels(self, number: int, step: Step) -> None:
        """Who waits for this waits for all that its lane was given before, as for any other collective."""
        if step.lane in self.latest:
            self.pending[number] = self.latest[step.lane]

    def _send(self, now: _Now, urgent: bool) -> None:
        """To ranks that go on with these rows, or from those that had them: the residual stream itself, which nobody
        touches on a rank that has sent it, nor on one that receives it before it is there."""
        number, step, place, _, extent = now
        self._wait(number, step)
        sends = self.group.rank in step.ranks and self.scope.computes
        tensor = self.residual.stream(place + 1, extent.rows) if sends else self.residual.left_by(place, extent)
        if self.scope is Scope.COMPUTE:
            if not sends:
                tensor.fill_(1.0)  # of the usual size
        elif extent.leaves.length:
            self._submit(now, tensor, urgent)
        else:
            self._nothing_travels(number, step)

    def _shard(self, step: Step, rows: Rows) -> slice:
        """This rank's part of rows that are divided over the step's ranks."""
        ranks = step.ranks or range(self.group.world)
        return shard(ranks.index(self.group.rank), len(ranks), rows.length)

    def _communicate(self, now: _Now, tensor: Tensor) -> None:
        """On its lane. What arrives replaces what is sent, in its own buffer."""
        begin, step = time.perf_counter(), now.step
        group = self.groups[step.lane, step.meeting]
        wire = "exact" if self.outline.stages[now.place].aside else step.wire
        codec = codec_named(wire) if wire else self.codec
        owes = self.owed is not None and step.kind in SUMS and now.stage.adds
        owed = self.owed.of(now.place, now.extent) if self.owed is not None and owes else None
        match step.kind:
            case Kind.SEND:
                senders, receivers = ([step.meeting.index(rank) for rank in some] for some in (step.ranks, step.to))
                hand_over(group, codec, tensor, senders, receivers)
            case Kind.GATHER:
                self.told = swap(group, likeliest(tensor, self.part.first))
            case Kind.REDUCE:
                all_reduce(group, codec, tensor, step.algorithm, owed)
            case Kind.REDUCE_SCATTER:
                reduce_scatter(group, codec, tensor, owed)
            case Kind.ALL_GATHER:
                all_gather(group, codec, tensor)
        if self.with_checksums and step.kind in (Kind.REDUCE, Kind.ALL_GATHER):  # what all ranks hold alike
            self.checksums[now.number] = zlib.crc32(tensor.view(torch.uint8).numpy().tobytes())
        self._ended(now.number, step.lane, begin)

    def _stand_in(self, kind: Kind, rows: Rows, place: int) -> Tensor:
        """Memory of a partial's size, where nothing was computed."""
        if aside := self.outline.stages[place].aside:
            return self.residual.hidden.new_zeros(rows.length, aside).float()
        if kind is Kind.GATHER:
            return self.residual.hidden.new_zeros(rows.length, self.part.width).float()
        return self.residual.hidden[: rows.length]
