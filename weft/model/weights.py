"""One rank's weights, read from a checkpoint as the blueprint says.

    before a stage's last projection  by rows: each rank computes its own heads and its own part of the MLP
    the last projection               by columns: each rank adds a partial of the whole width
    embedding                         whole on every rank; output head by rows (vocabulary)
    norms                             whole on every rank, folded into the projection behind (see kernels.unit_rows)

Matrices are read, fused, converted and packed one at a time, so that loading peaks at the shard and one matrix.
Knows names and shares; knows nothing of how the weights are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import InputError
from weft.model.blueprint import Axis, Blueprint, Matrix, StageParts, size
from weft.model.checkpoint import Checkpoint
from weft.model.kernels import Linear
from weft.model.shares import Share

LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds of a stage: the fused projections before the last one, the last one, and the scales of
    per-head norms [heads, D] if any."""

    first: Linear
    last: Linear
    scales: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All that one rank holds: `stages` by part and layer. `scale` [hidden]: of the last norm, which a tied head can't
    take in."""

    embedding: Tensor
    stages: dict[tuple[str, int], StageWeights]
    scale: Tensor
    head: Linear


def load(
    checkpoint: Checkpoint, blueprint: Blueprint, share: Share, *, device: str = "cpu",
    dtype: torch.dtype = torch.float32, exact_rows: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:  # fmt: skip
    """Reads a rank's shard. `progress(done, total)` is called in layers.

    Raises `InputError` for missing, unreadable or misshapen tensors.
    """
    reader = _ShardReader(checkpoint, blueprint, share, device, dtype, exact_rows)
    stages: dict[tuple[str, int], StageWeights] = {}
    for layer in range(blueprint.layers):
        for parts in blueprint.layer:
            stages[parts.stage.part, layer] = reader.stage(parts, blueprint.prefix.format(layer))
        checkpoint.forget()
        progress(layer + 1, blueprint.layers)
    embedding = reader.whole(reader.embedding_name, blueprint.embedding)
    head = reader.head(embedding)
    scale = reader.scale(blueprint.after[-1].norm, blueprint.hidden).to(dtype)
    checkpoint.forget()
    return Weights(embedding, stages, scale, head)


def _pairs(heads: Tensor) -> Tensor:
    """Reorders a head's width D from halves (x, x + D/2) to neighbours, as `kernels.rotate` wants it.

    Queries and keys are reordered alike, so their products stay what they were. [..., D, ...] with D second.
    """
    count, width = heads.shape[:2]
    halves = torch.unflatten(heads, 1, (2, width // 2))
    return halves.transpose(1, 2).reshape(count, width, *heads.shape[2:])


class _ShardReader:
    def __init__(
        self, checkpoint: Checkpoint, blueprint: Blueprint, share: Share, device: str, dtype: torch.dtype,
        exact_rows: bool,
    ) -> None:  # fmt: skip
        self.checkpoint, self.blueprint, self.share = checkpoint, blueprint, share
        self.device, self.dtype, self.exact_rows = device, dtype, exact_rows

    def stage(self, parts: StageParts, prefix: str) -> StageWeights:
        """A layer's stage; its matrices one after the other."""
        read = [self._rows(prefix, matrix) for matrix in parts.first]
        # The norm's gain in float32: a product of two bfloat16 would be rounded twice.
        weight = torch.cat([weight for weight, _ in read]).mul_(self.scale(prefix + parts.norm, self.blueprint.hidden))
        biases = [bias for _, bias in read if bias is not None]
        del read  # before the next matrix is read: one at a time
        first = self._linear(weight.to(self.dtype), torch.cat(biases).to(self.dtype) if biases else None)
        del weight
        assert parts.last is not None, "a layer's stage ends in a projection"
        return StageWeights(first, self._columns(prefix, parts.last), self._scales(prefix, parts))

    def whole(self, name: str, matrix: Matrix) -> Tensor:
        """A matrix that every rank has."""
        self._demand(name + ".weight", *self._sides(matrix))
        return self._own(self.checkpoint.read(name + ".weight"))

    def _own(self, read: Tensor) -> Tensor:
        """In memory of its own: one view of the mapped file would keep all of it mapped. It begins where it does in the
        file within a cache line, because the rounding of matrix-vector products depends on that."""
        if read.dtype != self.dtype or self.device != "cpu":
            return read.to(self.device, self.dtype, copy=True)
        room = read.new_empty(read.numel() + LINE // read.itemsize)
        start = (read.data_ptr() - room.data_ptr()) % LINE // read.itemsize
        return room[start : start + read.numel()].view(read.shape).copy_(read)

    def scale(self, name: str, width: int) -> Tensor:
        """A norm's weight times sqrt(width), in float32: what is left of the norm after `kernels.unit_rows`."""
        self._demand(name + ".weight", width)
        return self.checkpoint.read(name + ".weight").to(self.device, torch.float32) * math.sqrt(width)

    def _sides(self, matrix: Matrix) -> tuple[int, int]:
        outputs, inputs = (size(side, lambda axis: axis.count) for side in (matrix.outputs, matrix.inputs))
        return outputs, inputs

    def _mine(self, axis: Axis) -> range:
        """Numbers along an axis."""
        pieces = self.share.of(axis)
        return range(pieces.start * axis.width, pieces.stop * axis.width)

    def _rows(self, prefix: str, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        """This rank's rows of a projection and their bias, in float32."""
        name, axis = prefix + matrix.name, matrix.outputs
        assert isinstance(axis, Axis), "what comes before a stage's last projection is divided by rows"
        outputs, inputs = self._sides(matrix)
        self._demand(name + ".weight", outputs, inputs)
        read = [self.checkpoint.read(name + ".weight", rows=self._mine(axis))]
        if matrix.biased:
            self._demand(name + ".bias", outputs)
            read.append(self.checkpoint.read(name + ".bias", rows=self._mine(axis)))
        parts = [part.to(self.device, torch.float32) for part in read]
        if matrix.paired:
            shape = len(self.share.of(axis)), axis.width
            parts = [_pairs(part.view(*shape, *part.shape[1:])).reshape(part.shape) for part in parts]
        return parts[0], parts[1] if matrix.biased else None

    def _columns(self, prefix: str, matrix: Matrix) -> Linear:
        name, axis = prefix + matrix.name, matrix.inputs
        assert isinstance(axis, Axis), "a stage's last projection is divided by columns"
        outputs, inputs = self._sides(matrix)
        self._demand(name + ".weight", outputs, inputs)
        weight = self._own(self.checkpoint.read(name + ".weight", columns=self._mine(axis)))
        bias = None
        if matrix.biased:
            self._demand(name + ".bias", outputs)
            # The sum over ranks would count a bias once a rank: one rank adds it.
            bias = self._own(self.checkpoint.read(name + ".bias")) if self.share.leads else None
        return self._linear(weight.contiguous(), bias)

    def _scales(self, prefix: str, parts: StageParts) -> Tensor | None:
        """One row a head, in the order of the projections."""
        if not parts.scales:
            return None
        rows = [
            _pairs(self.scale(prefix + name, axis.width)[None]).expand(len(self.share.of(axis)), -1)
            for name, axis in parts.scales
        ]
        return torch.cat(rows).to(self.dtype)

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
            self._demand(name, *self._sides(matrix))
            own = self._own(self.checkpoint.read(name, rows=rows))
            weight = weight if self.blueprint.tied and torch.equal(own, weight) else own
        return Linear(weight, exact_rows=self.exact_rows, packed=False)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(weight, bias, exact_rows=self.exact_rows)

    def _demand(self, name: str, *shape: int) -> None:
        there = self.checkpoint.shape(name)
        if there != list(shape):
            raise InputError(f"{name} has the shape {there}, but config.json calls for {list(shape)}")
