"""How many layers each section of a pipeline takes, so that the slowest one is as fast as can be.

Layers are alike, so it is enough to count: within a given time each section can take so many, and the shortest time in
which all of them together can take all is found by halving. No other partition has a faster slowest section by more
than what is measured is good for. Knows seconds; knows nothing of how they were found. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from weft.errors import InputError
from weft.layout import even_layers

UNEVEN = 1.1  # of the bound: a user may wonder why it is more
NOISE = 0.05  # of the slowest section's seconds: a measured rank that is faster by less may be as fast


class Partition(NamedTuple):
    """`layers`: of each section. `bottleneck`: seconds of the slowest one; `bound`: seconds that it could not go below
    even if layers could be split; `best`: those of the best partition; `even`: those of as many layers each, where
    sections have room for them."""

    layers: tuple[int, ...]
    bottleneck: float
    bound: float
    best: float
    even: float | None = None

    def describe(self) -> str:
        """One line, with how near it is to what is possible."""
        layers = ",".join(map(str, self.layers))
        takes = self._of_bound(self.bottleneck)
        said = f"layers by speed: {layers}; the slowest section takes {takes} of the least possible"
        even = even_layers(sum(self.layers), len(self.layers))
        if self.layers == even and self.best < self.bottleneck:
            return f"{said}, uneven ones {self._of_bound(self.best)}: no more than noise"
        if self.layers != even and self.even is not None:
            return f"{said}, with {','.join(map(str, even))} {self._of_bound(self.even)}"
        return said + ("; whole layers allow no less" if self.bottleneck > UNEVEN * self.bound else "")

    def _of_bound(self, seconds: float) -> str:
        return f"{seconds / self.bound if self.bound > 0 else 1.0:.2f}"


def partition(layers: int, seconds: Sequence[float], ends: Sequence[float], most: Sequence[int]) -> Partition:
    """The best one, or as many layers each where that takes hardly longer.

    Of each section: `seconds` of one layer, `ends` of what it does beside layers, and how many layers it has room for
    at `most`; each takes one at least. Raises `InputError` where there is no room for all.
    """
    if sum(most) < layers or min(most) < 1:
        room = ",".join(map(str, most))
        raise InputError(f"the sections have room for {room} layers, and the model has {layers}; use more machines")
    if len(seconds) > layers:
        raise InputError(f"{len(seconds)} sections can't have a layer each of {layers}; give at most {layers}")

    def within(limit: float) -> list[int]:
        counts = (int((limit - end) / each + 1e-9) for each, end in zip(seconds, ends, strict=True))
        return [max(1, min(count, room)) for count, room in zip(counts, most, strict=True)]

    low, high = 0.0, max(end + each * layers for each, end in zip(seconds, ends, strict=True))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(within(middle)) >= layers else (middle, high)
    counts = within(high)
    while sum(counts) > layers:  # what is too many, from where that leaves least to do
        times = [end + each * count for each, end, count in zip(seconds, ends, counts, strict=True)]
        counts[max((n for n in range(len(counts)) if counts[n] > 1), key=lambda n: times[n])] -= 1
    bound, taken = _bound(layers, seconds, ends, most), _slowest(counts, seconds, ends)
    even = even_layers(layers, len(most))
    if any(count > room for count, room in zip(even, most, strict=True)):
        return Partition(tuple(counts), taken, bound, taken)
    evenly = _slowest(even, seconds, ends)
    if evenly <= taken * (1 + NOISE):
        return Partition(even, evenly, bound, taken, evenly)
    return Partition(tuple(counts), taken, bound, taken, evenly)


def _slowest(counts: Sequence[int], seconds: Sequence[float], ends: Sequence[float]) -> float:
    return max(end + each * count for each, end, count in zip(seconds, ends, counts, strict=True))


def _bound(layers: int, seconds: Sequence[float], ends: Sequence[float], most: Sequence[int]) -> float:
    """Seconds in which all sections together could just take all layers, if these could be split."""
    low, high = 0.0, max(end + each * layers for each, end in zip(seconds, ends, strict=True))
    for _ in range(60):
        middle = (low + high) / 2
        taken = (
            min(max(0.0, (middle - end) / each), room) for each, end, room in zip(seconds, ends, most, strict=True)
        )
        low, high = (low, middle) if sum(taken) >= layers else (middle, high)
    return high
