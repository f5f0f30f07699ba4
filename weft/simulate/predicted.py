"""Predicting: a program and costs in, the `Timeline` out that executing it would give.

A program of several sections is laid out section after section, each at its own ranks' pace, once it is known when
its rows come. Knows programs and costs; knows nothing of models or machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from weft.program.batch import Batch
from weft.program.steps import Form, Issued, Program
from weft.simulate.clock import Taken
from weft.simulate.cost import ComputeCosts, Costs
from weft.simulate.divided import SectionForm, Spot, sections_of
from weft.simulate.run import LaidOut, Structure, Work, coupling, lay_out, structure_of, taken
from weft.timeline.timeline import Event, Timeline

Pricing = Callable[
    [Work, int, tuple[int, ...]], Taken
]  # of a work and its chunk, on some ranks; all where these are ()


class LaidSection(NamedTuple):
    """A section's steps, and when rows come to those that wait for some, in seconds."""

    section: SectionForm
    laid: LaidOut
    come: Mapping[Spot, float]


def lay_out_sections(
    form: Form, costs: Costs, wire: str, price: Pricing, most: int | None = None, limit: float = float("inf")
) -> Iterator[LaidSection]:  # fmt: skip
    """Section after section; see `lay_out` for `most`. `wire`: of steps that name none. Raises `TooLongError` where a
    section's lanes alone take longer than `limit`, in seconds."""
    way, ended = costs.wires[wire], dict[int, float]()
    for section in sections_of(form, costs.world == 1):
        structure = structure_of(section.form, way.fused)
        each = [price(work, chunk, section.ranks) for work, chunk in structure.works]
        between = coupling(costs, way, section.form.lanes)
        if structure.bound(each, between.credit) > limit:
            raise TooLongError
        come = {spot: max(ended[number] for number in numbers) for spot, numbers in section.brings.items()}
        laid = lay_out(structure, each, between, most, come)
        ended |= {number: laid.ended(spot) for spot, number in section.sends.items()}
        yield LaidSection(section, laid, come)


class TooLongError(Exception):
    """What is laid out takes longer than it may."""


def simulate(program: Program, batch: Batch, costs: Costs, wire: str, title: str = "") -> Timeline:
    """What executing the program would give, predicted. Raises KeyError for a wire without costs, and `ProgramError`
    for a program that can't be taken apart into sections."""

    def priced(rank: Callable[[tuple[int, ...]], ComputeCosts]) -> Pricing:
        return lambda work, chunk, ranks: taken(work, program.rows[chunk], batch, costs, wire, rank(ranks))

    events: list[Event] = []
    issued = list(program)
    for each in lay_out_sections(program.form, costs, wire, priced(costs.pace_of)):
        section, laid, come = each
        mine = [step for step in issued if section.keeps(step.step)]
        structure, earliest = laid.structure, _by_place(laid.structure, come)
        pace = _taken(structure, priced(costs.pace_of), section.ranks)
        for rank in section.ranks or range(costs.world):
            spans = list(zip(laid.starts, laid.stops, strict=True))
            if len(costs.ranks) > 1:
                own = costs.ranks[rank]
                alone = _taken(structure, priced(lambda ranks, own=own: own), section.ranks)  # type: ignore[misc]
                spans = _at_its_own_pace(structure, spans, pace, alone, earliest)
            for step, (work, _, _), (start, stop) in zip(mine, structure.steps, spans, strict=True):
                if pace[work].seconds or batch.wanted(step.rows).length:  # else nothing is done
                    events += _events(step, rank, section.ranks, start, stop)
    return Timeline(tuple(events), "predicted", title)


def _events(step: Issued, rank: int, ranks: tuple[int, ...], start: float, stop: float) -> Iterator[Event]:
    """On the rank and, of what the first of the ranks sends, on those that receive it."""
    for where in (rank, *(step.step.to if ranks and rank == ranks[0] else ())):
        yield Event(where, step.lane, step.kind, step.stage, step.rows, start, stop)


def _taken(structure: Structure, price: Pricing, ranks: tuple[int, ...]) -> list[Taken]:
    return [price(work, chunk, ranks) for work, chunk in structure.works]


def _by_place(structure: Structure, come: Mapping[Spot, float]) -> dict[int, float]:
    """By place among the section's steps of all rounds."""
    begins = [0]
    for block, steps in zip(structure.form.blocks, structure.blocks, strict=True):
        begins.append(begins[-1] + len(steps) * block.rounds)
    return {begins[block] + at: seconds for (block, at), seconds in come.items()}


def _at_its_own_pace(
    structure: Structure, spans: list[tuple[float, float]], pace: Sequence[Taken], own: Sequence[Taken],
    earliest: Mapping[int, float],
) -> list[tuple[float, float]]:  # fmt: skip
    """The steps of a rank that computes faster than the group: the same collectives, and more waiting for them."""
    shifted, free, index = list(spans), 0.0, -1
    for work, lane, after in structure.steps:
        index += 1
        if lane:
            continue
        start, stop = spans[index]
        begin = max([free, earliest.get(index, 0.0), *(spans[index - distance][1] for distance in after)])
        begin = max(begin, 0.0 if free else start)
        stretched = (stop - start) / pace[work].seconds if pace[work].seconds > 0 else 1.0
        free = begin + own[work].seconds * stretched
        shifted[index] = (begin, free)
    return shifted
