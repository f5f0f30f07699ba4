"""What is asked of a run beside tokens, and what runs and starts gave. Knows numbers; knows no processes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from weft.execute import protocol as p
from weft.program.stages import COLLECTIVES
from weft.program.steps import Issued, Program
from weft.timeline.timeline import Event, Timeline

INFINITE = float("inf")


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
    the first one sets the others' clocks; in a pipeline rows come no sooner than they were sent. A rank that waits for
    rows that nobody has sent yet receives nothing meanwhile.
    """
    sends = [step for step in program if step.step.to]
    clocks = [0.0] * len(answers) if one_clock else _clocks(program, sends, answers)
    begun = {s.number: min(answers[r].spans[s.number][0] + clocks[r] for r in s.step.ranks) for s in sends}
    events = [
        Event(
            rank, step.lane, step.kind, step.stage, step.rows,
            max(start + clock, begun.get(step.number, -INFINITE) if rank in step.step.to else -INFINITE), stop + clock,
        )
        for rank, (answer, clock) in enumerate(zip(answers, clocks, strict=True))
        for step, (start, stop) in zip(program, answer.spans, strict=True)
        if stop > 0
    ]  # fmt: skip
    begin = min((event.start for event in events), default=0.0)
    shifted = (replace(event, start=event.start - begin, stop=event.stop - begin) for event in events)
    return Timeline(tuple(shifted), "measured")


def _clocks(program: Program, sends: Sequence[Issued], answers: Sequence[p.Done]) -> list[float]:
    """What to add to each rank's seconds."""
    if not sends:
        collectives = (step.number for step in program if step.kind in COLLECTIVES)
        first = next((number for number in collectives if any(answer.spans[number][1] > 0 for answer in answers)), None)
        return [-answer.spans[first][1] if first is not None else 0.0 for answer in answers]
    clocks = [0.0, *[-INFINITE] * (len(answers) - 1)]
    for step in program:
        spans = [answer.spans[step.number] for answer in answers]
        if step.step.to:
            for rank in step.step.ranks:  # one of which nothing has come before has the first clock
                clocks[rank] = clocks[rank] if clocks[rank] > -INFINITE else 0.0
            sent = max(spans[rank][1] + clocks[rank] for rank in step.step.ranks)
            for rank in step.step.to:
                clocks[rank] = max(clocks[rank], sent - spans[rank][1])
        elif step.kind in COLLECTIVES and step.step.ranks[:1] == (0,):  # the first section has one clock by its sums
            for rank in step.step.ranks:
                clocks[rank] = clocks[0] + spans[0][1] - spans[rank][1] if clocks[rank] == -INFINITE else clocks[rank]
    return [clock if clock > -INFINITE else 0.0 for clock in clocks]
