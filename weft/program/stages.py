"""What programs are made of: kinds of steps, lanes, and the stages of a model in their order.

Knows names and order; knows nothing of tensors, ranks or time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

# Lanes: what a step occupies while it runs. A rank computes on one and may communicate on several.
COMPUTE = "compute"
NETWORK = "network"

ALGORITHMS = ("exchange", "one-shot", "two-shot", "star", "hierarchical")  # of sums, see parallel/allreduce.py


class Kind(StrEnum):
    """What a step does."""

    COMPUTE = "compute"  # a stage's body and tail
    BODY = "body"  # a stage's computation up to the input of its last projection
    TAIL = "tail"  # that projection, for all or some rows of a body
    ENTER = "enter"  # adds what a reduce_scatter left and takes the stage's norm, each rank for its part of the rows
    REDUCE = "reduce"  # all-reduce: sums the partials of all ranks, everywhere
    REDUCE_SCATTER = "reduce_scatter"  # the same, but each rank gets its part of the rows only
    ALL_GATHER = "all_gather"  # collects everywhere what `enter` left on each rank: a stage's input
    GATHER = "gather"  # tells all ranks the likeliest tokens of each one's slice of the logits
    SEND = "send"  # what a stage and all before it left goes from the ranks that have it to others, which go on with it

    @property
    def lane(self) -> str:
        """The lane that such a step occupies, where the step names no other."""
        return NETWORK if self in COLLECTIVES else COMPUTE


COLLECTIVES = frozenset({Kind.REDUCE, Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.GATHER, Kind.SEND})
ROWS_TRAVEL = COLLECTIVES - {Kind.GATHER}
SUMS = frozenset({Kind.REDUCE, Kind.REDUCE_SCATTER})


@dataclass(frozen=True)
class Stage:
    """A piece of the model that ends in at most one collective.

    `ordered`: within a sequence, later rows read what earlier rows wrote (attention). `lag`: how many of the stages
    just before it its input goes without: 0 is usual, 1 where it reads all but the last sum, or the same input as its
    neighbour. `aside`: numbers of each row that are summed, exactly, for the next stage alone; with 0 the sum is a
    contribution to the residual stream. `layer`: None outside the layers.
    """

    part: str
    collective: Kind | None
    ordered: bool = False
    lag: int = 0
    aside: int = 0
    layer: int | None = None

    @property
    def name(self) -> str:
        """As programs write it: `L3.attention`, `head`."""
        return stage_name(self.part, self.layer)


def stage_name(part: str, layer: int | None) -> str:
    """`L3.attention`, or the part alone outside the layers."""
    return part if layer is None else f"L{layer}.{part}"


@dataclass(frozen=True)
class Outline:
    """A model's stages in order: some before the layers, those of each layer, some after them.

    `narrows`: rows that nobody wants stop where the last keys and values are stored, not only before the output head.
    """

    before: tuple[Stage, ...]
    layer: tuple[Stage, ...]
    after: tuple[Stage, ...]
    layers: int
    narrows: bool = True

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # forms are looked up by it
        return hash((self.before, self.layer, self.after, self.layers, self.narrows))

    def __post_init__(self) -> None:
        several = self.of(2) if self.layers > 2 else self
        inputs = several._inputs
        assert list(inputs) == sorted(inputs), "a stage reads all that the stages before it read"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All of them."""
        repeated = (replace(stage, layer=layer) for layer in range(self.layers) for stage in self.layer)
        return (*self.before, *repeated, *self.after)

    @cached_property
    def _places(self) -> dict[tuple[str, bool], int]:
        """Of each part, in a model of one layer; with whether it is a layer's."""
        one = (*self.before, *self.layer, *self.after)
        inside = range(len(self.before), len(self.before) + len(self.layer))
        return {(stage.part, place in inside): place for place, stage in enumerate(one)}

    def place(self, part: str, layer: int | None) -> int | None:
        """Where a stage stands in `stages`; None if there is no such one."""
        place = self._places.get((part, layer is not None))
        if place is None or (layer is not None and not 0 <= layer < self.layers):
            return None
        if layer is None and place >= len(self.before) + len(self.layer):  # behind all layers
            layer = self.layers - 1
        return place + len(self.layer) * (layer or 0)

    def input_until(self, place: int) -> int:
        """The place of the last stage whose contribution the stage at `place` reads; -1 for the first stage."""
        return self._inputs[place]

    @cached_property
    def _inputs(self) -> tuple[int, ...]:
        """Nothing goes without what stands before the layers."""
        first = len(self.before)
        return tuple(max(place - 1 - s.lag, min(place, first) - 1) for place, s in enumerate(self.stages))

    @cached_property
    def lags(self) -> bool:
        """Some stage goes without a sum before it."""
        return any(stage.lag for stage in self.layer)

    @cached_property
    def aside(self) -> dict[str, int]:
        """Parts of layers whose sums stay aside, with their numbers of a row."""
        return {stage.part: stage.aside for stage in self.layer if stage.aside}

    @cached_property
    def scatters(self) -> bool:
        """Each sum is all that the next stage reads, so that it may be taken on each rank's part of the rows."""
        return not self.lags and not self.aside

    @cached_property
    def readers(self) -> tuple[int | None, ...]:
        """For each stage the place of the first one that reads its contribution."""
        inputs = self._inputs
        later = ((place, range(place + 1, len(inputs))) for place in range(len(inputs)))
        return tuple(next((reader for reader in readers if inputs[reader] >= place), None) for place, readers in later)

    @cached_property
    def narrow_from(self) -> int:
        """The place of the first stage that leaves wanted rows only: the last one that remembers rows, or the head."""
        last = len(self.stages) - 1
        return max((place for place, stage in enumerate(self.stages) if stage.ordered and self.narrows), default=last)

    def of(self, layers: int) -> Outline:
        """The same model with another number of layers."""
        return replace(self, layers=layers)
