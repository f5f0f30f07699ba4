"""What a model consists of, declared once: its stages in order, their matrices, and how each is divided over ranks.

Loading, shares, memory, costs, programs and pictures follow from it; families.py has the rows that it is made from. No
torch; knows names and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weft.program.stages import Outline, Stage


@dataclass(frozen=True)
class Axis:
    """What is divided over ranks: `count` pieces of `width` numbers, such as heads. Pieces stay together in units of
    `unit`, where that divides about as evenly. `of`: the axis whose division this one follows; each of its pieces
    serves equally many of that one's."""

    name: str
    count: int
    width: int = 1
    unit: int = 1
    of: str = ""

    @property
    def numbers(self) -> int:
        """All pieces together."""
        return self.count * self.width


@dataclass(frozen=True)
class Within:
    """Where a matrix's rows are in a larger one of `rows`: of piece i of its axis from `start` + i * `step` on."""

    start: int
    step: int
    rows: int


@dataclass(frozen=True)
class Matrix:
    """A projection [outputs, inputs], by its name in the checkpoint without ".weight"; in a layer what follows the
    layer's own prefix. A side that is an axis is divided over ranks, a number is whole on all.

    `halves`: of each head, so many first numbers are turned by position, each with the one half of that on; 0 for none,
    or where those are neighbours. `factor`: what it is multiplied by as it is read. `within`: it is a part of the
    tensor of that name.
    """

    name: str
    outputs: Axis | int
    inputs: Axis | int
    biased: bool = False
    halves: int = 0
    factor: float = 1.0
    within: Within | None = None


@dataclass(frozen=True)
class Norm:
    """A norm of rows, or of heads: over the root of their mean square; `centred`: less their mean, first. Then times
    `factor` * (weight + `offset`), and with `biased` plus `factor` * bias. `name`: of its tensors."""

    name: str
    centred: bool = False
    offset: float = 0.0
    biased: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Branch:
    """What makes a contribution, or a part of one: matrices by rows, fused in this order, with the norm before them
    folded in; and the last projection, by columns, so that its sum over ranks is the contribution.

    `traffic`: numbers that are read and written for each output of `first`.
    """

    first: tuple[Matrix, ...] = ()
    last: Matrix | None = None
    norm: Norm | None = None
    traffic: float = 0.0

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return (*self.first, *((self.last,) if self.last else ()))

    def vectors(self, hidden: int) -> Iterator[tuple[str, int]]:
        """Its other tensors, by name and length."""
        yield from _of_norm(self.norm, hidden)


@dataclass(frozen=True)
class ProjectionBranch(Branch):
    """Queries, keys and values, and the norms of queries and keys (with their axes): of each head, or over all heads
    of all ranks, which then is a stage of its own."""

    head_norms: tuple[tuple[Norm, Axis], ...] = ()
    across: bool = False

    def vectors(self, hidden: int) -> Iterator[tuple[str, int]]:
        """See `Branch`."""
        yield from super().vectors(hidden)
        for norm, axis in self.head_norms:
            yield from _of_norm(norm, axis.numbers if self.across else axis.width)


@dataclass(frozen=True)
class AttentionBranch(ProjectionBranch):
    """Attention; without matrices before the last where a stage before has projected.

    `remembers`: pieces of an axis that each token leaves twice, as keys and as values. `softcap`: scores s become
    softcap * tanh(s / softcap). `sinks`: the tensor with a score a query head (their axis beside it) that counts in
    the denominators alone.
    """

    remembers: Axis | None = None
    softcap: float | None = None
    sinks: tuple[str, Axis] | None = None

    def vectors(self, hidden: int) -> Iterator[tuple[str, int]]:
        """See `Branch`."""
        yield from super().vectors(hidden)
        if self.sinks is not None:
            yield self.sinks[0], self.sinks[1].count


@dataclass(frozen=True)
class MlpBranch(Branch):
    """An MLP; `gated`: the first half of `first` goes through the activation and is multiplied by the second."""

    activation: str = "silu"
    gated: bool = True


@dataclass(frozen=True)
class StageParts:
    """A stage and what it holds: branches whose sum it contributes, and the norm of that (`post`), if any. All
    branches read one input by one kind of norm, each with weights of its own."""

    stage: Stage
    branches: tuple[Branch, ...] = ()
    post: Norm | None = None

    @property
    def first(self) -> tuple[Matrix, ...]:
        """Matrices up to the last projections."""
        return tuple(matrix for branch in self.branches for matrix in branch.first)

    @property
    def last(self) -> tuple[Matrix, ...]:
        """The last projections."""
        return tuple(branch.last for branch in self.branches if branch.last is not None)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return tuple(matrix for branch in self.branches for matrix in branch.matrices)

    @property
    def remembers(self) -> Axis | None:
        """See `AttentionBranch`."""
        attentions = (branch for branch in self.branches if isinstance(branch, AttentionBranch))
        return next((branch.remembers for branch in attentions), None)

    def vectors(self, hidden: int) -> Iterator[tuple[str, int]]:
        """Tensors that are no matrices, by name and length."""
        for branch in self.branches:
            yield from branch.vectors(hidden)
        yield from _of_norm(self.post, hidden)


def _of_norm(norm: Norm | None, width: int) -> Iterator[tuple[str, int]]:
    if norm is not None:
        yield f"{norm.name}.weight", width
    if norm is not None and norm.biased:
        yield f"{norm.name}.bias", width


@dataclass(frozen=True)
class Blueprint:
    """A model: stages before its layers, of each layer, after them.

    `norm`: before the head. `head`: the last stage's matrix; `tied`: it is the embedding's unless the checkpoint has
    another. `windows`: for each layer, how many positions a token attends to (its own included), or None for all.
    `ropes`: ways in which positions turn queries and keys, each as `rope_parameters` of config.json; `turned`: for each
    layer, by which of them, or None for none; `rotary`: how many numbers of a head, rounded up to an even one.
    `epsilon`: of all norms. `prefix`: of a layer's tensors, with {} for its number. `embedding_factor`: what embeddings
    are multiplied by. `softcap`: of the logits.
    """

    hidden: int
    axes: tuple[Axis, ...]
    before: tuple[StageParts, ...]
    layer: tuple[StageParts, ...]
    after: tuple[StageParts, ...]
    layers: int
    embedding: Matrix
    norm: Norm
    head: Matrix
    tied: bool
    windows: tuple[int | None, ...]
    ropes: tuple[dict[str, Any], ...]
    turned: tuple[int | None, ...]
    rotary: int
    epsilon: float
    prefix: str = "model.layers.{}."
    embedding_factor: float = 1.0
    softcap: float | None = None

    @cached_property
    def outline(self) -> Outline:
        """The stages as programs know them."""
        before, layer, after = (tuple(p.stage for p in parts) for parts in (self.before, self.layer, self.after))
        return Outline(before, layer, after, self.layers)

    @cached_property
    def kept(self) -> float:
        """The part of what comes before the last projections of the stage with keys and values, in outputs, that all
        rows go through where only some are wanted: projections, and not an MLP beside."""
        parts = next(parts for parts in self.layer if parts.remembers)
        attention = sum(size(matrix.outputs, _whole) for matrix in parts.branches[0].first)
        return attention / sum(size(matrix.outputs, _whole) for matrix in parts.first) if attention else 1.0

    @property
    def stored(self) -> Iterator[Matrix]:
        """Of a layer, the matrices that all rows go through also where only some are wanted."""
        branches = (branch for parts in self.layer for branch in parts.branches)
        return (matrix for branch in branches if isinstance(branch, ProjectionBranch) for matrix in branch.first)

    def axis(self, name: str) -> Axis:
        """By its name. Raises KeyError."""
        return {axis.name: axis for axis in self.axes}[name]

    @property
    def held(self) -> Iterator[tuple[Matrix, int]]:
        """Every matrix that takes memory, and how often there is one like it."""
        for parts, times in ((self.before, 1), (self.layer, self.layers), (self.after, 1)):
            yield from ((matrix, times) for part in parts for matrix in part.matrices)
        yield self.embedding, 1
        if not self.tied:
            yield self.head, 1

    @property
    def named(self) -> Iterator[tuple[str, Matrix]]:
        """Every matrix that is there once in a checkpoint, by the name of its tensor there without ".weight"; a head
        also where it may be the embedding's."""
        return self.part(range(self.layers), True, True)

    def part(self, layers: range, begins: bool, ends: bool) -> Iterator[tuple[str, Matrix]]:
        """Those of some layers, with the embedding where they are the first ones and the head where the last ones."""
        for layer in layers:
            prefix = self.prefix.format(layer)
            yield from ((prefix + matrix.name, matrix) for parts in self.layer for matrix in parts.matrices)
        yield from ((matrix.name, matrix) for matrix, here in ((self.embedding, begins), (self.head, ends)) if here)

    @cached_property
    def tensors(self) -> dict[str, list[int]]:
        """All of a checkpoint, with their shapes."""
        found: dict[str, list[int]] = {}
        for name, matrix in self.named:
            outputs, inputs = size(matrix.outputs, _whole), size(matrix.inputs, _whole)
            outputs = matrix.within.rows if matrix.within else outputs
            found |= {f"{name}.weight": [outputs, inputs]} | ({f"{name}.bias": [outputs]} if matrix.biased else {})
        for layer in range(self.layers):
            vectors = (vector for parts in self.layer for vector in parts.vectors(self.hidden))
            found |= {self.prefix.format(layer) + name: [width] for name, width in vectors}
        return found | {name: [width] for name, width in _of_norm(self.norm, self.hidden)}

    @property
    def numbers(self) -> int:
        """All parameters of matrices."""
        return sum(times * size(m.outputs, _whole) * size(m.inputs, _whole) for m, times in self.held)


def size(side: Axis | int, pieces: Callable[[Axis], int]) -> int:
    """Numbers along a matrix's side, of a rank that has so many pieces of an axis."""
    return side if isinstance(side, int) else pieces(side) * side.width


def _whole(axis: Axis) -> int:
    return axis.count
