"""Steps, programs and their text form.

A program is the whole description of a forward pass: steps in issue order, each for some rows of one stage, on
one of two lanes, with the steps of the other lane that it waits for. It is the same on every rank. Knows nothing
of tensors, ranks or time.

    compute  L3.attention  0:512
    reduce   L3.attention  0:512
    compute  L3.attention  512:1024
    compute  L3.mlp        0:256      after reduce L3.attention 0:512

Two orders hold without being written: the steps of one lane run in issue order, and a collective follows the
computation of its own rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from weft.program.batch import Rows


class Lane(StrEnum):
    """Where a step runs: a rank computes and communicates at the same time."""

    COMPUTE = "compute"
    NETWORK = "network"


class Kind(StrEnum):
    """What a step does."""

    COMPUTE = "compute"  # a stage's body and tail
    BODY = "body"  # a stage's computation up to the input of its last projection
    TAIL = "tail"  # that projection, for all or some rows of a body
    ENTER = "enter"  # adds what a reduce_scatter left and takes the stage's norm, each rank for its part of the rows
    REDUCE = "reduce"  # all-reduce: sums the partials of all ranks, everywhere
    REDUCE_SCATTER = "reduce_scatter"  # the same, but each rank gets its part of the rows only
    ALL_GATHER = "all_gather"  # collects everywhere what `enter` left on each rank: a stage's input
    GATHER = "gather"  # collects the ranks' slices of the logits on rank 0

    @property
    def lane(self) -> Lane:
        """The lane that the step occupies."""
        return Lane.NETWORK if self in COLLECTIVES else Lane.COMPUTE


COLLECTIVES = frozenset({Kind.REDUCE, Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.GATHER})


@dataclass(frozen=True)
class Stage:
    """A piece of the model that ends in at most one collective.

    `ordered`: within a sequence, later rows read what earlier rows wrote (attention).
    """

    name: str
    collective: Kind | None
    ordered: bool = False

    @property
    def part(self) -> str:
        """The name without its layer: `attention` for `L3.attention`."""
        return self.name.rpartition(".")[2]


def decoder_stages(layers: int) -> tuple[Stage, ...]:
    """The stages of a decoder-only transformer, in order: embed, attention and mlp of each layer, head."""
    stages = [Stage("embed", None)]
    for layer in range(layers):
        stages.append(Stage(f"L{layer}.attention", Kind.REDUCE, ordered=True))
        stages.append(Stage(f"L{layer}.mlp", Kind.REDUCE))
    stages.append(Stage("head", Kind.GATHER))
    return tuple(stages)


class Step(NamedTuple):
    """One entry of a program. `after` holds the indices of earlier steps that must have ended first."""

    kind: Kind
    stage: str
    rows: Rows
    after: tuple[int, ...] = ()

    @property
    def lane(self) -> Lane:
        """The lane that the step occupies."""
        return self.kind.lane

    @property
    def part(self) -> str:
        """The stage without its layer: `attention` for `L3.attention`."""
        return self.stage.rpartition(".")[2]

    @property
    def name(self) -> str:
        """What other steps call it; unique in a program."""
        return f"{self.kind} {self.stage} {self.rows}"


class ProgramError(ValueError):
    """A program that can't be read, or that must not run."""


@dataclass(frozen=True)
class Program:
    """Steps in issue order. `str(program)` is its text form and `Program.parse` reads it back."""

    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        return self.text

    @cached_property
    def collectives(self) -> frozenset[int]:
        """The steps of the network lane."""
        return frozenset(index for index, step in enumerate(self.steps) if step.lane is Lane.NETWORK)

    @cached_property
    def collected(self) -> frozenset[str]:
        """The stages whose partials a collective takes."""
        steps = (self.steps[index] for index in self.collectives)
        return frozenset(step.stage for step in steps if step.kind is not Kind.ALL_GATHER)

    @cached_property
    def gathered(self) -> frozenset[str]:
        """The stages whose input an all_gather brings."""
        return frozenset(step.stage for step in self.steps if step.kind is Kind.ALL_GATHER)

    @cached_property
    def awaited_next(self) -> frozenset[int]:
        """Collectives that the very next step of the compute lane waits for, or that no such step follows."""
        found, waited = set(), frozenset(range(len(self.steps)))
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            if step.lane is Lane.COMPUTE:
                waited = frozenset(step.after)
            elif index in waited:
                found.add(index)
        return frozenset(found)

    @cached_property
    def text(self) -> str:
        """One line a step."""
        kinds = max((len(step.kind) for step in self.steps), default=0)
        stages = max((len(step.stage) for step in self.steps), default=0)
        rows = max((len(str(step.rows)) for step in self.steps), default=0)
        lines = (f"{s.kind:<{kinds}}  {s.stage:<{stages}}  {s.rows!s:<{rows}}  {self._after(s)}" for s in self.steps)
        return "".join(line.rstrip() + "\n" for line in lines)

    def _after(self, step: Step) -> str:
        return "after " + ", ".join(self.steps[index].name for index in step.after) if step.after else ""

    @classmethod
    def parse(cls, text: str) -> Program:
        """Reads the text form; blank lines and what follows a `#` are ignored.

        Raises `ProgramError` with the line number for anything that is not a step, that has a name twice, or
        that waits for a step which does not stand before it.
        """
        steps: list[Step] = []
        index_of: dict[str, int] = {}
        for number, raw in enumerate(text.splitlines(), start=1):
            line = raw.partition("#")[0].strip()
            if not line:
                continue
            step = _parse_step(line, number, index_of)
            if step.name in index_of:
                raise ProgramError(f"line {number}: the program already has the step {step.name!r}")
            index_of[step.name] = len(steps)
            steps.append(step)
        return cls(tuple(steps))


_NAME = r"(\w+)\s+([\w.]+)\s+(\d+):(\d+)"
_STEP = re.compile(_NAME + r"(?:\s+after\s+(.+))?")


def _parse_step(line: str, number: int, index_of: dict[str, int]) -> Step:
    kind, stage, rows, after = _parse_name(_STEP, line, number)
    edges = []
    for name in after.split(",") if after else []:
        waited = Step(*_parse_name(re.compile(_NAME), name.strip(), number)[:3]).name
        if waited not in index_of:
            raise ProgramError(f"line {number}: waits for {waited!r}, which does not stand before it")
        edges.append(index_of[waited])
    return Step(kind, stage, rows, tuple(edges))


def _parse_name(pattern: re.Pattern[str], text: str, number: int) -> tuple[Kind, str, Rows, str | None]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ProgramError(f"line {number}: {text!r} is not a step; one looks like 'reduce L3.attention 0:512'")
    kind, stage, start, stop, *rest = match.groups()
    if kind not in Kind.__members__.values():
        raise ProgramError(f"line {number}: unknown kind {kind!r}; known are {', '.join(Kind)}")
    if int(start) >= int(stop):
        raise ProgramError(f"line {number}: the rows {start}:{stop} are empty")
    return Kind(kind), stage, Rows(int(start), int(stop)), rest[0] if rest else None
