"""Runs a program on one rank: walks its steps on the compute lane and hands collectives to the network lane.

Knows programs, the model's four functions and the group; knows no strategy by name. Every partial has a buffer of
its own, which nobody touches between its collective's submission and the wait for it.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from weft.execute.lanes import Lanes, Pending
from weft.model.decoder import Decoder, Forward, StageFunctions
from weft.parallel.allreduce import all_gather, all_reduce, gather_columns, reduce_scatter, shard
from weft.parallel.codec import Codec
from weft.parallel.group import Group
from weft.program.batch import Rows
from weft.program.steps import Kind, Program, Step


class Part(StrEnum):
    """How much of a program to run: all of it, or one lane alone (the two terms of the bound)."""

    BOTH = "both"
    COMPUTE = "compute"  # a rank's own partial stands in for the sum: same work, meaningless numbers
    NETWORK = "network"  # the same messages, with nothing computed


@dataclass(frozen=True)
class Result:
    """What one run left on this rank.

    `logits` [wanted rows, vocabulary], on rank 0 only. `spans`: start and end of every step, in seconds of this
    machine's monotonic clock. `checksums`: one per collective, equal on all ranks.
    """

    logits: Tensor | None
    spans: list[tuple[float, float]]
    checksums: list[int]

    def busy(self, program: Program) -> tuple[float, float]:
        """Seconds that the compute and the network lane were busy."""
        both = [0.0, 0.0]
        for index, (start, stop) in enumerate(self.spans):
            both[index in program.collectives] += stop - start
        return both[0], both[1]


class _Pieces:
    """Tensors that a later step takes, whole or in parts; each is let go with its last row."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str, Rows, Tensor, list[int]]] = []

    def put(self, step: Step, tensor: Tensor) -> None:
        self._pieces.append((step.stage, step.rows, tensor, [step.rows.length]))

    def take(self, step: Step) -> Tensor:
        """The step's rows, from the piece or the pieces that hold them."""
        taken, kept, missing = [], [], step.rows.length
        for piece in self._pieces:
            stage, rows, tensor, left = piece
            here = step.rows.clip(rows) if stage == step.stage else Rows(0, 0)
            if here.length:
                left[0] -= here.length
                missing -= here.length
                part = tensor if here == rows else tensor[here.start - rows.start : here.stop - rows.start]
                taken.append((here.start, part))
            if left[0]:
                kept.append(piece)
        self._pieces = kept
        assert not missing, f"nothing holds all rows of {step.name!r}: the program was not checked"
        if len(taken) == 1:
            return taken[0][1]
        return torch.cat([part for _, part in sorted(taken, key=lambda entry: entry[0])])


@dataclass
class _Pass:
    """The state of one run."""

    hidden: Tensor
    inputs: _Pieces = field(default_factory=_Pieces)
    features: _Pieces = field(default_factory=_Pieces)
    partials: _Pieces = field(default_factory=_Pieces)
    arriving: list[tuple[Rows, StageFunctions, Tensor]] = field(default_factory=list)
    logits: Tensor | None = None


class Executor:
    """Runs programs of one model with one group and one pair of lanes."""

    def __init__(self, decoder: Decoder, group: Group, lanes: Lanes, vocabulary: list[int]) -> None:
        self.decoder, self.group, self.lanes = decoder, group, lanes
        self.vocabulary = vocabulary  # columns of the logits on each rank

    def run(
        self, program: Program, forward: Forward, codec: Codec, part: Part = Part.BOTH, checksums: bool = False
    ) -> Result:
        """One forward pass. Raises what a step raised, once every submitted collective has ended."""
        return _Run(self, program, forward, codec, part, checksums).all_steps()


class _Run:
    def __init__(
        self, owner: Executor, program: Program, forward: Forward, codec: Codec, part: Part, checksums: bool
    ) -> None:
        self.group, self.lanes, self.vocabulary = owner.group, owner.lanes, owner.vocabulary
        self.program, self.forward, self.codec, self.part = program, forward, codec, part
        self.checksums: list[int] | None = [] if checksums else None
        self.stages = owner.decoder.stages
        self.spans = [(0.0, 0.0)] * len(program)
        self.pending: dict[int, Pending] = {}
        self.state = _Pass(owner.decoder.empty_hidden(forward.batch.tokens))

    def all_steps(self) -> Result:
        if self.part is Part.NETWORK:
            self.state.hidden.zero_()  # committed before the clock matters
        try:
            for index, step in enumerate(self.program.steps):
                if index in self.program.collectives:
                    self._collective(index, step)
                elif self.part is not Part.NETWORK:
                    self._compute(index, step)
        finally:
            for waiting in self.pending.values():
                waiting.wait()
        return Result(self.state.logits, self.spans, self.checksums or [])

    def _compute(self, index: int, step: Step) -> None:
        for edge in step.after:
            if edge in self.pending:
                self.pending[edge].wait()
        begin = time.perf_counter()
        stage = self.stages[step.stage]
        if step.kind is Kind.ENTER:
            self._enter(step, stage)
        elif step.kind is Kind.TAIL:
            self._leave(step, stage, stage.tail(self.state.features.take(step)))
        else:
            features = stage.body(self.forward, self._input(step, stage), step.rows)
            if step.kind is Kind.BODY:
                self.state.features.put(step, features)
            else:
                self._leave(step, stage, stage.tail(features))
        self.spans[index] = (begin, time.perf_counter())

    def _input(self, step: Step, stage: StageFunctions) -> Tensor:
        """A stage's input: brought by an all_gather, or entered here."""
        if step.stage in self.program.gathered:
            return self.state.inputs.take(step)
        self._absorb(step.rows)
        return stage.enter(self._hidden(step.rows))

    def _enter(self, step: Step, stage: StageFunctions) -> None:
        """This rank's part of the rows; the all_gather that follows fills in the rest, in the same memory."""
        self._absorb(step.rows)
        hidden, mine = self._hidden(step.rows), shard(self.group, step.rows.length)
        # Alone, the compute lane gets numbers of the usual size for the others' part: some are slow to compute with.
        whole = torch.empty_like(hidden) if self.part is Part.BOTH else hidden.clone()
        whole[mine] = stage.enter(hidden[mine])
        self.state.inputs.put(step, whole)

    def _hidden(self, rows: Rows) -> Tensor:
        """These rows of the residual stream."""
        return self.state.hidden[rows.start : rows.stop]

    def _leave(self, step: Step, stage: StageFunctions, partial: Tensor) -> None:
        """A partial for the collective that follows; a stage without one is absorbed like the rest."""
        if step.stage in self.program.collected:
            self.state.partials.put(step, partial)
        else:
            self.state.arriving.append((step.rows, stage, partial))

    def _absorb(self, rows: Rows) -> None:
        """Adds every contribution to some of `rows` to the residual stream.

        They have arrived: a legal program's step waits for the collectives of its rows.
        """
        arriving, self.state.arriving = self.state.arriving, []
        for entry in arriving:
            where, stage, total = entry
            if where.intersects(rows):
                stage.absorb(self._hidden(where), total)
            else:
                self.state.arriving.append(entry)

    def _collective(self, index: int, step: Step) -> None:
        tensor = self._stand_in(step) if self.part is Part.NETWORK else self._outgoing(step)
        if step.kind is Kind.REDUCE:
            self.state.arriving.append((step.rows, self.stages[step.stage], tensor))
        elif step.kind is Kind.REDUCE_SCATTER:
            mine = shard(self.group, step.rows.length)
            rows = Rows(step.rows.start + mine.start, step.rows.start + mine.stop)
            self.state.arriving.append((rows, self.stages[step.stage], tensor[mine]))
        elif step.kind is Kind.ALL_GATHER:
            self.state.inputs.put(step, tensor)
        if self.group.world == 1:  # nothing travels: a partial is the sum already
            self.state.logits = tensor if step.kind is Kind.GATHER else None
        elif self.part is not Part.COMPUTE:
            urgent = index in self.program.awaited_next
            self.pending[index] = self.lanes.submit(lambda: self._communicate(index, step, tensor), urgent)

    def _outgoing(self, step: Step) -> Tensor:
        """What the collective takes: all of it is this rank's partial, or the rows that it entered."""
        pieces = self.state.inputs if step.kind is Kind.ALL_GATHER else self.state.partials
        return pieces.take(step)

    def _communicate(self, index: int, step: Step, tensor: Tensor) -> None:
        """On the network lane. What arrives replaces what is sent, in its own buffer."""
        begin = time.perf_counter()
        match step.kind:
            case Kind.GATHER:
                self.state.logits = gather_columns(self.group, tensor, self.vocabulary)
            case Kind.REDUCE:
                all_reduce(self.group, self.codec, tensor)
            case Kind.REDUCE_SCATTER:
                reduce_scatter(self.group, self.codec, tensor)
            case Kind.ALL_GATHER:
                all_gather(self.group, self.codec, tensor)
        if self.checksums is not None and step.kind in (Kind.REDUCE, Kind.ALL_GATHER):  # what all ranks hold alike
            self.checksums.append(zlib.crc32(tensor.view(torch.uint8).numpy().tobytes()))
        self.spans[index] = (begin, time.perf_counter())

    def _stand_in(self, step: Step) -> Tensor:
        """Memory of a partial's size, where nothing was computed."""
        if step.kind is Kind.GATHER:
            rows = len(self.forward.batch.wanted_rows)
            return self.state.hidden.new_zeros(rows, self.vocabulary[self.group.rank]).float()
        return self._hidden(step.rows)
