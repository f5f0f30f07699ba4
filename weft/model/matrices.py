"""Reading a rank's part of matrices: which rows and columns are its own, in which order, and with what folded in.

What is read goes into a weight that is being gathered, a few rows at a time, so that no matrix is ever there whole in
float32. Knows names, shares and orders; knows nothing of formats, or of how weights are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from weft.errors import InputError
from weft.formats.checkpoint import Checkpoint
from weft.formats.packed import Packed, Plain, TensorPart
from weft.model.blueprint import Axis, Blueprint, Matrix, size
from weft.model.kernels.formats import Gathering
from weft.model.shares import Share

BLOCK = 1 << 22  # numbers that are read at a time, in float32


class Into(NamedTuple):
    """Where rows that are read go: into a weight from `start` on, times a norm's `scale`; its `shift` goes into their
    biases."""

    weight: Gathering
    start: int = 0
    scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor = torch.empty(0)


def blocks(rows: range, inputs: int, unit: int = 1) -> Iterator[range]:
    """Rows in order, a few at a time, in whole units."""
    many = max(1, BLOCK // max(1, inputs) // unit) * unit
    for start in range(rows.start, rows.stop, many):
        yield range(start, min(rows.stop, start + many))


def paired(count: int, width: int, halves: int) -> Tensor:
    """The order of so many rows, heads of a `width`, in which `pair` leaves them."""
    places = torch.arange(count).view(-1, width)
    pair(places, halves)
    return places.flatten()


def pair(heads: Tensor, halves: int) -> None:
    """Reorders the first `halves` of a head's width D from (x, x + halves/2) to neighbours, as `elementwise.rotate`
    wants it, in place.

    Queries and keys are reordered alike, so their products stay what they were. [..., D, ...] with D second.
    """
    if halves <= 2:  # two numbers are neighbours
        return
    turned = heads[:, :halves]
    turned.copy_(torch.unflatten(turned, 1, (2, halves // 2)).transpose(1, 2).flatten(1, 2))


class MatrixReader:
    """Of one rank. `progress(done, total)` is called in bytes of its files."""

    def __init__(
        self, checkpoint: Checkpoint, blueprint: Blueprint, share: Share, progress: Callable[[int, int], None]
    ) -> None:  # fmt: skip
        self.checkpoint, self.blueprint, self.share = checkpoint, blueprint, share
        self._progress, self._done = progress, 0
        self._total = sum(
            self._bytes(name, matrix) for name, matrix in blueprint.part(share.layers, share.begins, share.ends)
        )

    def sides(self, matrix: Matrix) -> tuple[int, int]:
        outputs, inputs = (size(side, lambda axis: axis.count) for side in (matrix.outputs, matrix.inputs))
        return outputs, inputs

    def mine(self, axis: Axis | int, width: int | None = None) -> range:
        """Numbers along an axis that is divided. `width`: of a piece, where it isn't the axis's own."""
        assert isinstance(axis, Axis), "before a stage's last projection rows are divided, and columns of that one"
        pieces, width = self.share.of(axis), axis.width if width is None else width
        return range(pieces.start * width, pieces.stop * width)

    def _bytes(self, name: str, matrix: Matrix) -> int:
        """Of this rank's part of a matrix, in the files; none of one that is another's."""
        if f"{name}.weight" not in self.checkpoint:
            return 0
        outputs, inputs = self.sides(matrix)
        outputs = matrix.within.rows if matrix.within else outputs
        return self.checkpoint.stored(f"{name}.weight") * self.share.numbers(matrix) // max(1, outputs * inputs)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> TensorPart:
        """A part of its weight. Raises `InputError` for one that says nothing without a scale."""
        part = self.checkpoint.read(f"{name}.weight", rows, columns)
        if isinstance(part, Plain) and (part.values.itemsize == 1 or not part.values.is_floating_point()):
            raise InputError(
                f"{self.checkpoint.path}: {name}.weight is in {part.values.dtype}, and no scale says what that means; "
                "download the checkpoint again"
            )
        return part

    def count(self, name: str, matrix: Matrix) -> None:
        """Counts what was read."""
        self._done += self._bytes(name, matrix)
        self._progress(self._done, self._total)

    def _placed(self, matrix: Matrix) -> Iterator[tuple[range, range]]:
        """Where this rank's rows of a matrix are in its tensor, and among each other."""
        rows, axis, within = self.mine(matrix.outputs), matrix.outputs, matrix.within
        assert isinstance(axis, Axis), "rows are divided"
        if within is None or within.step == axis.width:
            start = rows.start + (within.start if within else 0)
            yield range(start, start + len(rows)), range(len(rows))
            return
        for number, piece in enumerate(self.share.of(axis)):
            start = within.start + piece * within.step
            yield range(start, start + axis.width), range(number * axis.width, (number + 1) * axis.width)

    def rows(self, prefix: str, matrix: Matrix, into: Into) -> None:
        """This rank's rows of a projection."""
        name, width = prefix + matrix.name, matrix.outputs.width if isinstance(matrix.outputs, Axis) else 1
        for there, here in self._placed(matrix):
            for some in blocks(there, self.blueprint.hidden, width):
                start = here.start + some.start - there.start
                order = paired(len(some), width, matrix.halves) if matrix.halves else None
                self._put(into, self.read(name, rows=some), start, matrix.factor, order)

    def biases(self, prefix: str, matrix: Matrix) -> Tensor:
        """Of this rank's rows of a projection, float32; zeros, if it has none."""
        biases = torch.zeros(len(self.mine(matrix.outputs)))
        if matrix.biased:
            for there, here in self._placed(matrix):
                read = self.checkpoint.read(f"{prefix}{matrix.name}.bias", rows=there).numbers(torch.float32)
                biases[here.start : here.stop] = read * matrix.factor
        if matrix.halves and matrix.biased:
            assert isinstance(matrix.outputs, Axis), "what is turned by position is made of heads"
            pair(biases.view(-1, matrix.outputs.width), matrix.halves)
        return biases

    def _put(
        self, into: Into, part: TensorPart, start: int, factor: float = 1.0, order: Tensor | None = None
    ) -> None:  # fmt: skip
        """Some rows; in another order, if one is given."""
        if isinstance(part, Packed) and into.scale is None and self._put_codes(into, part, start, factor, order):
            return
        rows = part.numbers(torch.float32)
        rows = rows if order is None else rows[order]
        rows = rows if factor == 1.0 else rows * factor
        if into.shift is not None:
            into.bias[start : start + len(rows)].addmv_(rows, into.shift)
        if into.scale is not None:  # in float32: a product of two bfloat16 would be rounded twice
            rows = rows * into.scale
        into.weight.put(into.start + start, rows)

    @staticmethod
    def _put_codes(into: Into, part: Packed, start: int, factor: float, order: Tensor | None) -> bool:
        """Codes as the checkpoint has them, where the format takes such: no number is rounded again."""
        if not into.weight.takes_codes:
            return False
        some = part.unpack(range(part.rows)).columns(part.keep)
        if some is None:
            return False
        some = some if order is None else some.rows(order)
        return into.weight.put_codes(into.start + start, some if factor == 1.0 else some.times(factor))

    def columns(self, prefix: str, matrix: Matrix, into: Into) -> None:
        """This rank's columns of a last projection."""
        mine = self.mine(matrix.inputs)
        for rows in blocks(range(self.sides(matrix)[0]), len(mine)):
            part = self.read(prefix + matrix.name, rows=rows, columns=mine)
            self._put(into, part, rows.start, matrix.factor)

    def plain(self, name: str, mine: range, into: Into) -> None:
        """Rows of a tensor as they are."""
        for rows in blocks(mine, self.blueprint.hidden):
            self._put(into, self.read(name, rows=rows), rows.start - mine.start)
