"""The residual stream of one pass: stages read it, and their contributions come to it, in the order of the stages.

From some stage on only wanted rows go on (those that become logits); they have a stream of their own, whose rows are
the wanted ones counted from 0. Knows stages and rows; knows nothing of lanes or ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from weft.model.decoder import Decoder, StageFunctions
from weft.model.forward import Extent, Forward
from weft.program.batch import Rows
from weft.program.stages import Outline


class _Sum(NamedTuple):
    """A contribution to the rows that leave a stage. `narrow`: they are counted among the wanted ones."""

    place: int
    stage: StageFunctions
    extent: Extent
    total: Tensor
    narrow: bool


class Residual:
    """`narrow_from`: the place of the stage that wanted rows leave alone."""

    def __init__(self, decoder: Decoder, outline: Outline, narrow_from: int, forward: Forward) -> None:
        self.outline, self.forward = outline, forward
        self._rows, self._kept = forward.batch.tokens, len(forward.batch.wanted_rows)
        self._some = self._kept < self._rows
        self.narrow_from = narrow_from if self._some else len(outline.stages)  # where all are wanted, all go on
        self._head = len(outline.stages) - 1
        self.hidden = decoder.empty_hidden(self._rows)
        self.kept = decoder.empty_hidden(self._kept) if self._some else self.hidden
        self._lagging = outline.lags
        self._sums: list[_Sum] = []

    def leaves_alone(self, place: int) -> bool:
        """Whether wanted rows alone leave the stage at this place."""
        return place >= self.narrow_from

    def commit(self) -> None:
        """Has the system give the memory, where nothing is computed that would."""
        self.hidden.zero_()
        self.kept.zero_()

    def wanted(self, rows: Rows) -> Rows:
        """What goes on of some rows of the batch where only wanted ones do."""
        return self.forward.batch.wanted(rows) if self._some else rows

    def put(self, place: int, stage: StageFunctions, extent: Extent, total: Tensor) -> None:
        """A stage's contribution to what leaves it: there, or there once a later step may read it."""
        self._sums.append(_Sum(place, stage, extent, total, self.leaves_alone(place)))

    def stream(self, place: int, rows: Rows) -> Tensor:
        """What a stage reads of some rows of the batch, with all that has come to them."""
        narrow = place > self.narrow_from
        self._absorb(rows, self.outline.input_until(place), narrow)
        return self._view(self.wanted(rows) if narrow else rows, narrow)

    def left_by(self, place: int, extent: Extent) -> Tensor:
        """Where what a stage and those before it left of some rows is, or comes to from other ranks."""
        return self._view(extent.leaves, self.leaves_alone(place))

    def read(self, place: int, rows: Rows) -> Tensor:
        """The same; and where wanted rows go on alone from this stage on, they are taken out. All rows are left to a
        stage that remembers them; the output head sees those alone from which a token follows."""
        stream = self.stream(place, rows)
        if place == self.narrow_from:
            leaves = self.wanted(rows)
            taken = self.pick(stream, rows)
            self.kept[leaves.start : leaves.stop] = taken
            stream = stream if self.outline.stages[place].ordered else taken
        return stream if place < self._head else self.forward.predicting(stream, rows)

    def left(self) -> Tensor:
        """All wanted rows, as the last layer left them, once all that comes to them is there."""
        rows = Rows(0, self._rows)
        stream = self.stream(self._head, rows)
        return self.pick(stream, rows) if self._head == self.narrow_from else stream

    def pick(self, values: Tensor, rows: Rows) -> Tensor:
        """The wanted ones of some rows of the batch."""
        return self.forward.pick(values, rows)

    def _absorb(self, rows: Rows, until: int, narrow: bool) -> None:
        """Adds all contributions of the stages up to `until` to some rows of the batch.

        They have arrived: a legal program's step waits for the collectives of its rows.
        """
        sums, self._sums = self._sums, []
        if self._lagging:
            sums.sort(key=lambda each: each.place)
        for each in sums:
            mine = self.wanted(rows) if each.narrow else rows
            if each.place > until or not each.extent.leaves.intersects(mine):
                self._sums.append(each)
            elif self._lagging:
                self._absorb_part(each, mine.clip(each.extent.leaves), narrow)
            else:  # no reader of other rows goes without it: all at once
                self._add(each)

    def _absorb_part(self, each: _Sum, rows: Rows, narrow: bool) -> None:
        """Some rows of a contribution; the others are left to later readers."""
        begin, end = each.extent.leaves
        for left in (Rows(begin, rows.start), Rows(rows.stop, end)):
            if left.length:
                rest = each.total[left.start - begin : left.stop - begin]
                self._sums.append(each._replace(extent=Extent(left, left), total=rest))
        total = each.total[rows.start - begin : rows.stop - begin]
        if narrow and not each.narrow:  # it came to all rows, and only these go on
            leaves = self.wanted(rows)
            self._add(each._replace(extent=Extent(rows, leaves), total=self.pick(total, rows), narrow=True))
        else:
            self._add(each._replace(extent=Extent(rows, rows), total=total))

    def _add(self, each: _Sum) -> None:
        stream = self._view(each.extent.leaves, each.narrow)
        each.stage.absorb(self.forward, each.extent, stream, each.total)

    def _view(self, rows: Rows, narrow: bool) -> Tensor:
        """Rows of one of the two streams; all of them, as when decoding, without a view being made."""
        stream, count = (self.kept, self._kept) if narrow else (self.hidden, self._rows)
        return stream if rows.stop - rows.start == count else stream[rows.start : rows.stop]
