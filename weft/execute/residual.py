"""The residual stream of one pass: stages read it, and their contributions come to it, in the order of the stages.

From some stage on only wanted rows go on (those that become logits); they have a stream of their own, whose rows are
the wanted ones counted from 0. Knows stages and rows; knows nothing of lanes or ranks.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from weft.model.decoder import Decoder, Extent, Forward, StageFunctions
from weft.program.batch import Rows
from weft.program.stages import Outline


class _Sum(NamedTuple):
    """A contribution to some rows. `narrow`: they are counted among the wanted ones."""

    place: int
    stage: StageFunctions
    rows: Rows
    total: Tensor
    narrow: bool


class Residual:
    """`narrow_from`: the place of the stage that wanted rows leave alone."""

    def __init__(self, decoder: Decoder, outline: Outline, narrow_from: int, forward: Forward) -> None:
        self.outline, self.forward, self._narrow_from = outline, forward, narrow_from
        batch = forward.batch
        self.all_wanted = len(batch.wanted_rows) == batch.tokens
        self.hidden = decoder.empty_hidden(batch.tokens)
        self.kept = self.hidden if self.all_wanted else decoder.empty_hidden(len(batch.wanted_rows))
        self._lagging = outline.lags
        self._sums: list[_Sum] = []

    @cached_property
    def _wanted(self) -> Tensor:
        """Places of the wanted rows."""
        return torch.tensor(self.forward.batch.wanted_rows, dtype=torch.long, device=self.hidden.device)

    def leaving(self, place: int, rows: Rows) -> Rows:
        """What of some rows of the batch leaves a stage."""
        narrow = place >= self._narrow_from and not self.all_wanted
        return self.forward.batch.wanted(rows) if narrow else rows

    def put(self, place: int, stage: StageFunctions, rows: Rows, total: Tensor) -> None:
        """A stage's contribution to what leaves it: there, or there once a later step may read it."""
        self._sums.append(_Sum(place, stage, rows, total, place >= self._narrow_from))

    def stream(self, place: int, rows: Rows) -> Tensor:
        """What a stage reads of some rows of the batch, with all that has come to them."""
        narrow = place > self._narrow_from
        self._absorb(rows, self.outline.input_until(place), narrow)
        where = self.leaving(place - 1, rows) if narrow else rows
        return (self.kept if narrow else self.hidden)[where.start : where.stop]

    def read(self, place: int, rows: Rows) -> Tensor:
        """The same; and where wanted rows go on alone from this stage on, they are taken out. All rows are left to a
        stage that remembers them."""
        stream = self.stream(place, rows)
        if place != self._narrow_from or self.all_wanted:
            return stream
        leaves = self.leaving(place, rows)
        taken = self.pick(stream, rows)
        self.kept[leaves.start : leaves.stop] = taken
        return stream if self.outline.stages[place].ordered else taken

    def pick(self, values: Tensor, rows: Rows) -> Tensor:
        """The wanted ones of some rows of the batch."""
        leaves = self.forward.batch.wanted(rows)
        return values[self._wanted[leaves.start : leaves.stop] - rows.start]

    def _absorb(self, rows: Rows, until: int, narrow: bool) -> None:
        """Adds all contributions of the stages up to `until` to some rows of the batch.

        They have arrived: a legal program's step waits for the collectives of its rows.
        """
        if not self._sums:
            return
        sums, self._sums = self._sums, []
        for each in sorted(sums, key=lambda each: each.place) if self._lagging else sums:
            mine = self.forward.batch.wanted(rows) if each.narrow and not self.all_wanted else rows
            if each.place > until or not each.rows.intersects(mine):
                self._sums.append(each)
            elif self._lagging:
                self._absorb_part(each, mine.clip(each.rows), narrow)
            else:  # no reader of other rows goes without it: all at once
                self._add(each, each.rows, each.total)

    def _absorb_part(self, each: _Sum, rows: Rows, narrow: bool) -> None:
        """Some rows of a contribution; the others are left to later readers."""
        begin, end = each.rows
        for left in (Rows(begin, rows.start), Rows(rows.stop, end)):
            if left.length:
                self._sums.append(each._replace(rows=left, total=each.total[left.start - begin : left.stop - begin]))
        total = each.total[rows.start - begin : rows.stop - begin]
        if narrow and not each.narrow and not self.all_wanted:  # it came to all rows, and only these go on
            each, total, rows = each._replace(narrow=True), self.pick(total, rows), self.forward.batch.wanted(rows)
        self._add(each, rows, total)

    def _add(self, each: _Sum, rows: Rows, total: Tensor) -> None:
        stream = self.kept if each.narrow else self.hidden
        each.stage.absorb(self.forward, Extent(rows, rows), stream[rows.start : rows.stop], total)
