"""What a model consists of, declared once: its stages in order, their matrices, and how each is divided over ranks.

Loading, shares, memory, costs, programs and pictures follow from it; families.py has one for each family. No torch;
knows names and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

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
class Matrix:
    """A projection [outputs, inputs], by its name in the checkpoint without ".weight"; in a layer what follows the
    layer's own prefix. A side that is an axis is divided over ranks, a number is whole on all. `paired`: its heads are
    turned by position."""

    name: str
    outputs: Axis | int
    inputs: Axis | int
    biased: bool = False
    paired: bool = False


@dataclass(frozen=True)
class StageParts:
    """A stage and what it holds.

    `first`: matrices by rows, fused in this order, up to the last projection, with the norm before them folded in;
    `last`: by columns, so that its sum over ranks is the contribution. `scales`: norms of single heads, with the heads'
    axis. `remembers`: pieces of an axis that each token leaves twice, as keys and as values. `traffic`: numbers that
    are read and written for each output of `first`.
    """

    stage: Stage
    norm: str = ""
    first: tuple[Matrix, ...] = ()
    last: Matrix | None = None
    scales: tuple[tuple[str, Axis], ...] = ()
    remembers: Axis | None = None
    traffic: float = 0.0

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return (*self.first, *((self.last,) if self.last else ()))


@dataclass(frozen=True)
class Blueprint:
    """A model: stages before its layers, of each layer, after them.

    `head`: the last stage's matrix; `tied`: it is the embedding's unless the checkpoint has another. `windows`: for
    each layer, how many positions a token attends to (its own included), or None for all. `prefix`: of a layer's
    tensors, with {} for its number.
    """

    hidden: int
    axes: tuple[Axis, ...]
    before: tuple[StageParts, ...]
    layer: tuple[StageParts, ...]
    after: tuple[StageParts, ...]
    layers: int
    embedding: Matrix
    head: Matrix
    tied: bool
    windows: tuple[int | None, ...]
    prefix: str = "model.layers.{}."

    @cached_property
    def outline(self) -> Outline:
        """The stages as programs know them."""
        before, layer, after = (tuple(p.stage for p in parts) for parts in (self.before, self.layer, self.after))
        return Outline(before, layer, after, self.layers)

    @property
    def window(self) -> int | None:
        """Of all layers, where they are alike; None where one sees everything."""
        alike = set(self.windows)
        return alike.pop() if len(alike) == 1 else None

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
        """Every matrix that is there once in a checkpoint, by its name there without ".weight"; a head also where it
        may be the embedding's."""
        for layer in range(self.layers):
            prefix = self.prefix.format(layer)
            yield from ((prefix + matrix.name, matrix) for parts in self.layer for matrix in parts.matrices)
        yield from ((matrix.name, matrix) for matrix in (self.embedding, self.head))

    @cached_property
    def tensors(self) -> dict[str, list[int]]:
        """All of a checkpoint, with their shapes."""
        found: dict[str, list[int]] = {}
        for name, matrix in self.named:
            outputs, inputs = size(matrix.outputs, _whole), size(matrix.inputs, _whole)
            found |= {f"{name}.weight": [outputs, inputs]} | ({f"{name}.bias": [outputs]} if matrix.biased else {})
        prefixes = [(self.prefix.format(layer), parts) for layer in range(self.layers) for parts in self.layer]
        for prefix, parts in [*prefixes, *(("", parts) for parts in self.after)]:
            scales = {parts.norm: self.hidden} if parts.norm else {}
            scales |= {name: axis.width for name, axis in parts.scales}
            found |= {f"{prefix}{name}.weight": [width] for name, width in scales.items()}
        return found

    @property
    def numbers(self) -> int:
        """All parameters of matrices."""
        return sum(times * size(m.outputs, _whole) * size(m.inputs, _whole) for m, times in self.held)


def size(side: Axis | int, pieces: Callable[[Axis], int]) -> int:
    """Numbers along a matrix's side, of a rank that has so many pieces of an axis."""
    return side if isinstance(side, int) else pieces(side) * side.width


def _whole(axis: Axis) -> int:
    return axis.count
