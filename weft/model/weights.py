"""One rank's weights, read from a checkpoint as the blueprint says.

    before a stage's last projection  by rows: each rank computes its own heads and its own part of the MLP
    the last projection               by columns: each rank adds a partial of the whole width
    embedding                         whole on every rank; output head by rows (vocabulary)
    norms                             whole on every rank, folded into the projection behind (see kernels.UnitRows)

Matrices are read, fused, converted and packed one at a time, so that loading peaks at the shard and one matrix.
Knows names and shares; knows nothing of how the weights are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft.errors import InputError
from weft.formats.checkpoint import Checkpoint
from weft.formats.packed import Plain, TensorPart
from weft.model.blueprint import (
    AttentionBranch,
    Axis,
    Blueprint,
    Branch,
    Matrix,
    Norm,
    ProjectionBranch,
    StageParts,
    size,
)
from weft.model.kernels import Linear
from weft.model.shares import Share

LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Gain:
    """What is left of a norm once rows have unit size: times `scale`, and plus `bias` if any."""

    scale: Tensor
    bias: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        """Rows of unit size become what the norm gives, in place."""
        rows.mul_(self.scale)
        return rows if self.bias is None else rows.add_(self.bias)


@dataclass(frozen=True)
class BranchWeights:
    """What one rank holds of a branch: the fused projections before the last one, the last one, the scales [heads, D]
    of norms of heads, and the sinks [heads], as far as there are any."""

    first: Linear | None
    last: Linear | None
    scales: Tensor | None
    sinks: Tensor | None


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds of a stage."""

    branches: tuple[BranchWeights, ...]
    post: Gain | None


@dataclass(frozen=True)
class Weights:
    """All that one rank holds: `stages` by part and layer. `gain`: of the last norm, which a tied head can't take
    in."""

    embedding: Tensor
    stages: dict[tuple[str, int], StageWeights]
    gain: Gain
    head: Linear


def load(
    checkpoint: Checkpoint, blueprint: Blueprint, share: Share, *, device: str = "cpu",
    dtype: torch.dtype = torch.float32, exact_rows: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:  # fmt: skip
    """Reads a rank's shard. `progress(done, total)` is called in bytes of its files.

    Raises `InputError` for missing, unreadable or misshapen tensors, and for some that would change what is computed.
    """
    if unexpected := checkpoint.unexpected(blueprint.tensors):
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        raise InputError(
            f"{checkpoint.path} has {', '.join(unexpected[:3])}{more}, of which weft does not know what they are for: "
            "it would answer wrongly; give another checkpoint"
        )
    reader = _ShardReader(checkpoint, blueprint, share, device, dtype, exact_rows, progress)
    reader.demand_all()
    stages: dict[tuple[str, int], StageWeights] = {}
    for layer in range(blueprint.layers):
        for parts in blueprint.layer:
            stages[parts.stage.part, layer] = reader.stage(parts, blueprint.prefix.format(layer))
        checkpoint.forget()
    embedding = reader.whole(reader.embedding_name, blueprint.embedding)
    head = reader.head(embedding)
    gain = reader.gain("", blueprint.norm)
    checkpoint.forget()
    return Weights(embedding, stages, gain, head)


def _pair(heads: Tensor, halves: int) -> None:
    """Reorders the first `halves` of a head's width D from (x, x + halves/2) to neighbours, as `kernels.rotate` wants
    it, in place.

    Queries and keys are reordered alike, so their products stay what they were. [..., D, ...] with D second.
    """
    if halves <= 2:  # two numbers are neighbours
        return
    turned = heads[:, :halves]
    turned.copy_(torch.unflatten(turned, 1, (2, halves // 2)).transpose(1, 2).flatten(1, 2))


class _ShardReader:
    def __init__(
        self, checkpoint: Checkpoint, blueprint: Blueprint, share: Share, device: str, dtype: torch.dtype,
        exact_rows: bool, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.checkpoint, self.blueprint, self.share = checkpoint, blueprint, share
        self.device, self.dtype, self.exact_rows = device, dtype, exact_rows
        self._progress, self._done = progress, 0
        self._total = sum(self._bytes(name, matrix) for name, matrix in blueprint.named)
        matrices = (matrix for parts in blueprint.layer for matrix in parts.matrices)
        self.halves = max((matrix.halves for matrix in matrices), default=0)

    def demand_all(self) -> None:
        """Before memory is taken for any: raises `InputError` for the first that is missing or misshapen."""
        embedding, head = (f"{matrix.name}.weight" for matrix in (self.blueprint.embedding, self.blueprint.head))
        for name, shape in self.blueprint.tensors.items():
            if not (self.blueprint.tied and name in (embedding, head) and name not in self.checkpoint):
                self._demand(name, *shape)
        self._demand(f"{self.embedding_name}.weight", *self.blueprint.tensors[embedding])

    def stage(self, parts: StageParts, prefix: str) -> StageWeights:
        """A layer's stage; its matrices one after the other."""
        branches = tuple(self._branch(branch, prefix) for branch in parts.branches)
        return StageWeights(branches, self.gain(prefix, parts.post) if parts.post else None)

    def _branch(self, branch: Branch, prefix: str) -> BranchWeights:
        first = self._first(branch, prefix) if branch.first else None
        last = self._columns(prefix, branch.last) if branch.last is not None else None
        scales = self._head_scales(prefix, branch) if isinstance(branch, ProjectionBranch) else None
        sinks = None
        if isinstance(branch, AttentionBranch) and branch.sinks is not None:
            name, axis = branch.sinks
            sinks = self.checkpoint.read(prefix + name, rows=self._mine(axis, 1)).numbers(torch.float32)
        return BranchWeights(first, last, scales, None if sinks is None else self._there(sinks, torch.float32))

    def _first(self, branch: Branch, prefix: str) -> Linear:
        """The fused projections, with the norm before them."""
        counts = [len(self._mine(matrix.outputs)) for matrix in branch.first]
        weight, bias = torch.empty(sum(counts), self.blueprint.hidden), torch.zeros(sum(counts))
        parts = zip(branch.first, torch.split(weight, counts), torch.split(bias, counts), strict=True)
        for matrix, rows, biases in parts:
            self._rows(prefix, matrix, rows, biases)
        biased = any(matrix.biased for matrix in branch.first)
        if branch.norm is not None:
            # In float32: a product of two bfloat16 would be rounded twice.
            scale, shift = self._norm(prefix, branch.norm, self.blueprint.hidden)
            if shift is not None:
                bias, biased = bias.addmv_(weight, shift), True
            weight.mul_(scale)
        return self._linear(self._there(weight), self._there(bias) if biased else None)

    def whole(self, name: str, matrix: Matrix) -> Tensor:
        """A matrix that every rank has."""
        found = self._own(self._read(name, matrix))
        self._read_all(name, matrix)
        return found

    def gain(self, prefix: str, norm: Norm) -> Gain:
        """Of a norm of whole rows."""
        scale, bias = self._norm(prefix, norm, self.blueprint.hidden)
        return Gain(self._there(scale), None if bias is None else self._there(bias))

    def _norm(self, prefix: str, norm: Norm, width: int) -> tuple[Tensor, Tensor | None]:
        """What is left of a norm after `kernels.UnitRows`, which leaves the root of the mean square to `width`: a
        scale, and a bias if there is one; in float32."""
        name = prefix + norm.name
        scale = self.checkpoint.read(f"{name}.weight").numbers(torch.float32).add(norm.offset).mul_(norm.factor)
        bias = self.checkpoint.read(f"{name}.bias").numbers(torch.float32).mul(norm.factor) if norm.biased else None
        return (scale if norm.centred else scale * math.sqrt(width)), bias

    def _own(self, part: TensorPart) -> Tensor:
        """In memory of its own: one view of the mapped file would keep all of it mapped. It begins where it does in the
        file within a cache line, because the rounding of matrix-vector products depends on that."""
        if self.device == "cpu" and isinstance(part, Plain) and part.values.dtype == self.dtype:
            read = part.values
            room = read.new_empty(read.numel() + LINE // read.itemsize)
            start = (read.data_ptr() - room.data_ptr()) % LINE // read.itemsize
            return room[start : start + read.numel()].view(read.shape).copy_(read)
        out = torch.empty(part.shape, dtype=self.dtype)
        part.into(out)
        return out.to(self.device)

    def _there(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return values.to(self.device, dtype or self.dtype)

    def _sides(self, matrix: Matrix) -> tuple[int, int]:
        outputs, inputs = (size(side, lambda axis: axis.count) for side in (matrix.outputs, matrix.inputs))
        return outputs, inputs

    def _mine(self, axis: Axis | int, width: int | None = None) -> range:
        """Numbers along an axis that is divided. `width`: of a piece, where it isn't the axis's own."""
        assert isinstance(axis, Axis), "before a stage's last projection rows are divided, and columns of that one"
        pieces, width = self.share.of(axis), axis.width if width is None else width
        return range(pieces.start * width, pieces.stop * width)

    def _bytes(self, name: str, matrix: Matrix) -> int:
        """Of this rank's part of a matrix, in the files; none of one that is another's."""
        if f"{name}.weight" not in self.checkpoint:
            return 0
        outputs, inputs = self._sides(matrix)
        outputs = matrix.within.rows if matrix.within else outputs
        return self.checkpoint.stored(f"{name}.weight") * self.share.numbers(matrix) // max(1, outputs * inputs)

    def _read(self, name: str, matrix: Matrix, rows: range | None = None, columns: range | None = None) -> TensorPart:
        """A part of its weight. Raises `InputError` for one that says nothing without a scale."""
        part = self.checkpoint.read(f"{name}.weight", rows, columns)
        if isinstance(part, Plain) and (part.values.itemsize == 1 or not part.values.is_floating_point()):
            raise InputError(
                f"{self.checkpoint.path}: {name}.weight is in {part.values.dtype}, and no scale says what that means; "
                "download the checkpoint again"
            )
        return part

    def _read_all(self, name: str, matrix: Matrix) -> None:
        """Counts what was read."""
        self._done += self._bytes(name, matrix)
        self._progress(self._done, self._total)

    def _placed(self, matrix: Matrix) -> Iterator[tuple[range, range]]:
        """Where this rank's rows of a matrix are in its tensor, and among each other."""
        rows, axis, within = self._mine(matrix.outputs), matrix.outputs, matrix.within
        assert isinstance(axis, Axis), "rows are divided"
        if within is None or within.step == axis.width:
            start = rows.start + (within.start if within else 0)
            yield range(start, start + len(rows)), range(len(rows))
            return
        for number, piece in enumerate(self.share.of(axis)):
            start = within.start + piece * within.step
            yield range(start, start + axis.width), range(number * axis.width, (number + 1) * axis.width)

    def _rows(self, prefix: str, matrix: Matrix, into: Tensor, biases: Tensor) -> None:
        """This rank's rows of a projection, in float32, go `into` a tensor, and their bias if any into another."""
        name = prefix + matrix.name
        for there, here in self._placed(matrix):
            self._read(name, matrix, rows=there).into(into[here.start : here.stop])
            if matrix.biased:
                bias = self.checkpoint.read(name + ".bias", rows=there).numbers(torch.float32)
                biases[here.start : here.stop] = bias
        self._read_all(name, matrix)
        if matrix.halves:
            assert isinstance(matrix.outputs, Axis), "what is turned by position is made of heads"
            heads = len(self.share.of(matrix.outputs)), matrix.outputs.width
            for values in (into.view(*heads, into.shape[1]), biases.view(heads)):
                _pair(values, matrix.halves)
        if matrix.factor != 1.0:
            into.mul_(matrix.factor)
            biases.mul_(matrix.factor)

    def _columns(self, prefix: str, matrix: Matrix) -> Linear:
        name = prefix + matrix.name
        part = self._read(name, matrix, columns=self._mine(matrix.inputs))
        weight = self._own(part) if matrix.factor == 1.0 else self._times(part, matrix.factor)
        self._read_all(name, matrix)
        bias = None
        if matrix.biased and self.share.leads:  # the sum over ranks would count a bias once a rank: one rank adds it
            read = self.checkpoint.read(name + ".bias")
            bias = self._own(read) if matrix.factor == 1.0 else self._times(read, matrix.factor)
        return self._linear(weight.contiguous(), bias)

    def _times(self, part: TensorPart, factor: float) -> Tensor:
        """Rounded once."""
        return self._there(part.numbers(torch.float32).mul(factor))

    def _head_scales(self, prefix: str, branch: ProjectionBranch) -> Tensor | None:
        """One row a head, in the order of the projections. Of norms over all heads, without the root of their width:
        that is taken from the sum over ranks."""
        if not branch.head_norms:
            return None
        rows = []
        for norm, axis in branch.head_norms:
            pieces = self.share.of(axis)
            if branch.across:
                scale, _ = self._norm(prefix, replace(norm, centred=True), axis.numbers)
                each = scale.view(axis.count, axis.width)[pieces.start : pieces.stop].clone()
            else:
                scale, _ = self._norm(prefix, norm, axis.width)
                each = scale.expand(len(pieces), -1).clone()
            if self.halves:
                _pair(each, self.halves)
            rows.append(each)
        return self._there(torch.cat(rows))

    @property
    def embedding_name(self) -> str:
        """Of tied ones, either may be what was saved."""
        own, head = self.blueprint.embedding.name, self.blueprint.head.name
        swapped = self.blueprint.tied and f"{head}.weight" in self.checkpoint and f"{own}.weight" not in self.checkpoint
        return head if swapped else own

    def head(self, embedding: Tensor) -> Linear:
        """A view of the embedding, if they are tied and the checkpoint doesn't say otherwise: as in transformers, a
        head of its own that differs counts for more than config.json."""
        matrix, name = self.blueprint.head, self.blueprint.head.name + ".weight"
        assert isinstance(matrix.outputs, Axis), "the output head is divided by rows"
        rows = self._mine(matrix.outputs)
        weight = embedding[rows.start : rows.stop]
        if not self.blueprint.tied or name in self.checkpoint:
            own = self._own(self._read(matrix.name, matrix, rows=rows))
            self._read_all(matrix.name, matrix)
            weight = weight if self.blueprint.tied and torch.equal(own, weight) else own
        return Linear(weight, exact_rows=self.exact_rows, packed=False)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(weight, bias, exact_rows=self.exact_rows)

    def _demand(self, name: str, *shape: int) -> None:
        there = self.checkpoint.shape(name)
        if there != list(shape):
            told = f"{name} has the shape {there}, but the configuration calls for {list(shape)}"
            raise InputError(f"{self.checkpoint.path}: {told}")
