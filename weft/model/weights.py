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
from weft.formats.checkpoint import Checkpoint
from weft.formats.packed import Plain, TensorPart
from weft.model.blueprint import Axis, Blueprint, Matrix, StageParts, size
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
        exact_rows: bool, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.checkpoint, self.blueprint, self.share = checkpoint, blueprint, share
        self.device, self.dtype, self.exact_rows = device, dtype, exact_rows
        self._progress, self._done = progress, 0
        self._total = sum(self._bytes(name, matrix) for name, matrix in blueprint.named)

    def demand_all(self) -> None:
        """Before memory is taken for any: raises `InputError` for the first that is missing or misshapen."""
        embedding, head = (f"{matrix.name}.weight" for matrix in (self.blueprint.embedding, self.blueprint.head))
        for name, shape in self.blueprint.tensors.items():
            if not (self.blueprint.tied and name in (embedding, head) and name not in self.checkpoint):
                self._demand(name, *shape)
        self._demand(f"{self.embedding_name}.weight", *self.blueprint.tensors[embedding])

    def stage(self, parts: StageParts, prefix: str) -> StageWeights:
        """A layer's stage; its matrices one after the other."""
        counts = [len(self._mine(matrix.outputs)) for matrix in parts.first]
        weight = torch.empty(sum(counts), self.blueprint.hidden)
        rows = torch.split(weight, counts)
        read = [self._rows(prefix, matrix, into) for matrix, into in zip(parts.first, rows, strict=True)]
        biases = [bias for bias in read if bias is not None]
        # The norm's gain in float32: a product of two bfloat16 would be rounded twice.
        weight.mul_(self.scale(prefix + parts.norm, self.blueprint.hidden))
        first = self._linear(self._there(weight), self._there(torch.cat(biases)) if biases else None)
        del weight, rows
        assert parts.last is not None, "a layer's stage ends in a projection"
        return StageWeights(first, self._columns(prefix, parts.last), self._scales(prefix, parts))

    def whole(self, name: str, matrix: Matrix) -> Tensor:
        """A matrix that every rank has."""
        return self._own(self._read(name, matrix))

    def scale(self, name: str, width: int) -> Tensor:
        """A norm's weight times sqrt(width), in float32: what is left of the norm after `kernels.unit_rows`."""
        return self.checkpoint.read(name + ".weight").numbers(torch.float32).to(self.device) * math.sqrt(width)

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

    def _there(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def _sides(self, matrix: Matrix) -> tuple[int, int]:
        outputs, inputs = (size(side, lambda axis: axis.count) for side in (matrix.outputs, matrix.inputs))
        return outputs, inputs

    def _mine(self, axis: Axis | int) -> range:
        """Numbers along an axis that is divided."""
        assert isinstance(axis, Axis), "before a stage's last projection rows are divided, and columns of that one"
        pieces = self.share.of(axis)
        return range(pieces.start * axis.width, pieces.stop * axis.width)

    def _bytes(self, name: str, matrix: Matrix) -> int:
        """Of this rank's part of a matrix, in the files; none of one that is another's."""
        if f"{name}.weight" not in self.checkpoint:
            return 0
        outputs, inputs = self._sides(matrix)
        return self.checkpoint.stored(f"{name}.weight") * self.share.numbers(matrix) // max(1, outputs * inputs)

    def _read(self, name: str, matrix: Matrix, rows: range | None = None, columns: range | None = None) -> TensorPart:
        """A part of its weight. Raises `InputError` for one that says nothing without a scale."""
        part = self.checkpoint.read(f"{name}.weight", rows, columns)
        if isinstance(part, Plain) and (part.values.itemsize == 1 or not part.values.is_floating_point()):
            raise InputError(
                f"{self.checkpoint.path}: {name}.weight is in {part.values.dtype}, and no scale says what that means; "
                "download the checkpoint again"
            )
        self._done += self._bytes(name, matrix)
        self._progress(self._done, self._total)
        return part

    def _rows(self, prefix: str, matrix: Matrix, into: Tensor) -> Tensor | None:
        """This rank's rows of a projection, in float32, go `into` a tensor; their bias is returned."""
        name, rows = prefix + matrix.name, self._mine(matrix.outputs)
        self._read(name, matrix, rows=rows).into(into)
        bias = None
        if matrix.biased:
            bias = self.checkpoint.read(name + ".bias", rows=rows).numbers(torch.float32)
        if matrix.paired:
            assert isinstance(matrix.outputs, Axis), "what is turned by position is made of heads"
            heads = len(self.share.of(matrix.outputs)), matrix.outputs.width
            into.copy_(_pairs(into.view(*heads, into.shape[1])).view(into.shape))
            bias = _pairs(bias.view(heads)).flatten() if bias is not None else None
        return bias

    def _columns(self, prefix: str, matrix: Matrix) -> Linear:
        name = prefix + matrix.name
        weight = self._own(self._read(name, matrix, columns=self._mine(matrix.inputs)))
        bias = None
        if matrix.biased:
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
            own = self._own(self._read(matrix.name, matrix, rows=rows))
            weight = weight if self.blueprint.tied and torch.equal(own, weight) else own
        return Linear(weight, exact_rows=self.exact_rows, packed=False)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(weight, bias, exact_rows=self.exact_rows)

    def _demand(self, name: str, *shape: int) -> None:
        there = self.checkpoint.shape(name)
        if there != list(shape):
            told = f"{name} has the shape {there}, but the configuration calls for {list(shape)}"
            raise InputError(f"{self.checkpoint.path}: {told}")
