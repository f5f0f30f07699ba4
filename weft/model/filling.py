"""Fills weights in the formats that are wanted: as an earlier start has left them, or from the checkpoint.

What is kept is kept in parts: a layer's matrices, or the embedding, or the head; so what was rounded for one layout
serves another one where a rank has the same part of a layer. Knows formats and what is kept; knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weft.formats.packed import Codes
from weft.model.kept_weights import KeptWeights
from weft.model.kernels.choice import format_of
from weft.model.kernels.formats import LOST, Formats, Gathering, finer, gathering

_Fill = Callable[[Gathering], None]


class Filling:
    """`computed_in`: the finest format. `kept`: what an earlier start has left of a part, by its name. `finer`:
    matrices so far that lose too much in the format that was asked for."""

    def __init__(
        self, wanted: Formats, computed_in: str, kept: Callable[[str], KeptWeights] | None
    ) -> None:  # fmt: skip
        self.wanted, self.finer = wanted, list[str]()
        self._computed_in, self._kept_of = computed_in, kept
        self._kept: KeptWeights | None = None  # of the part that is filled

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is filled meanwhile is kept, if all of it is."""
        self._kept, whole = self._kept_of(name) if self._kept_of is not None else None, False
        try:
            yield
            whole = True
        finally:
            if self._kept is not None:
                self._kept.close(whole)
            self._kept = None

    def __call__(
        self, name: str, format_: str, shape: tuple[int, int], fill: _Fill,
        make: Callable[[str, tuple[int, int]], Gathering] = gathering,
    ) -> Gathering:  # fmt: skip
        """A matrix in a format: of few bits as an earlier start has left it, else filled now, and left for later ones.
        One that loses too much is kept in more bits."""
        weight = make(format_, shape)
        if not isinstance(weight.stored, Codes):
            fill(weight)
        elif not self._few_suffice(weight, f"{name} {format_}", fill):
            if not self.wanted.auto:
                self.finer.append(name)
            return self(name, finer(format_of(weight.stored), self._computed_in), shape, fill, make)
        return weight

    def _few_suffice(self, weight: Gathering, place: str, fill: _Fill) -> bool:
        """Gathers a matrix of few bits; False if that loses too much. `place`: its name in what is kept."""
        if self._kept is not None:
            if self._kept.too_few(place):
                return False
            if isinstance(weight.stored, Codes) and (found := self._kept.get(place, weight.stored)) is not None:
                weight.recall(found)
                return True
        fill(weight)
        format_ = format_of(weight.stored)
        # What the checkpoint has in few bits isn't rounded to as few once more unless that is asked for.
        suffice = weight.lost <= LOST[format_] and not (self.wanted.auto and format_ == "int4" and weight.again)
        if self._kept is not None and isinstance(weight.stored, Codes):
            self._kept.put(place, weight.stored if suffice else None)
        return suffice
