"""How ranks share a model: its layers in sections, one behind the other, and each section's layers over its ranks.

A section is what others call a stage of a pipeline. Knows counts and relative sizes; knows nothing of models, of
messages or of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from weft.errors import InputError


@dataclass(frozen=True)
class Section:
    """Layers `first` to `stop` - 1, which `ranks` hold together, in proportion to `shares`."""

    first: int
    stop: int
    ranks: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def layers(self) -> int:
        """How many."""
        return self.stop - self.first


@dataclass(frozen=True)
class Layout:
    """`layers`: how many each section has; `shares`: of each section the relative sizes of its ranks' parts. The first
    section has what comes before the layers too, the last one what comes after them."""

    layers: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]

    @classmethod
    def tensor(cls, layers: int, shares: Sequence[float]) -> Layout:
        """All layers over all ranks."""
        return cls((layers,), (tuple(shares),))

    @cached_property
    def world(self) -> int:
        """All ranks."""
        return sum(map(len, self.shares))

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """In order; ranks are counted through."""
        stops, ends = accumulate(self.layers), accumulate(map(len, self.shares))
        return tuple(
            Section(stop - layers, stop, tuple(range(end - len(shares), end)), shares)
            for layers, shares, stop, end in zip(self.layers, self.shares, stops, ends, strict=True)
        )

    @property
    def several(self) -> bool:
        """Rows go from section to section."""
        return len(self.layers) > 1

    @property
    def leader(self) -> int:
        """The rank that says which tokens were chosen: the first one of the last section."""
        return self.sections[-1].ranks[0]

    @property
    def parts(self) -> list[float]:
        """Of all layers, what each rank has."""
        each = [layers / sum(self.layers) for layers in self.layers]
        return [part * share / sum(shares) for part, shares in zip(each, self.shares, strict=True) for share in shares]

    def section_of(self, rank: int) -> Section:
        """The one that a rank is in."""
        return next(section for section in self.sections if rank in section.ranks)

    def describe(self) -> str:
        """As in `tp 1 x pp 2, layers 20,12`."""
        return f"{self}, layers {','.join(map(str, self.layers))}" if self.several else str(self)

    def __str__(self) -> str:
        """As in `tp 2`, `tp 2 x pp 3` or, where sections have other numbers of ranks, `tp 2,1 x pp 2`."""
        counts = [len(shares) for shares in self.shares]
        tp = str(counts[0]) if len(set(counts)) == 1 else ",".join(map(str, counts))
        return f"tp {tp} x pp {len(counts)}" if self.several else f"tp {tp}"


def even_layers(layers: int, sections: int) -> tuple[int, ...]:
    """About as many layers for each section; the first ones take one more, as the last one has the output head.

    Raises `InputError` where a section would have none.
    """
    if sections > layers:
        raise InputError(f"--pp {sections}: the model has {layers} layers; give at most as many sections")
    each, more = divmod(layers, sections)
    return tuple(each + (number < more) for number in range(sections))
