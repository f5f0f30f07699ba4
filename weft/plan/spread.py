"""Programs that measure a pipeline's sections: all of them at once, each its own layers; messages between two; and sums
of any of the ranks.

They compute nothing of use. Every section goes through its first layers with the same rows, which is what they do while
pieces flow: ranks of one machine then share its memory as they will. Knows programs; knows no costs.
"""

from __future__ import annotations

from weft.layout import Layout
from weft.program.batch import Rows, one_prompt
from weft.program.fold import Issue, plain
from weft.program.pipe import lane_of
from weft.program.stages import COLLECTIVES, Kind, Outline
from weft.program.steps import Program

SUMS = 5  # one upon the other: the first one finds the link idle
ROUND_TRIPS = 4  # of a message: the first one finds the link idle


def spread(program: Program, outline: Outline, layout: Layout, sends: bool) -> Program:
    """The program of a few layers, on each section's first ones. `sends`: rows come to the later sections first, as the
    first one embeds them; where nothing is computed, none need come."""
    first, last = layout.sections[0], layout.sections[-1]
    embed, whole = outline.before[0].part, Rows(0, program.offsets[-1])
    issues = [Issue(Kind.COMPUTE, embed, None, whole, ranks=first.ranks)]
    came = dict[tuple[int, ...], tuple[int, ...]]()
    for number, section in enumerate(layout.sections[1:] if sends else (), start=1):
        came[section.ranks] = (len(issues),)
        send = Issue(Kind.SEND, embed, None, whole, on=lane_of(number), ranks=first.ranks, to=section.ranks)
        issues.append(send)
    for section in layout.sections:
        places = dict[int, int]()
        for each in program:
            step = each.step
            if step.part == embed or (each.layer is None and section is not last):
                continue
            after = tuple(places[edge] for edge in each.after if edge in places) or came.get(section.ranks, ())
            places[each.number] = len(issues)
            layer = None if each.layer is None else each.layer + section.first
            after = () if each.kind in COLLECTIVES else after
            issues.append(Issue(
                each.kind, step.part, layer, each.rows, after, step.wanted, step.on, step.wire, step.algorithm,
                section.ranks,
            ))  # fmt: skip
    return plain(issues)


def round_trips(outline: Outline, layout: Layout, number: int, rows: int) -> Program:
    """Rows to section `number` from the one before, and back, one message after the other."""
    there, back = layout.sections[number - 1], layout.sections[number]
    stage, whole = outline.layer[-1], Rows(0, one_prompt(rows).tokens)
    issues: list[Issue] = []
    for _ in range(ROUND_TRIPS):
        for one, other in ((there, back), (back, there)):
            after = (len(issues) - 1,) if issues else ()
            issues.append(Issue(
                Kind.SEND, stage.part, there.stop - 1, whole, after, on=lane_of(number), ranks=one.ranks,
                to=other.ranks,
            ))  # fmt: skip
    return plain(issues)


def sums_of_some(outline: Outline, ranks: tuple[int, ...], rows: int) -> Program:
    """Sums of these ranks, one after the other, of which nothing is computed."""
    stage, whole = outline.layer[-1], Rows(0, rows)
    return plain(
        [Issue(Kind.REDUCE, stage.part, layer, whole, ranks=ranks) for layer in range(min(SUMS, outline.layers))]
    )
