"""Finds what repeats: from a builder that issues the steps of a model of any number of layers to a form.

The builder is asked for a model of few layers; where rounds of steps repeat there, they repeat for all further layers
too. A builder that looks at stages, never at the number of a layer, keeps that promise. Knows order and edges only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from weft.program.batch import Rows
from weft.program.stages import Kind, Outline
from weft.program.steps import Block, Form, Program, Step

FEWEST = 5  # layers: the first and the last are of their own, and a scattered sum hangs over to the next
MOST_ALTERNATING = 4  # layers that differ from each other and then repeat


class Issue(NamedTuple):
    """A step as a builder issues it: `rows` in numbers of offsets; `after` holds places in issue order.

    The rest is as in `Step`.
    """

    kind: Kind
    part: str
    layer: int | None
    rows: Rows
    after: tuple[int, ...] = ()
    wanted: bool = False
    on: str = ""
    wire: str = ""
    algorithm: str = ""
    ranks: tuple[int, ...] = ()
    to: tuple[int, ...] = ()


def plain(issues: Sequence[Issue]) -> Program:
    """A program of one block, from steps whose rows are a batch's own."""
    offsets = tuple(sorted({offset for each in issues for offset in each.rows}))
    number = {offset: place for place, offset in enumerate(offsets)}
    inside = [each._replace(rows=Rows(*(number[offset] for offset in each.rows))) for each in issues]
    return Program(_form(inside, None, 0), offsets)


class _Repeated(NamedTuple):
    """Steps from `start` on that repeat: `length` of them, `rounds` times, each time `layers` layers on."""

    start: int
    length: int
    rounds: int
    layers: int


def folded(outline: Outline, issue: Callable[[Outline], Sequence[Issue]]) -> Form:
    """The form for all layers of what `issue` gives for some."""
    layers = FEWEST
    while layers < outline.layers:
        issues = issue(outline.of(layers))
        repeated = _repeated(issues, layers)
        if repeated is None:
            layers *= 2
        elif rest := (outline.layers - layers) % repeated.layers:
            layers += rest
        else:
            return _form(issues, repeated, outline.layers - layers)
    issues = issue(outline)
    return _form(issues, _repeated(issues, outline.layers), 0)


def _form(issues: Sequence[Issue], repeated: _Repeated | None, missing: int) -> Form:
    """With the repeated rounds as a block, and as many more of them as `missing` layers want."""
    whole = max(each.rows.length for each in issues)
    spans = sorted({each.rows for each in issues}, key=lambda rows: (rows.length == whole, rows))
    number = {rows: place for place, rows in enumerate(spans)}
    steps = [
        Step(
            each.kind, each.part, each.layer, number[each.rows], tuple([index - edge for edge in each.after]),
            *each[5:],
        )
        for index, each in enumerate(issues)
    ]  # fmt: skip
    chunks = tuple((rows.start, rows.stop) for rows in spans)
    if repeated is None:
        return Form((Block(tuple(steps)),), chunks)
    start, length, rounds, layers = repeated
    stop = start + length * rounds
    blocks = [
        Block(tuple(steps[:start])),
        Block(tuple(steps[start : start + length]), rounds + missing // layers, layers),
        Block(tuple([step.later(missing) for step in steps[stop:]])),
    ]
    return Form(tuple(block for block in blocks if block.steps), chunks)


def _repeated(issues: Sequence[Issue], layers: int) -> _Repeated | None:
    """The longest run of rounds, begun where a layer begins if it can be."""
    for each in range(1, min(MOST_ALTERNATING, layers // 2) + 1):
        length = _length(issues, layers // 2, each)
        if not length:
            continue
        start, run = _longest([_again(issues, index, length, each) for index in range(len(issues) - length)])
        rounds = run // length + 1
        if rounds < 2:
            continue
        first = next(issue for issue in issues if issue.layer is not None)
        for later in range(length):
            begin, fewer = issues[start + later], (run - later) // length + 1
            if (begin.kind, begin.part, begin.rows) == (first.kind, first.part, first.rows) and fewer >= 2:
                return _Repeated(start + later, length, fewer, each)
        return _Repeated(start, length, rounds, each)
    return None


def _length(issues: Sequence[Issue], layer: int, layers: int) -> int:
    """Steps from one that is in the middle to the one like it, some layers on; 0 if there is none."""
    begin = next(index for index, issue in enumerate(issues) if issue.layer == layer)
    like = issues[begin]._replace(layer=layer + layers, after=())
    return next((at - begin for at in range(begin, len(issues)) if issues[at]._replace(after=()) == like), 0)


def _again(issues: Sequence[Issue], index: int, length: int, layers: int) -> bool:
    """The step `length` places on is the same, some layers on, and so is what it waits for."""
    pairs = [(index, index + length), *zip(issues[index].after, issues[index + length].after, strict=False)]
    alike = len(issues[index].after) == len(issues[index + length].after)
    return alike and all(_like(issues[one], issues[other], layers) for one, other in pairs) and all(
        other - one == length for one, other in pairs
    )  # fmt: skip


def _like(one: Issue, other: Issue, layers: int) -> bool:
    later = one.layer if one.layer is None else one.layer + layers
    return one._replace(layer=later, after=()) == other._replace(after=())


def _longest(alike: Sequence[bool]) -> tuple[int, int]:
    """Where the longest run of True starts, and how long it is."""
    return max(_runs(alike), key=lambda run: run[1], default=(0, 0))


def _runs(alike: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = 0
    for index, yes in enumerate([*alike, False]):
        if not yes:
            yield start, index - start
            start = index + 1
