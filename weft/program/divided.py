"""Programs whose steps are for some of the ranks: what no rank can see by itself.

All rows must go through every stage once, what some ranks computed is summed over just them, and a step may wait only
for what its ranks take part in. The rest, that each rank has what it reads, check.py proves rank by rank. Which ranks
have a stage's weights, keys and values is not for a program to say: whoever builds it knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weft.program.batch import Rows
from weft.program.progress import covered, once
from weft.program.stages import Kind, Outline
from weft.program.steps import Form, Issued, Program, ProgramError, Step

_Done = tuple[Rows, tuple[int, ...]]  # rows, and the ranks that have done something with them
_PARTIALS = (Kind.TAIL, Kind.REDUCE, Kind.REDUCE_SCATTER)
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
        name, several = f"{step.kind} {step.part}", len(step.ranks or range(world))
        if step.algorithm == "exchange" and several > 2:
            raise ProgramError(f"{name}: only two ranks exchange, and it is for {several}")
        if any(not 0 <= rank < world for rank in (*step.ranks, *step.to)):
            raise ProgramError(f"{name}: for ranks {_said(step)}, but there are only {world}, from 0 on")
        if any(list(ranks) != sorted(set(ranks)) for ranks in (step.ranks, step.to)):
            raise ProgramError(f"{name}: its ranks {_said(step)} don't rise")
        if (step.kind is Kind.SEND) != bool(step.to) or (step.to and not step.ranks):
            raise ProgramError(f"{name}: a send, and nothing else, names the ranks that it goes from and to")
        if set(step.ranks) & set(step.to):
            raise ProgramError(f"{name}: some of its ranks would send to themselves ({_said(step)})")


def demand_whole(program: Program, outline: Outline, rows: Rows, world: int) -> None:
    """Raises `ProgramError` unless all `rows` go through every stage once, whichever ranks they are on, and what these
    computed is summed over just them."""
    issued = list(program)
    computed: dict[int, list[_Done]] = {place: [] for place in range(len(outline.stages))}
    spread: list[_Done] = []  # rows of which each rank has its part only
    for each in issued:
        ranks = each.step.ranks or tuple(range(world))
        for edge in each.after:  # of a send those that send wait
            if 0 <= edge < each.number and not set(ranks) <= _concerned(issued[edge].step, world):
                raise ProgramError(f"{each.name!r}: waits for {issued[edge].name!r}, in which its ranks have no part")
        place = outline.place(each.step.part, each.layer)
        assert place is not None, "each rank's own steps are checked first"
        if each.kind in (Kind.COMPUTE, Kind.BODY):
            once([done for done, _ in computed[place]], each)
            _demand_share(each, ranks, computed[place])
            computed[place].append((each.rows, ranks))
        elif each.kind in _PARTIALS or (each.kind is Kind.GATHER and each.step.ranks):
            _demand_same(each, ranks, computed[place])
        if each.kind in (Kind.REDUCE_SCATTER, Kind.ENTER, Kind.ALL_GATHER):
            _demand_same(each, ranks, spread)
            spread += [(each.rows, ranks)] if (each.rows, ranks) not in spread else []
    for place, stage in enumerate(outline.stages):
        if covered([done for done, _ in computed[place]], rows) < rows.length:
            raise ProgramError(f"{stage.name}: not all of the rows {rows} go through it")


def _demand_same(step: Issued, ranks: tuple[int, ...], done: Sequence[_Done]) -> None:
    """What is done with rows is done by the ranks that have them."""
    for rows, others in done:
        if rows.intersects(step.rows) and ranks != others:
            raise ProgramError(f"{step.name!r}: for ranks {ranks}, but its rows are those of {others}")


def _demand_share(step: Issued, ranks: tuple[int, ...], done: Sequence[_Done]) -> None:
    """A rank has one share of a stage: what makes the whole with some ranks does not with fewer, or others."""
    for _, others in done:
        if ranks != others and not set(ranks).isdisjoint(others):
            raise ProgramError(f"{step.name!r}: for ranks {ranks}, but this stage is divided over {others}")


def _concerned(step: Step, world: int) -> set[int]:
    return {*step.ranks, *step.to} or set(range(world))


def _said(step: Step) -> str:
    def words(ranks: Iterable[int]) -> str:
        return ", ".join(map(str, ranks))

    return words(step.ranks) + (f" to {words(step.to)}" if step.to else "")
