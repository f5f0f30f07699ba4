"""What a calibration runs, of what, and what that took. Knows programs and seconds; concludes nothing. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from weft.layout import Layout
from weft.program.batch import Batch
from weft.program.stages import Kind, Outline
from weft.program.steps import Program
from weft.timeline.timeline import Timeline


class Sample(NamedTuple):
    """One run: seconds of the slowest rank's program, processor seconds of each rank, and the timeline."""

    seconds: float
    processor: list[float]
    timeline: Timeline


class Trial(NamedTuple):
    """One thing to run in every round, and what it is for."""

    name: str
    rows: int
    batch: Batch
    program: Program
    wire: str
    scope: str


@dataclass(frozen=True)
class Subject:
    """What is calibrated. `length`: positions of a sequence; `slots`: sequences at a time. `limit`: bytes up to which
    a sum is small. `algorithms`: of sums. `elements`: bytes of a number, by wire. `logits`: bytes that a rank tells the
    others of a wanted row. `windows`: positions that a token sees at most, layer by layer, if there are any. `kept`:
    see `ComputeCosts`. `granule`: of cuts, see `strategy.place`. `layout`: of the model over the ranks, where it has
    several sections."""

    outline: Outline
    width: int
    logits: float
    world: int
    length: int
    slots: int
    limit: float
    elements: dict[str, float]
    algorithms: tuple[str, ...] = ("exchange",)
    windows: tuple[int | None, ...] = ()
    granule: int = 1
    kept: float = 1.0
    layout: Layout | None = None

    @property
    def summing(self) -> tuple[int, ...]:
        """The ranks whose sums are measured: of a pipeline the section with most."""
        if self.layout is None:
            return tuple(range(self.world))
        return max((section.ranks for section in self.layout.sections), key=len)

    @property
    def layers(self) -> int:
        """That every rank has, at least."""
        return self.outline.layers if self.layout is None else min(self.layout.layers)

    @property
    def sums(self) -> int:
        """Of whole rows, in a layer."""
        return sum(stage.collective is Kind.REDUCE and not stage.aside for stage in self.outline.layer)

    @property
    def scored(self) -> str:
        """The part that looks at earlier rows."""
        return next(stage.part for stage in self.outline.layer if stage.ordered)

    @property
    def head(self) -> str:
        """The part that ends in logits."""
        return self.outline.after[-1].part

    @property
    def first_wire(self) -> str:
        """What all but collectives is measured with."""
        return next(iter(self.elements))


@dataclass(frozen=True)
class Samples:
    """What every run took, round by round."""

    subject: Subject
    runs: tuple[Trial, ...]
    _taken: dict[tuple[str, int, str], list[Sample]] = field(default_factory=dict)

    def add(self, run: Trial, sample: Sample) -> None:
        """One more round's."""
        self._taken.setdefault((run.name, run.rows, run.wire), []).append(sample)

    def of(self, name: str, rows: int, wire: str | None = None) -> list[Sample]:
        """All rounds', but for the first, which warms up, where there are enough; none if there was no such run."""
        taken = self._taken.get((name, rows, wire or self.subject.first_wire), [])
        return taken[1:] if len(taken) > 2 else taken

    def named(self, name: str) -> list[Trial]:
        """The runs of a name on the first wire, by rows."""
        first = self.subject.first_wire
        return sorted((run for run in self.runs if run.name == name and run.wire == first), key=lambda run: run.rows)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of the serial runs."""
        return [run.rows for run in self.named("serial")]


def by_name(algorithm: str) -> str:
    """The runs that do nothing but sum, by this algorithm."""
    return f"network by {algorithm}"


def sent_to(section: int) -> str:
    """The runs that do nothing but send rows to a section and back."""
    return f"sent to {section}"
