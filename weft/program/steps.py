"""Programs: the whole description of a forward pass, one for all ranks; a rank runs the steps that concern it.

Layers repeat, so a program's form is a few blocks of steps, each with how often it repeats; and chunks have numbers,
so a form is the same for all batches that are cut alike. The batch brings the offsets between which its chunks lie.
text.py has the form that people read. Knows nothing of tensors or time.

Two orders hold without being said: the steps of one lane run in issue order, and a collective follows the computation
of its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from weft.program.batch import Rows
from weft.program.stages import COLLECTIVES, COMPUTE, Kind, stage_name


class ProgramError(ValueError):
    """A program that can't be read, or that must not run."""


class Step(NamedTuple):
    """What is done in which stage, for which chunk.

    `layer`: in the block's first round; None for a stage outside the layers. `chunk`: its number in the form. `after`:
    how many steps earlier, in issue order, those were issued that must have ended. `wanted`: it is about the wanted
    ones of its rows only. `on`: its lane, `wire` and `algorithm`: how it travels; empty for the usual. `ranks`: which
    ones it concerns, rising; empty for all. `to`: of a send, those that receive.
    """

    kind: Kind
    part: str
    layer: int | None
    chunk: int
    after: tuple[int, ...] = ()
    wanted: bool = False
    on: str = ""
    wire: str = ""
    algorithm: str = ""
    ranks: tuple[int, ...] = ()
    to: tuple[int, ...] = ()

    @property
    def lane(self) -> str:
        """What it occupies while it runs."""
        return self.on or self.kind.lane

    def concerns(self, rank: int) -> bool:
        """It is one of this rank's steps."""
        return not self.ranks or rank in self.ranks or rank in self.to

    @property
    def meeting(self) -> tuple[int, ...]:
        """The ranks that a collective is between, rising; empty for all."""
        return tuple(sorted((*self.ranks, *self.to)))

    def later(self, layers: int) -> Step:
        """The same, so many layers on."""
        return self if self.layer is None else self._replace(layer=self.layer + layers)


@dataclass(frozen=True)
class Block:
    """Steps in issue order that are issued `rounds` times; each round is `layers` layers beyond the one before."""

    steps: tuple[Step, ...]
    rounds: int = 1
    layers: int = 1

    @cached_property
    def reach(self) -> int:
        """Of the edge that reaches back farthest, in steps."""
        return max((distance for step in self.steps for distance in step.after), default=0)


@dataclass(frozen=True)
class Form:
    """A program but for where its batch is cut. `chunks`: each lies between two of the batch's numbered offsets."""

    blocks: tuple[Block, ...]
    chunks: tuple[tuple[int, int], ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # forms are looked up for every batch
        return hash((self.blocks, self.chunks))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return sum(len(block.steps) * block.rounds for block in self.blocks)

    @cached_property
    def lanes(self) -> tuple[str, ...]:
        """Those that steps occupy, the compute lane first."""
        used = [step.lane for block in self.blocks for step in block.steps]
        return tuple(dict.fromkeys([COMPUTE, *used]))

    @cached_property
    def ranks(self) -> frozenset[int]:
        """Those that steps name; none where all steps are for all ranks."""
        steps = [step for block in self.blocks for step in block.steps]
        return frozenset(rank for step in steps for rank in (*step.ranks, *step.to))

    @cached_property
    def meetings(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Lanes that communicate with the ranks that do it there, each once, in the order in which they come first."""
        steps = (step for block in self.blocks for step in block.steps if step.kind in COLLECTIVES)
        return tuple(dict.fromkeys((step.lane, step.meeting) for step in steps))

    def urgent(self, rank: int) -> tuple[tuple[tuple[bool, ...], tuple[bool, ...]], ...]:
        """For each block, and each of its steps in a round that another one follows and in the last round: whether it
        is a collective for which this rank's very next computation waits, or that no computation follows."""
        blocks: list[tuple[tuple[bool, ...], tuple[bool, ...]]] = []
        following: tuple[Step, ...] = ()
        for block in reversed(self.blocks):
            blocks.append((_awaited(block.steps, block.steps, rank), _awaited(block.steps, following, rank)))
            following = (*block.steps, *following)
        return tuple(reversed(blocks))


def _awaited(steps: tuple[Step, ...], following: tuple[Step, ...], rank: int) -> tuple[bool, ...]:
    """For each of the steps; `following` are those that come after them."""
    both, waits, awaited = (*steps, *following), -1, []
    for place in range(len(both) - 1, -1, -1):
        step = both[place]
        awaited.append(step.kind in COLLECTIVES and (waits < 0 or waits - place in both[waits].after))
        if step.concerns(rank) and (step.kind not in COLLECTIVES or step.kind is Kind.SEND):
            waits = place
    return tuple(awaited[: len(following) - 1 if following else None : -1])


class Issued(NamedTuple):
    """A step of some round, with the rows of some batch. `number`: its place in issue order."""

    number: int
    step: Step
    layer: int | None
    rows: Rows

    @property
    def kind(self) -> Kind:
        """What it does."""
        return self.step.kind

    @property
    def lane(self) -> str:
        """What it occupies while it runs."""
        return self.step.lane

    @property
    def stage(self) -> str:
        """The stage's name, with its layer."""
        return stage_name(self.step.part, self.layer)

    @property
    def name(self) -> str:
        """What people call it; unique in a program."""
        return f"{self.kind} {self.stage} {self.rows}"

    @property
    def after(self) -> tuple[int, ...]:
        """Places of the steps that must have ended."""
        return tuple([self.number - distance for distance in self.step.after])


@dataclass(frozen=True)
class Program:
    """A form, and the offsets of a batch between which its chunks lie, rising from 0 to all rows.

    Iterating goes through the steps of all rounds, in issue order.
    """

    form: Form
    offsets: tuple[int, ...]

    @cached_property
    def rows(self) -> tuple[Rows, ...]:
        """Of each chunk."""
        return tuple([Rows(self.offsets[first], self.offsets[last]) for first, last in self.form.chunks])

    def by(self, change: Callable[[Step], Step]) -> Program:
        """The same, with each step as it is changed, which is not in its place."""
        blocks = (replace(block, steps=tuple(map(change, block.steps))) for block in self.form.blocks)
        return replace(self, form=replace(self.form, blocks=tuple(blocks)))

    def summed_by(self, choose: Callable[[Step], str]) -> Program:
        """The same, with each sum by the algorithm that is chosen for it."""
        return self.by(lambda step: step._replace(algorithm=choose(step)) if step.kind is Kind.REDUCE else step)

    def __len__(self) -> int:
        return len(self.form)

    def __iter__(self) -> Iterator[Issued]:
        place = 0
        for block in self.form.blocks:
            for round_ in range(block.rounds):
                for step in block.steps:
                    layer = None if step.layer is None else step.layer + round_ * block.layers
                    yield Issued(place, step, layer, self.rows[step.chunk])
                    place += 1
