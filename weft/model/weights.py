"""One rank's weights, read from a checkpoint as the blueprint says.

    before a stage's last projection  by rows: each rank computes its own heads and its own part of the MLP
    the last projection               by columns: each rank adds a partial of the whole width
    embedding                         whole on every rank; output head by rows (vocabulary)
    norms                             whole on every rank, folded into the projection behind (see kernels.UnitRows)

A rank of a pipeline reads its own layers alone, and the embedding or the head where these begin or end.

Matrices are read, fused, converted and packed one at a time, so that loading peaks at the shard and one matrix.
Knows names and shares; knows nothing of how the weights are used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from weft.errors import InputError
from weft.formats.checkpoint import Checkpoint, bits_of
from weft.formats.packed import Codes
from weft.model.blueprint import (
    AttentionBranch,
    Blueprint,
    Branch,
    Matrix,
    Norm,
    ProjectionBranch,
    StageParts,
)
from weft.model.filling import Filling
from weft.model.kept_weights import KeptWeights
from weft.model.kernels.choice import Kernels, format_of
from weft.model.kernels.formats import (
    FEW_BITS,
    Formats,
    Gathering,
    bytes_of,
    head_of,
    table_of,
)
from weft.model.kernels.linear import Linear, NoKernel, Stored
from weft.model.kernels.looked_up import LookedUp
from weft.model.matrices import Into, MatrixReader, blocks, pair
from weft.model.shares import Share


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
    """All that one rank holds: `stages` by part and layer; the embedding where all layers begin, the head where they
    end. `gain`: of the last norm, which a tied head can't take in. `kinds`: bytes in each format; `finer`: matrices
    that lose too much in the format that was asked for."""

    embedding: LookedUp | None
    stages: dict[tuple[str, int], StageWeights]
    gain: Gain | None
    head: Linear | None
    kinds: dict[str, int]
    finer: list[str]
    device: torch.device
    dtype: torch.dtype  # what is computed in

    @property
    def bytes(self) -> int:
        """That they take."""
        return sum(self.kinds.values())


def load(
    checkpoint: Checkpoint, blueprint: Blueprint, share: Share, *, device: str = "cpu",
    dtype: torch.dtype = torch.float32, kernels: Kernels | None = None, weights: str | None = None,
    kept: Callable[[str], KeptWeights] | None = None, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:  # fmt: skip
    """Reads a rank's shard. `weights`: what matrices are kept in, see `formats.Formats`; if not given, the `dtype` that
    is computed in. `kept`: what an earlier start has left of a part, or where this one leaves it; it is closed.
    `progress(done, total)` is called in bytes of the checkpoint's files.

    Raises `InputError` for missing, unreadable or misshapen tensors, and for some that would change what is computed.
    """
    kernels = kernels or Kernels()
    computed_in = str(dtype).removeprefix("torch.")
    wanted = Formats(weights or computed_in, computed_in, partial(bits_of, checkpoint), kernels.faster, kernels.works)
    filling = Filling(wanted, computed_in, kept)
    reader = _ShardReader(checkpoint, blueprint, share, device, dtype, kernels, filling, progress)
    reader.demand_all()
    reader.choose_kernels()
    stages: dict[tuple[str, int], StageWeights] = {}
    divided = repr(sorted(share.ranges.items()))
    for layer in share.layers:
        with filling.part(f"layer {layer} {divided}"):
            for parts in blueprint.layer:
                stages[parts.stage.part, layer] = reader.stage(parts, blueprint.prefix.format(layer))
        checkpoint.forget()
    embedding = head = gain = None
    if share.begins:
        with filling.part("embedding"):
            embedding = reader.embedding()
    if share.ends:
        with filling.part(f"head {share.ranges['vocabulary']}"):
            head = reader.head(embedding)
        gain = reader.gain("", blueprint.norm)
    checkpoint.forget()
    return Weights(embedding, stages, gain, head, dict(reader.kinds), filling.finer, torch.device(device), dtype)


class _HeadKept(NamedTuple):
    """The head: its tensor's name, its format and shape, and whether it is the embedding in memory too, or is at least
    multiplied with as if it were: where all ranks' bits are to be those of one."""

    name: str
    format: str
    shape: tuple[int, int]
    shared: bool
    as_shared: bool


class _ShardReader:
    def __init__(
        self, checkpoint: Checkpoint, blueprint: Blueprint, share: Share, device: str, dtype: torch.dtype,
        kernels: Kernels, filling: Filling, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.checkpoint, self.blueprint, self.share = checkpoint, blueprint, share
        self.device, self.dtype, self.kernels = device, dtype, kernels
        self.filling, self.wanted = filling, filling.wanted
        self.matrices = MatrixReader(checkpoint, blueprint, share, progress)
        self.kinds = Counter[str]()
        matrices = (matrix for parts in blueprint.layer for matrix in parts.matrices)
        self.halves = max((matrix.halves for matrix in matrices), default=0)

    def demand_all(self) -> None:
        """Before memory is taken for any: raises `InputError` for the first that is missing or misshapen, and for what
        would change what is computed."""
        if unexpected := self.checkpoint.unexpected(self.blueprint.tensors):
            more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
            raise InputError(
                f"{self.checkpoint.path} has {', '.join(unexpected[:3])}{more}, of which weft does not know what they "
                "are for: it would answer wrongly; give another checkpoint"
            )
        embedding, head = (f"{matrix.name}.weight" for matrix in (self.blueprint.embedding, self.blueprint.head))
        for name, shape in self.blueprint.tensors.items():
            if not (self.blueprint.tied and name in (embedding, head) and name not in self.checkpoint):
                self._demand(name, *shape)
        self._demand(f"{self.embedding_name}.weight", *self.blueprint.tensors[embedding])

    def choose_kernels(self) -> None:
        """Before memory is taken for any weight: where a machine has not seen a shape yet, kernels are tried on it.
        Raises `InputError` for a format that has none."""
        if self.device != "cpu":
            return
        try:
            for layer in self.share.layers:
                self._choose_for(self.blueprint.prefix.format(layer))
            if self.share.ends:
                head = self._head_kept
                self.kernels.choose_for(head.format, head.shape, head.as_shared)
        except NoKernel as error:
            raise InputError(f"{error}; give other --weights") from None

    def _choose_for(self, prefix: str) -> None:
        for branch in (branch for parts in self.blueprint.layer for branch in parts.branches):
            kept = [self._first_kept(branch, prefix)] if branch.first else []
            kept += [self._last_kept(branch.last, prefix)] if branch.last is not None else []
            for format_, shape in kept:
                self.kernels.choose_for(format_, shape)

    def _first_kept(self, branch: Branch, prefix: str) -> tuple[str, tuple[int, int]]:
        """Format and shape of a branch's fused projections."""
        shape = sum(len(self.matrices.mine(matrix.outputs)) for matrix in branch.first), self.blueprint.hidden
        return self.wanted((f"{prefix}{matrix.name}.weight" for matrix in branch.first), shape), shape

    def _last_kept(self, matrix: Matrix, prefix: str) -> tuple[str, tuple[int, int]]:
        """Of a last projection."""
        shape = self.matrices.sides(matrix)[0], len(self.matrices.mine(matrix.inputs))
        return self.wanted([f"{prefix}{matrix.name}.weight"], shape), shape

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
            sinks = self.checkpoint.read(prefix + name, rows=self.matrices.mine(axis, 1)).numbers(torch.float32)
        return BranchWeights(first, last, scales, None if sinks is None else self._there(sinks, torch.float32))

    def _first(self, branch: Branch, prefix: str) -> Linear:
        """The fused projections, with the norm before them: folded in, or, into codes that can't take it in, applied to
        the rows."""
        format_, shape = self._first_kept(branch, prefix)
        scale, shift = None, None
        bias = torch.cat([self.matrices.biases(prefix, matrix) for matrix in branch.first])
        if branch.norm is not None:
            scale, shift = self._norm(prefix, branch.norm, self.blueprint.hidden)

        def fill(weight: Gathering) -> None:
            folded = (None, None) if isinstance(weight.stored, Codes) else (scale, shift)
            start = 0
            for matrix in branch.first:
                count = len(self.matrices.mine(matrix.outputs))
                here = bias[start : start + count]
                self.matrices.rows(prefix, matrix, Into(weight, start, *folded, here))
                start += count

        weight = self.filling(f"{prefix}{branch.first[0].name}", format_, shape, fill)
        for matrix in branch.first:
            self.matrices.count(prefix + matrix.name, matrix)
        folds = not isinstance(weight.stored, Codes)
        biased = any(matrix.biased for matrix in branch.first) or (folds and shift is not None)
        linear = self._linear(weight, bias if biased else None)
        if scale is None or folds:
            return linear
        return self.kernels.gained(linear, self._there(scale), None if shift is None else self._there(shift))

    def embedding(self) -> LookedUp:
        """Which every rank has, whole, with which the layers begin."""
        matrix, name = self.blueprint.embedding, self.embedding_name
        shape = self.matrices.sides(matrix)

        def fill(weight: Gathering) -> None:
            self.matrices.plain(name, range(shape[0]), Into(weight))

        weight = self.filling("embedding", self.wanted([f"{name}.weight"], shape, True), shape, fill, table_of)
        self.matrices.count(name, matrix)
        self.kinds[format_of(weight.stored)] += bytes_of(weight.stored)
        stored = weight.stored.clone() if isinstance(weight.stored, Codes) else weight.stored  # not what lies in a file
        return LookedUp(self._moved(stored), self.dtype)

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

    def _there(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return values.to(self.device, dtype or self.dtype)

    def _columns(self, prefix: str, matrix: Matrix) -> Linear:
        name = prefix + matrix.name
        format_, shape = self._last_kept(matrix, prefix)

        def fill(weight: Gathering) -> None:
            self.matrices.columns(prefix, matrix, Into(weight))

        weight = self.filling(name, format_, shape, fill)
        self.matrices.count(name, matrix)
        bias = None
        if matrix.biased and self.share.leads:  # the sum over ranks would count a bias once a rank: one rank adds it
            bias = self.checkpoint.read(name + ".bias").numbers(torch.float32) * matrix.factor
        return self._linear(weight, bias)

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
                pair(each, self.halves)
            rows.append(each)
        return self._there(torch.cat(rows))

    @property
    def embedding_name(self) -> str:
        """Of tied ones, either may be what was saved."""
        own, head = self.blueprint.embedding.name, self.blueprint.head.name
        swapped = self.blueprint.tied and f"{head}.weight" in self.checkpoint and f"{own}.weight" not in self.checkpoint
        return head if swapped else own

    def head(self, embedding: LookedUp | None) -> Linear:
        """A view of the embedding, if they are tied and the checkpoint doesn't say otherwise: as in transformers, a
        head of its own that differs counts for more than config.json."""
        matrix, mine = self.blueprint.head, self.matrices.mine(self.blueprint.head.outputs)
        kept = self._head_kept
        if kept.shared and embedding is not None and isinstance(embedding.stored, Tensor):
            return self.kernels.linear(embedding.stored[mine.start : mine.stop], shared=True)

        def fill(weight: Gathering) -> None:
            self.matrices.plain(kept.name, mine, Into(weight))

        weight = self.filling("head", kept.format, kept.shape, fill)
        self.matrices.count(matrix.name, matrix)
        return self._linear(weight, None, kept.as_shared)

    @cached_property
    def _head_kept(self) -> _HeadKept:
        matrix, mine = self.blueprint.head, self.matrices.mine(self.blueprint.head.outputs)
        own = f"{matrix.name}.weight" in self.checkpoint
        alike = self.blueprint.tied and (not own or self._same(matrix, mine))
        name, shape = self.embedding_name if alike else matrix.name, (len(mine), self.blueprint.hidden)
        format_ = head_of(self.wanted([f"{name}.weight"], shape, True))
        alike &= format_ not in FEW_BITS
        here = alike and self.share.begins
        return _HeadKept(name, format_, shape, here, here or (alike and self.kernels.exact_rows))

    def _same(self, head: Matrix, mine: range) -> bool:
        """Whether a tied head that the checkpoint has nevertheless is the embedding."""
        if self.embedding_name == head.name:
            return True
        for rows in blocks(mine, self.blueprint.hidden):
            one, other = (
                self.matrices.read(name, rows=rows).numbers(torch.float32) for name in (head.name, self.embedding_name)
            )
            if not torch.equal(one, other):
                return False
        return True

    def _linear(self, weight: Gathering, bias: Tensor | None, shared: bool = False) -> Linear:
        self.kinds[format_of(weight.stored)] += bytes_of(weight.stored)
        return self.kernels.linear(self._moved(weight.stored), None if bias is None else self._there(bias), shared)

    def _moved(self, stored: Stored) -> Stored:
        return stored.to(self.device) if isinstance(stored, Tensor) else stored

    def _demand(self, name: str, *shape: int) -> None:
        there = self.checkpoint.shape(name)
        if there != list(shape):
            told = f"{name} has the shape {there}, but the configuration calls for {list(shape)}"
            raise InputError(f"{self.checkpoint.path}: {told}")
