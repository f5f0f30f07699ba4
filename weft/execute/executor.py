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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.execute.draws import Slice
from weft.execute.lanes import Lanes, Pending
from weft.execute.residual import Residual
from weft.execute.sampler import likeliest
from weft.model.decoder import Decoder, Extent, Forward, StageFunctions
from weft.parallel.allreduce import all_gather, all_reduce, reduce_scatter, shard, swap
from weft.parallel.codec import Codec, codec_named
from weft.parallel.group import Group
from weft.program.batch import Rows
from weft.program.stages import COLLECTIVES, COMPUTE, Kind, Outline
from weft.program.steps import Form, Program, Step

FORMS = 64  # that are kept as the walk wants them


class Scope(StrEnum):
    """How much of a program to run: all of it, or one side alone (the two terms of the bound)."""

    BOTH = "both"
    COMPUTE = "compute"  # a rank's own partial stands in for the sum: same work, meaningless numbers
    NETWORK = "network"  # the same messages, with nothing computed


@dataclass(frozen=True)
class Result:
    """What one run left on this rank.

    `logits` [wanted rows, this rank's vocabulary]; `told`: of each rank, `sampler.likeliest` of its logits. `spans`:
    start and end of every step, in seconds of this machine's monotonic clock. `busy`: seconds of each lane.
    `checksums`: one per collective, equal on all ranks.
    """

    logits: Tensor | None
    told: list[Tensor]
    spans: list[tuple[float, float]]
    busy: dict[str, float]
    checksums: list[int]


class _PreparedStep(NamedTuple):
    """A step of a block's first round. `place`: of its stage in that round; `grows`: by how much with each round.
    `urgent`: in a round that another one follows, and in the last one."""

    step: Step
    place: int
    grows: int
    urgent: tuple[bool, bool]


class _Prepared(NamedTuple):
    """A form as the executor walks it: how often each block's steps come. `narrow_from`: the place of the stage that
    wanted rows leave alone."""

    blocks: tuple[tuple[int, tuple[_PreparedStep, ...]], ...]
    narrow_from: int


@lru_cache(maxsize=FORMS)
def prepare(outline: Outline, form: Form) -> _Prepared:
    """Reads a form for a model."""
    blocks = []
    for block, awaited in zip(form.blocks, form.urgent, strict=True):
        grows = block.layers * len(outline.layer)
        steps = []
        for step, *urgent in zip(block.steps, *awaited, strict=True):
            place = outline.place(step.part, step.layer)
            assert place is not None, "a stage that this model hasn't: the program was not checked"
            steps.append(_PreparedStep(step, place, 0 if step.layer is None else grows, (urgent[0], urgent[1])))
        blocks.append((block.rounds, tuple(steps)))
    computed = (Kind.COMPUTE, Kind.BODY)
    narrow = (each.place for _, steps in blocks for each in steps if each.step.wanted and each.step.kind in computed)
    return _Prepared(tuple(blocks), min(narrow))


class _Now(NamedTuple):
    """The step that the walk has come to: its place in issue order, its stage's place in the model and functions."""

    number: int
    step: Step
    place: int
    stage: StageFunctions
    extent: Extent


class _Bodies:
    """Features until their last tail has taken them: the stage, the rows that leave, features, rows left to take."""

    def __init__(self) -> None:
        self._kept: list[tuple[StageFunctions, Rows, Any, list[int]]] = []

    def put(self, stage: StageFunctions, leaves: Rows, features: Any) -> None:
        if leaves.length:
            self._kept.append((stage, leaves, features, [leaves.length]))

    def take(self, stage: StageFunctions, leaves: Rows) -> Any:
        for number, (owner, rows, features, left) in enumerate(self._kept):
            if owner is stage and rows.contains(leaves):
                left[0] -= leaves.length
                if not left[0]:
                    del self._kept[number]
                return features
        raise AssertionError("a tail without a body: the program was not checked")


class _Tensors:
    """Rows that a later step takes, whole or in parts; each tensor is let go with its last row."""

    def __init__(self) -> None:
        self._kept: list[tuple[StageFunctions, Rows, Tensor, list[int]]] = []

    def put(self, stage: StageFunctions, rows: Rows, tensor: Tensor) -> None:
        self._kept.append((stage, rows, tensor, [rows.length]))

    def has(self, stage: StageFunctions, rows: Rows) -> bool:
        """Something of these rows is there."""
        return bool(self._kept) and any(owner is stage and there.intersects(rows) for owner, there, _, _ in self._kept)

    def take(self, stage: StageFunctions, rows: Rows) -> Tensor:
        """These rows, from the tensor or the tensors that hold them."""
        if self._kept and self._kept[0][0] is stage and self._kept[0][1] == rows:  # mostly: just these
            return self._kept.pop(0)[2]
        taken, kept, missing = [], [], rows.length
        for entry in self._kept:
            owner, there, tensor, left = entry
            here = rows.clip(there) if owner is stage else Rows(0, 0)
            if here.length:
                left[0] -= here.length
                missing -= here.length
                part = tensor if here == there else tensor[here.start - there.start : here.stop - there.start]
                taken.append((here.start, part))
            if left[0]:
                kept.append(entry)
        self._kept = kept
        assert not missing, "nothing holds all of a step's rows: the program was not checked"
        if len(taken) == 1:
            return taken[0][1]
        return torch.cat([part for _, part in sorted(taken, key=lambda entry: entry[0])])


class Executor:
    """Runs programs of one model with one group and the lanes of one rank. `vocabulary`: tokens of each rank."""

    def __init__(self, decoder: Decoder, outline: Outline, group: Group, lanes: Lanes, vocabulary: list[int]) -> None:
        self.decoder, self.outline, self.group, self.lanes = decoder, outline, group, lanes
        self.stages = [decoder.stages[stage.part, stage.layer] for stage in outline.stages]
        rank = group.rank
        self.part = Slice(rank, sum(vocabulary[:rank]), vocabulary[rank], sum(vocabulary))

    def run(
        self, program: Program, forward: Forward, codec: Codec, scope: Scope = Scope.BOTH, checksums: bool = False
    ) -> Result:  # fmt: skip
        """One forward pass. Raises what a step raised, once every submitted collective has ended."""
        return _Pass(self, program, forward, codec, scope, checksums).all_steps()


class _Pass:
    """One run."""

    def __init__(
        self, owner: Executor, program: Program, forward: Forward, codec: Codec, scope: Scope, checksums: bool
    ) -> None:
        self.outline, self.stages, self.lanes = owner.outline, owner.stages, owner.lanes
        self.group, self.part = owner.group, owner.part
        self.groups = {lane: owner.group.on(lane) for lane in program.form.lanes if lane != COMPUTE}
        self.program, self.forward, self.codec, self.scope = program, forward, codec, scope
        self.prepared = prepare(owner.outline, program.form)
        self.spans = [(0.0, 0.0)] * len(program)
        self.busy = dict.fromkeys(program.form.lanes, 0.0)
        self.checksums: dict[int, int] | None = {} if checksums else None
        self.pending: dict[int, Pending] = {}
        self.residual = Residual(owner.decoder, owner.outline, self.prepared.narrow_from, forward)
        self.inputs, self.bodies, self.partials = _Tensors(), _Bodies(), _Tensors()
        self.logits: Tensor | None = None
        self.told: list[Tensor] = []

    def all_steps(self) -> Result:
        if self.scope is Scope.NETWORK:
            self.residual.hidden.zero_()  # committed before the clock matters
            self.residual.kept.zero_()
        try:
            for now, urgent in self._steps():
                if now.step.kind in COLLECTIVES:
                    self._collective(now, urgent)
                elif self.scope is not Scope.NETWORK:
                    self._compute(now)
        finally:
            for waiting in self.pending.values():
                waiting.wait()
        checksums = [self.checksums[index] for index in sorted(self.checksums)] if self.checksums else []
        return Result(self.logits, self.told, self.spans, self.busy, checksums)

    def _steps(self) -> Iterator[tuple[_Now, bool]]:
        """All of them, with whether one is urgent."""
        number, stages = 0, self.stages
        extents = [(Extent(rows, rows), Extent(rows, self.residual.wanted(rows))) for rows in self.program.rows]
        for rounds, steps in self.prepared.blocks:
            for round_ in range(rounds):
                last = round_ == rounds - 1
                for step, first, grows, urgent in steps:
                    place = first + round_ * grows
                    yield _Now(number, step, place, stages[place], extents[step.chunk][step.wanted]), urgent[last]
                    number += 1

    def _compute(self, now: _Now) -> None:
        number, step, place, stage, extent = now
        for distance in step.after:
            if (waited := self.pending.get(number - distance)) is not None:
                waited.wait()
        kind = step.kind
        if not extent.leaves.length and (kind is Kind.TAIL or not self.outline.stages[place].ordered):
            return  # nobody wants what would leave, and nothing is remembered here
        begin = time.perf_counter()
        if kind is Kind.COMPUTE:
            self._leave(extent, place, stage, stage.body(self.forward, extent, self._input(extent, place, stage)))
        elif kind is Kind.BODY:
            self.bodies.put(stage, extent.leaves, stage.body(self.forward, extent, self._input(extent, place, stage)))
        elif kind is Kind.TAIL:
            self._leave(extent, place, stage, self.bodies.take(stage, extent.leaves))
        else:
            self._enter(extent, place, stage)
        self._ended(number, COMPUTE, begin)

    def _ended(self, number: int, lane: str, begin: float) -> None:
        end = time.perf_counter()
        self.spans[number] = begin, end
        self.busy[lane] += end - begin

    def _input(self, extent: Extent, place: int, stage: StageFunctions) -> Tensor:
        """A stage's input: brought by an all_gather, or entered here."""
        if not self.inputs.has(stage, extent.rows):
            return stage.enter(self.forward, extent, self.residual.read(place, extent.rows))
        gathered = self.inputs.take(stage, extent.rows)
        return gathered if extent.leaves == extent.rows else self.residual.pick(gathered, extent.rows)

    def _enter(self, extent: Extent, place: int, stage: StageFunctions) -> None:
        """This rank's part of the rows; the all_gather that follows fills in the rest, in the same memory."""
        hidden, mine = self.residual.stream(place, extent.rows), shard(self.group, extent.rows.length)
        # Alone, the compute lane gets numbers of the usual size for the others' part: some are slow to compute with.
        whole = torch.empty_like(hidden) if self.scope is Scope.BOTH else hidden.clone()
        whole[mine] = stage.enter(self.forward, extent, hidden[mine])
        self.inputs.put(stage, extent.rows, whole)

    def _leave(self, extent: Extent, place: int, stage: StageFunctions, features: Any) -> None:
        """A partial for the collective that follows; that of a stage without one is the sum already."""
        if not extent.leaves.length:
            return
        left = stage.tail(self.forward, extent, features)
        if self.outline.stages[place].collective is None:
            self.residual.put(place, stage, extent, left)
        else:
            self.partials.put(stage, extent.leaves, left)

    def _collective(self, now: _Now, urgent: bool) -> None:
        number, step, place, stage, extent = now
        kind, rows = step.kind, extent.leaves
        if not rows.length:
            return
        if self.scope is Scope.NETWORK:
            tensor = self._stand_in(kind, rows)
        else:  # all of it is this rank's partial, or the rows that it entered
            tensor = (self.inputs if kind is Kind.ALL_GATHER else self.partials).take(stage, rows)
        if kind is Kind.REDUCE:
            self.residual.put(place, stage, extent, tensor)
        elif kind is Kind.REDUCE_SCATTER:
            mine = shard(self.group, rows.length)
            part = Rows(rows.start + mine.start, rows.start + mine.stop)
            self.residual.put(place, stage, Extent(part, part), tensor[mine])
        elif kind is Kind.ALL_GATHER:
            self.inputs.put(stage, rows, tensor)
        elif self.group.world == 1 or self.scope is not Scope.COMPUTE:
            self.logits = tensor
        if self.group.world == 1:  # nothing travels: a partial is the sum already
            self.told = [likeliest(tensor, 0)] if kind is Kind.GATHER else []
        elif self.scope is not Scope.COMPUTE:
            self.pending[number] = self.lanes.submit(step.lane, partial(self._communicate, now, tensor), urgent)

    def _communicate(self, now: _Now, tensor: Tensor) -> None:
        """On its lane. What arrives replaces what is sent, in its own buffer."""
        begin, step = time.perf_counter(), now.step
        group, codec = self.groups[step.lane], codec_named(step.wire) if step.wire else self.codec
        match step.kind:
            case Kind.GATHER:
                self.told = swap(group, likeliest(tensor, self.part.first))
            case Kind.REDUCE:
                all_reduce(group, codec, tensor, step.algorithm)
            case Kind.REDUCE_SCATTER:
                reduce_scatter(group, codec, tensor)
            case Kind.ALL_GATHER:
                all_gather(group, codec, tensor)
        if self.checksums is not None and step.kind in (Kind.REDUCE, Kind.ALL_GATHER):  # what all ranks hold alike
            self.checksums[now.number] = zlib.crc32(tensor.view(torch.uint8).numpy().tobytes())
        self._ended(now.number, step.lane, begin)

    def _stand_in(self, kind: Kind, rows: Rows) -> Tensor:
        """Memory of a partial's size, where nothing was computed."""
        if kind is Kind.GATHER:
            return self.residual.hidden.new_zeros(rows.length, self.part.width).float()
        return self.residual.hidden[: rows.length]
