"""Random legal programs: any cuts, any tiles, any order of issue that the rules allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st

from weft.program.batch import Batch, Rows, Segment
from weft.program.steps import Kind, Program, Stage, Step

SEGMENTS = (Segment(0, 0, 23), Segment(1, 0, 1), Segment(2, 0, 16))
TOKENS = 40


def _chunks(draw: st.DrawFn, rows: Rows, most: int) -> list[Rows]:
    inside = (
        st.sets(st.integers(rows.start + 1, rows.stop - 1), max_size=most - 1) if rows.length > 1 else st.just(set())
    )
    edges = [rows.start, *sorted(draw(inside)), rows.stop]
    return [Rows(a, b) for a, b in pairwise(edges)]


@st.composite
def legal_programs(draw: st.DrawFn, stages: Sequence[Stage]) -> Program:
    """Draws chunks for every stage, then issues whatever may come next in any order."""
    whole, todo = Rows(0, TOKENS), {}
    for stage in stages:
        cut = stage.collective is not Kind.GATHER
        todo[stage.name] = _chunks(draw, whole, 4) if cut else [whole]
    steps: list[Step] = []
    tails: list[tuple[Stage, Rows]] = []
    collectives: list[tuple[Stage, Rows]] = []
    collected: dict[str, list[int]] = {stage.name: [] for stage in stages}
    while any(todo.values()) or tails or collectives:
        ready = _ready(stages, todo, steps, collected)
        choices = [("compute", item) for item in ready]
        choices += [("tail", item) for item in tails] + [("collective", item) for item in collectives]
        what, (stage, rows) = draw(st.sampled_from(choices))
        if what == "compute":
            todo[stage.name].remove(rows)
            before = stages[list(stages).index(stage) - 1] if stage is not stages[0] else None
            after = tuple(i for i in collected[before.name] if steps[i].rows.intersects(rows)) if before else ()
            if stage.collective is Kind.REDUCE and draw(st.booleans()):
                steps.append(Step(Kind.BODY, stage.name, rows, after))
                tails += [(stage, tile) for tile in _chunks(draw, rows, 3)]
                continue
            steps.append(Step(Kind.COMPUTE, stage.name, rows, after))
        elif what == "tail":
            tails.remove((stage, rows))
            steps.append(Step(Kind.TAIL, stage.name, rows))
        else:
            collectives.remove((stage, rows))
            collected[stage.name].append(len(steps))
            steps.append(Step(stage.collective, stage.name, rows))
            continue
        if stage.collective is Kind.REDUCE:
            collectives += [(stage, piece) for piece in _chunks(draw, rows, 2)]
        elif stage.collective is Kind.GATHER:
            collectives.append((stage, rows))
    return Program(tuple(steps))


def _ready(stages, todo, steps, collected):
    """Chunks whose inputs have been issued; in ordered stages only the first chunk of what is left of a sequence."""
    ready = []
    for index, stage in enumerate(stages):
        for rows in todo[stage.name]:
            if index and not _inputs_there(stages[index - 1], rows, todo, steps, collected):
                continue
            if stage.ordered and not _first_of_its_sequences(rows, todo[stage.name]):
                continue
            ready.append((stage, rows))
    return ready


def _inputs_there(before, rows, todo, steps, collected) -> bool:
    if before.collective is None:
        return not any(left.intersects(rows) for left in todo[before.name])
    return sum(steps[i].rows.clip(rows).length for i in collected[before.name]) == rows.length


def _first_of_its_sequences(rows, left) -> bool:
    batch = Batch(SEGMENTS)
    return not any(
        other.start < rows.start and other.intersects(span) and rows.intersects(span)
        for other in left
        for span in batch.spans
    )
