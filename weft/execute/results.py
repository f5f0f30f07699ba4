"""What is asked of a run beside tokens, and what runs and starts gave. Knows numbers; knows no processes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.execute import protocol as p
from weft.program.stages import COLLECTIVES
from weft.program.steps import Program
from weft.timeline.timeline import Event, Timeline


@dataclass(frozen=True)
class RunOptions:
    """What to bring back besides tokens. `scope`: "both", or one side alone, see `executor.Scope`."""

    scope: str = "both"
    timeline: bool = False
    checksums: bool = False
    logits: bool = False


TOKENS_ALONE = RunOptions()


@dataclass(frozen=True)
class Submitted:
    """A run under way."""

    number: int
    program: Program
    options: RunOptions


@dataclass(frozen=True)
class RunResult:
    """What a batch gave. `seconds`: of the program, the slowest rank's; `sampling`: of choosing tokens after it.
    `processor`, `bytes_sent` and `checksums`: for each rank. `pooled`: see `protocol.Done`.

    `compute` and `network`: seconds that the lanes were busy, of the rank that computed longest and of the one whose
    collectives took shortest, because they held the least waiting for others.
    """

    chosen: list[p.Chosen]
    seconds: float
    sampling: float
    processor: list[float]
    compute: float
    network: float
    bytes_sent: list[int]
    timeline: Timeline | None
    checksums: list[list[int]]
    logits: bytes
    pooled: list[bytes]


@dataclass(frozen=True)
class Started:
    """What each rank said when it came and when it was ready, and how long that took in seconds."""

    hellos: tuple[p.Hello, ...]
    loaded: tuple[p.Loaded, ...]
    seconds: float


def timeline_of(program: Program, answers: Sequence[p.Done], one_clock: bool) -> Timeline:
    """All ranks' spans on one clock, from the first beginning on.

    Ranks of one machine share its clock. On several machines a collective ends for all ranks at about the same time:
    the first one sets the others' clocks.
    """
    collectives = (step.number for step in program if step.kind in COLLECTIVES)
    first = next((number for number in collectives if all(answer.spans[number][1] > 0 for answer in answers)), None)
    clocks = [0.0 if one_clock or first is None else answer.spans[first][1] for answer in answers]
    zeros = [
        min((start - clock for start, stop in answer.spans if stop > 0), default=0.0)
        for answer, clock in zip(answers, clocks, strict=True)
    ]
    begin = min(zeros, default=0.0)
    events = [
        Event(rank, step.lane, step.kind, step.stage, step.rows, start - clock - begin, stop - clock - begin)
        for rank, (answer, clock) in enumerate(zip(answers, clocks, strict=True))
        for step, (start, stop) in zip(program, answer.spans, strict=True)
        if stop > 0
    ]
    return Timeline(tuple(events), "measured")
