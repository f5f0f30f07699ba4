"""What the model's stages need to know of one batch. Knows rows, positions and memory; knows no stage.

Shapes: T rows of the call, L of them that leave, M model width, H this rank's query heads, G its key/value heads,
D head width.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from weft.cache.places import Passage, PassagePlaces
from weft.cache.slabs import Slabs
from weft.program.batch import Batch, Rows


class Extent(NamedTuple):
    """What a step is about: `rows` of the batch, and which rows leave the stage; these are other ones where the batch's
    wanted rows, counted from 0, go on alone."""

    rows: Rows
    leaves: Rows


class SequenceRows(NamedTuple):
    """Tokens of one sequence: its slot, the first one's position, how many of them, the last ones, are wanted, and
    whether they are decoded."""

    slot: int
    start: int
    wanted: int
    decoding: bool


@dataclass
class Forward:
    """One pass. `angles`: of each of the model's ropes, complex [all rows, 1, D/2]; `query_factors`: of queries, by
    position, [all rows, 1, 1]; `projected`: heads, where a stage leaves them to the next one, [all rows, H + 2G, D]."""

    batch: Batch
    tokens: Tensor  # [all rows]
    angles: tuple[Tensor, ...]
    query_factors: Tensor | None
    slabs: Slabs
    projected: Tensor | None = None
    _pieces: dict[Rows, list[tuple[slice, SequenceRows]]] = field(default_factory=dict)
    _places: dict[Rows, PassagePlaces | None] = field(default_factory=dict)
    _stretches: dict[tuple[Rows, bool], list[tuple[slice, SequenceRows | None]]] = field(default_factory=dict)

    def pieces(self, rows: Rows) -> list[tuple[slice, SequenceRows]]:
        """The sequences that have tokens in `rows`, and where in `rows`."""
        if rows not in self._pieces:  # every layer asks for the same few rows
            self._pieces[rows] = [
                (
                    slice(part.start - rows.start, part.stop - rows.start),
                    SequenceRows(
                        segment.sequence, segment.end - (span.stop - part.start), self.batch.wanted(part).length,
                        segment.decoding,
                    ),
                )
                for segment, span, part in self.batch.within(rows)
            ]  # fmt: skip
        return self._pieces[rows]

    def places(self, rows: Rows) -> PassagePlaces | None:
        """Where keys and values of these rows are, for weft's own kernels, if they are there."""
        if rows not in self._places:
            pieces = [Passage(piece.slot, piece.start, here.stop - here.start) for here, piece in self.pieces(rows)]
            self._places[rows] = self.slabs.places(pieces)
        return self._places[rows]

    def turned(self, turn: int, rows: Rows) -> Tensor:
        """Angles of one of the model's ropes, of some rows."""
        angles = self.angles[turn]
        return angles if rows.length == angles.shape[0] else angles[rows.start : rows.stop]

    def stretches(self, rows: Rows, exact_rows: bool, few: bool) -> list[tuple[slice, SequenceRows | None]]:
        """The same as `pieces`; but single tokens behind each other, which attend all at once, are one, without its
        sequences. `exact_rows`: those that a cut left of a longer piece are not; `few`: nor those that nobody wants."""
        if (rows, few) not in self._stretches:
            found: list[tuple[slice, SequenceRows | None]] = []
            for here, piece in self.pieces(rows):
                single = here.stop - here.start == 1 and (piece.decoding or not exact_rows)
                single = single and (piece.wanted == 1 or not few)
                if single and found and found[-1][1] is None:
                    found[-1] = slice(found[-1][0].start, here.stop), None
                else:
                    found.append((here, None if single else piece))
            self._stretches[rows, few] = found
        return self._stretches[rows, few]

    @cached_property
    def _wanted(self) -> Tensor:
        """Places of the wanted rows."""
        return torch.tensor(self.batch.wanted_rows, dtype=torch.long, device=self.tokens.device)

    def pick(self, values: Tensor, rows: Rows) -> Tensor:
        """The wanted ones of some rows of the batch."""
        leaves = self.batch.wanted(rows)
        return values[self._wanted[leaves.start : leaves.stop] - rows.start]

    def predicting(self, values: Tensor, rows: Rows) -> Tensor:
        """Of the wanted ones of some rows of the batch those that go through the output head."""
        if not self.batch.pools:
            return values
        wanted = self.batch.wanted(rows)
        inside = self.batch.predicting(rows)
        places = [bisect_left(self.batch.wanted_rows, row) - wanted.start
                  for row in self.batch.predicting_rows[inside.start : inside.stop]]  # fmt: skip
        return values[torch.tensor(places, dtype=torch.long, device=values.device)]

    def leave(self, heads_THD: Tensor, rows: Rows) -> None:
        """Projected heads of some rows, to the stage that attends."""
        if self.projected is None:
            self.projected = heads_THD.new_empty(self.batch.tokens, *heads_THD.shape[1:])
        self.projected[rows.start : rows.stop] = heads_THD

    def left(self, rows: Rows) -> Tensor:
        """Projected heads of some rows."""
        assert self.projected is not None, "a stage before has projected"
        return self.projected[rows.start : rows.stop]


class RowWise(NamedTuple):
    """Features of which each row is on its own: `values` [L, width], of these rows."""

    leaves: Rows
    values: Tensor

    def of(self, leaves: Rows) -> Tensor:
        """Some of them, or all."""
        if leaves == self.leaves:
            return self.values
        return self.values[leaves.start - self.leaves.start : leaves.stop - self.leaves.start]
