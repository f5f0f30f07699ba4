"""Programs whose steps are for some of the ranks: what no rank can see by itself.

All rows must go through every stage once, and a step may wait only for what its ranks take part in. The rest, that each
rank has what it reads and sums what it computed, check.py proves rank by rank. Which ranks have a stage's weights, keys
and values is not for a program to say: whoever builds it knows.
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.program.batch import Rows
from weft.program.progress import covered, once
from weft.program.stages import Kind, Outline
from weft.program.steps import Form, Program, ProgramError, Step

_Part = tuple[bool, bool, bool]  # of a rank in a step: concerned, sends, receives


def representatives(form: Form, world: int) -> list[int]:
    """One rank of those that run the same steps, for each such kind of rank."""
    steps = [step for block in form.blocks for step in block.steps]
    parts: dict[tuple[_Part, ...], int] = {}
    for rank in range(world):
        parts.setdefault(tuple([(s.concerns(rank), rank in s.ranks, rank in s.to) for s in steps]), rank)
    return list(parts.values())


def demand_ranks(form: Form, world: int) -> None:
    """Raises `ProgramError` for a step whose ranks are not there, or not what its kind takes."""
    for step in (step for block in form.blocks for step in block.steps):
        name = f"{step.kind} {step.part}"
        if any(not 0 <= rank < world for rank in (*step.ranks, *step.to)):
            raise ProgramError(f"{name}: for ranks {_said(step)}, but there are only {world}, from 0 on")
        if any(list(ranks) != sorted(set(ranks)) for ranks in (step.ranks, step.to)):
            raise ProgramError(f"{name}: its ranks {_said(step)} don't rise")
        if step.kind is Kind.GATHER and step.ranks:
            raise ProgramError(f"{name}: all ranks are told the likeliest tokens")
        if (step.kind is Kind.SEND) != bool(step.to) or (step.to and not step.ranks):
            raise ProgramError(f"{name}: a send, and nothing else, names the ranks that it goes from and to")
        if set(step.ranks) & set(step.to):
            raise ProgramError(f"{name}: some of its ranks would send to themselves ({_said(step)})")


def demand_whole(program: Program, outline: Outline, rows: Rows, world: int) -> None:
    """Raises `ProgramError` unless all `rows` go through every stage once, whichever ranks they are on."""
    issued, done = list(program), {place: list[Rows]() for place in range(len(outline.stages))}
    for each in issued:
        for edge in each.after:
            waiting = set(each.step.ranks) or set(range(world))  # of a send those that send
            if 0 <= edge < each.number and not waiting <= _concerned(issued[edge].step, world):
                raise ProgramError(f"{each.name!r}: waits for {issued[edge].name!r}, in which its ranks have no part")
        place = outline.place(each.step.part, each.layer)
        if place is not None and each.kind in (Kind.COMPUTE, Kind.BODY):
            once(done[place], each)
            done[place].append(each.rows)
    for place, stage in enumerate(outline.stages):
        if covered(done[place], rows) < rows.length:
            raise ProgramError(f"{stage.name}: not all of the rows {rows} go through it")


def _concerned(step: Step, world: int) -> set[int]:
    return {*step.ranks, *step.to} or set(range(world))


def _said(step: Step) -> str:
    def words(ranks: Iterable[int]) -> str:
        return ", ".join(map(str, ranks))

    return words(step.ranks) + (f" to {words(step.to)}" if step.to else "")
