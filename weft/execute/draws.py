"""Draws one token from a vocabulary of which each rank has a slice; see sampler.py for how ranks talk.

No slice is sorted, and all but a few probabilities stay in theirs. Knows one row's logits and wishes; knows no other
rows.

Shapes: W a slice of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.execute.protocol import Choice

Told = list[list[float]]  # of each rank, in rank order, the numbers that it said

BLOCK = 512  # tokens whose probabilities are summed by themselves: in the same order however many threads there are
COLDEST = torch.finfo(torch.float32).tiny  # as a temperature: what is smaller divides by zero
FEW = 32  # likeliest tokens of each slice of which all ranks hear at once
DIRECT = 64  # of top-k: so many probabilities of each slice travel as they are


class Ask(NamedTuple):
    """What a talk wants to know of every rank: `length` numbers. Said by all, whatever `numbers` comes to on one."""

    length: int
    numbers: Callable[[], Sequence[float]]


@dataclass(frozen=True)
class Slice:
    """What `rank`, of those that talk, has of a vocabulary of `size` tokens: `width` of them, from token `first` on."""

    rank: int
    first: int
    width: int
    size: int

    @classmethod
    def of(cls, rank: int, widths: Sequence[int]) -> Slice:
        """Where the ranks have so many tokens each, in order."""
        return cls(rank, sum(widths[:rank]), widths[rank], sum(widths))

    def here(self, tokens: Sequence[int]) -> list[int]:
        """Places in the slice of those tokens that are in it."""
        return [token - self.first for token in tokens if 0 <= token - self.first < self.width]


def draw(logits_W: Tensor, choice: Choice, part: Slice, top: float) -> Generator[Ask, Told, int]:
    """Temperature, then min-p, top-k and top-p, then as many uniform numbers as it takes.

    Where the few likeliest tokens are all that top-k or top-p leave, every rank hears of them at once, and draws. Else
    nothing is sorted. A token is drawn from all that min-p and top-k leave; if the likelier ones have the wanted mass
    without it, it is not one of top-p's, nor is any that is less likely, and the next draw is from those before it.
    What is accepted is distributed as a draw from top-p's tokens alone: each draw is from more tokens than those,
    never from fewer. Of equally likely tokens the one with the lower id comes first.
    """
    temperature = max(choice.temperature, COLDEST)
    kept = _Kept(lambda: (None, torch.exp((logits_W - top) / temperature)))
    if choice.min_p > 0:
        kept = kept.only(lambda kept: kept.values >= choice.min_p)
    # A hash, not a generator's state: nothing has to be remembered between tokens.
    uniform = random.Random(f"{choice.seed}/{choice.index}").random
    count = choice.top_k if 0 < choice.top_k < part.size else 0
    if 0 < count <= FEW or (not count and choice.top_p < 1):
        told = yield Ask(1 + 2 * FEW, partial(_said_few, kept, part.first))
        if few := _few(told, count, choice.top_p):
            return _of_few(few, uniform())
    else:
        told = []
    if count:
        kept = yield from _largest(kept, count, part)
    if count or not told:
        told = yield Ask(1, partial(_said_mass, kept))
    masses = [said[0] for said in told]
    wanted = choice.top_p * sum(masses)
    while True:
        owner, place = _owner(masses, uniform() * sum(masses))
        told = yield Ask(2, partial(_drawn, kept, place, part.first))
        token, weight = int(told[owner][0]), told[owner][1]
        if choice.top_p == 1:
            return token
        before = kept.only(partial(_likelier, place=token - part.first, weight=weight))
        told = yield Ask(1, partial(_said_mass, before))
        masses = [said[0] for said in told]
        if sum(masses) < wanted or sum(masses) == 0:  # the likeliest one: also where top_p next to nothing leaves none
            return token
        kept = before


class _Kept:
    """Tokens of a slice that are left, and their probabilities, made when a number of them is said: a rank that fails
    at it is heard by all. What lies between what is said is decided from what was heard alone, alike on all ranks."""

    def __init__(self, make: Callable[[], tuple[Tensor | None, Tensor]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> tuple[Tensor | None, Tensor]:
        made = self._make()
        del self._make  # with what it was made from
        return made

    @property
    def values(self) -> Tensor:
        """What the probabilities are in proportion to, by token."""
        return self._made[1]

    @property
    def places(self) -> Tensor | None:
        """The tokens, counted from the slice's first one, ascending; None: all of them."""
        return self._made[0]

    def below(self, place: int) -> int:
        """How many of the tokens come before one of this or another slice."""
        places = self.places
        return min(max(place, 0), len(self.values)) if places is None else int(torch.searchsorted(places, place))

    def only(self, wanted: Callable[[_Kept], Tensor]) -> _Kept:
        """Those for which `wanted` has True."""

        def make() -> tuple[Tensor, Tensor]:
            chosen = _true_places(wanted(self))
            places = chosen if self.places is None else self.places[chosen]
            return places, self.values.index_select(0, chosen)

        return _Kept(make)


def _true_places(mask: Tensor) -> Tensor:
    """Where it is True; numpy is four times as fast at it."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def _said_few(kept: _Kept, first: int) -> list[float]:
    """The slice's mass, and of its likeliest tokens the probabilities and which ones they are."""
    values, numbers = kept.values.topk(min(FEW, len(kept.values)))
    places = numbers if kept.places is None else kept.places[numbers]
    missing = [0.0] * (FEW - len(values))
    return [*_said_mass(kept), *values.tolist(), *missing, *(places + first).tolist(), *missing]


def _few(told: Told, count: int, top_p: float) -> list[tuple[float, int]]:
    """All tokens that top-k (if there is a `count`) and top-p leave, and what their probabilities are in proportion to;
    none if they may not be among the likeliest FEW, which are the same however many slices there are."""
    pairs = [pair for said in told for pair in zip(said[1 : 1 + FEW], map(int, said[1 + FEW :]), strict=True)]
    few = sorted((pair for pair in pairs if pair[0] > 0), key=lambda pair: (-pair[0], pair[1]))
    least = few[FEW - 1][0] if len(few) >= FEW else 0.0  # of several that are as likely, some may not be among them
    few = [pair for pair in few if pair[0] > least]
    if count and least and len(few) < count:
        return []
    few = few[:count] if count else few
    wanted, mass = top_p * (sum(weight for weight, _ in few) if count else sum(said[0] for said in told)), 0.0
    for number, (weight, _) in enumerate(few, start=1):
        mass += weight
        if mass >= wanted:
            return few[:number]
    return few if count or not least else []


def _of_few(few: Sequence[tuple[float, int]], uniform: float) -> int:
    """The token at which this part of all their mass ends."""
    place = uniform * sum(weight for weight, _ in few)
    for weight, token in few:
        place -= weight
        if place < 0:
            return token
    return few[-1][1]


def _said_mass(kept: _Kept) -> list[float]:
    return [float(_sums(kept.values).sum())]


def _sums(values: Tensor) -> Tensor:
    """Of each block, and of what is left beyond the last whole one; in float64."""
    whole = len(values) // BLOCK * BLOCK
    sums = values[:whole].view(-1, BLOCK).sum(dim=1).double()
    return sums if whole == len(values) else torch.cat([sums, values[whole:].sum()[None].double()])


def _owner(masses: Sequence[float], place: float) -> tuple[int, float]:
    """The rank in whose slice this much of the mass ends, and how much of it is that slice's."""
    last = max(rank for rank, mass in enumerate(masses) if mass > 0)
    for rank, mass in enumerate(masses):
        if place < mass or rank == last:
            return rank, min(place, mass)
        place -= mass
    raise AssertionError("a mass is above zero: the likeliest token's")


def _drawn(kept: _Kept, place: float, first: int) -> tuple[float, float]:
    """The token at which this much of the slice's mass ends, and its probability; of a slice without any, nothing."""
    values, heights = kept.values, _sums(kept.values).cumsum(0)
    if not len(heights) or not float(heights[-1]):
        return 0.0, 0.0
    block = min(int(torch.searchsorted(heights, place, right=True)), len(heights) - 1)
    within = values[block * BLOCK : (block + 1) * BLOCK].double().cumsum(0)
    place -= float(heights[block - 1]) if block else 0.0
    number = block * BLOCK + min(int(torch.searchsorted(within, place, right=True)), len(within) - 1)
    if not values[number] > 0:  # rounding led beyond the block's last one
        number = int(values[: number + 1].nonzero()[-1])
    return float(first + (number if kept.places is None else int(kept.places[number]))), float(values[number])


def _likelier(kept: _Kept, place: int, weight: float) -> Tensor:
    """Which are likelier than the token at a place, counted from the slice's first one, or as likely with a lower
    id."""
    likelier, ahead = kept.values > weight, kept.below(place)
    likelier[:ahead] |= kept.values[:ahead] == weight
    return likelier


def _largest(kept: _Kept, count: int, part: Slice) -> Generator[Ask, Told, _Kept]:
    """The `count` likeliest of all slices."""
    least = yield from (_least_of_few(kept, count) if count <= DIRECT else _least_of_many(kept, count))
    kept = kept.only(lambda kept: kept.values >= least)
    told = yield Ask(2, lambda: [float((kept.values > least).sum()), float((kept.values == least).sum())])
    # Of equally likely ones those with the lowest ids: what is left for this slice after those before it.
    left = count - sum(int(said[0]) for said in told) - sum(int(said[1]) for said in told[: part.rank])
    return kept.only(partial(_not_below, least=least, equal=max(0, left)))


def _not_below(kept: _Kept, least: float, equal: int) -> Tensor:
    """Which are above a probability, and the first ones that are equal to it."""
    above = kept.values > least
    above[(kept.values == least).nonzero()[:equal, 0]] = True
    return above


def _least_of_few(kept: _Kept, count: int) -> Generator[Ask, Told, float]:
    """The smallest probability of the `count` largest."""

    def largest() -> list[float]:
        values: list[float] = kept.values.topk(min(count, kept.values.shape[0])).values.tolist()
        return values + [0.0] * (count - len(values))

    told = yield Ask(count, largest)
    return sorted((value for said in told for value in said), reverse=True)[count - 1]


def _least_of_many(kept: _Kept, count: int) -> Generator[Ask, Told, float]:
    """The same, byte by byte: the bits of numbers that are not below zero come in the order of the numbers."""
    bits, left = 0, count
    for shift in (24, 16, 8, 0):
        told = yield Ask(256, partial(_histogram, kept, shift, bits))
        for byte in range(255, -1, -1):
            there = sum(int(said[byte]) for said in told)
            if left <= there:
                break
            left -= there
        bits = bits << 8 | byte
    return float(np.int32(bits).view(np.float32))


def _histogram(kept: _Kept, shift: int, above: int) -> list[float]:
    """How often each byte comes next, where those before it are these."""
    bits = kept.values.view(torch.int32)
    matching = bits if shift == 24 else bits[bits >> (shift + 8) == above]
    counts: list[float] = torch.bincount((matching >> shift) & 255, minlength=256).tolist()
    return counts
