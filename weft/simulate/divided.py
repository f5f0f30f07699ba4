"""Programs of several sections, taken apart: what each section's ranks do, and what it waits for from others.

Rows go on from section to section, and nothing ever comes back in the same program; so the sections can be laid out one
after the other, each on lanes of its own, once it is known when its rows come. Knows forms; knows no costs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from weft.program.stages import COLLECTIVES, Kind
from weft.program.steps import Block, Form, ProgramError, Step

Spot = tuple[int, int]  # a block's number, and a step's place in it


class SectionForm(NamedTuple):
    """The steps of some ranks, which all do the same. `brings`: for steps that wait for rows to come, the sends that
    bring them; `sends`: its own sends. Both by their numbers, in issue order."""

    ranks: tuple[int, ...]
    form: Form
    brings: dict[Spot, tuple[int, ...]]
    sends: dict[Spot, int]
    alone: bool

    def keeps(self, step: Step) -> bool:
        """It is one of these ranks' steps, and takes time."""
        return keeps(self.ranks, step, self.alone)


@lru_cache(maxsize=256)
def sections_of(form: Form, alone: bool = False) -> tuple[SectionForm, ...]:
    """In the order in which rows go through them; one, of the ranks (), where all steps are for all. Raises
    `ProgramError` for programs that are not of such a form: those with steps for all ranks beside some for a few, or
    with rows that come back. `alone`: there is one rank."""
    if not form.ranks:
        return (_section(form, (), {}, alone),)
    steps = [step for block in form.blocks for step in block.steps]
    groups = list(dict.fromkeys(step.ranks for step in steps))
    if () in groups or any(set(one) & set(other) for one in groups for other in groups if one != other):
        raise ProgramError("only programs whose ranks form groups that have some of the steps each can be predicted")
    order = {ranks: place for place, ranks in enumerate(sorted(groups))}
    if any(step.to and order.get(step.to, -1) <= order[step.ranks] for step in steps):
        raise ProgramError("a program in which rows don't go on to later ranks, all of a group, can't be predicted")
    numbers = _numbers(form)
    return tuple(_section(form, ranks, numbers, len(ranks) == 1) for ranks in order)


def _numbers(form: Form) -> dict[Spot, int]:
    """Of the sends. Raises `ProgramError` for one that repeats."""
    found: dict[Spot, int] = {}
    for number, block in enumerate(form.blocks):
        for place, step in enumerate(block.steps):
            if step.kind is Kind.SEND:
                if block.rounds > 1:
                    raise ProgramError("a program in which sends repeat can't be predicted; write their rounds out")
                found[number, place] = len(found)
    return found


def _section(form: Form, ranks: tuple[int, ...], numbers: dict[Spot, int], alone: bool) -> SectionForm:
    """Sums of one rank alone are left out: its partials are the sums already."""
    if not ranks and not alone:
        return SectionForm((), form, {}, {}, False)
    places = _StepNumbers(form, ranks, alone)
    blocks: list[Block] = []
    brings: dict[Spot, tuple[int, ...]] = {}
    sends: dict[Spot, int] = {}
    for number, block in enumerate(form.blocks):
        kept: list[Step] = []
        for place, step in enumerate(block.steps):
            if not keeps(ranks, step, alone):
                continue
            spot = len(blocks), len(kept)
            if step.kind is Kind.SEND:
                sends[spot] = numbers[number, place]
            waits, brought = places.edges(number, place)
            if brought:
                brings[spot] = tuple(numbers[each] for each in brought)
            kept.append(step._replace(after=waits, ranks=(), to=()))
        if kept:
            blocks.append(replace(block, steps=tuple(kept)))
    return SectionForm(ranks, Form(tuple(blocks), form.chunks), brings, sends, alone)


def keeps(ranks: tuple[int, ...], step: Step, alone: bool) -> bool:
    """It is one of these ranks' steps, and takes time: what one rank `alone` sums is the sum already."""
    summed = alone and step.kind in COLLECTIVES and step.kind is not Kind.SEND
    return step.ranks == ranks and not summed


class _StepNumbers:
    """Where a section's steps are, among all and among its own."""

    def __init__(self, form: Form, ranks: tuple[int, ...], alone: bool) -> None:
        self.form, self.ranks, self.alone = form, ranks, alone
        self._begins, self._own = [0], [0]  # of each block: in all steps, and in the section's
        self._inside: list[list[int]] = []  # of each block: how many of the section's steps come before one
        for block in form.blocks:
            counts = [0]
            for step in block.steps:
                counts.append(counts[-1] + keeps(ranks, step, alone))
            self._inside.append(counts)
            self._begins.append(self._begins[-1] + len(block.steps) * block.rounds)
            self._own.append(self._own[-1] + counts[-1] * block.rounds)

    def edges(self, block: int, place: int) -> tuple[tuple[int, ...], tuple[Spot, ...]]:
        """Distances among the section's own steps, and the sends of others, that a step waits for."""
        step, rounds = self.form.blocks[block].steps[place], self.form.blocks[block].rounds
        length, own = len(self.form.blocks[block].steps), self._inside[block][-1]
        waits, brought = list[int](), list[Spot]()
        for distance in step.after:
            at, target = self._found(self._begins[block] + place - distance)
            if not keeps(self.ranks, target, self.alone):
                if target.kind is Kind.SEND:
                    brought.append(self._spot(self._begins[block] + place - distance))
                continue
            mine = self._own[block] + self._inside[block][place]
            if rounds > 1:  # edges of later rounds must be as long
                later = self._found(self._begins[block] + length + place - distance)[0]
                if mine + own - later != mine - at:
                    raise ProgramError("a program whose edges have other lengths in later rounds can't be predicted")
            waits.append(mine - at)
        return tuple(waits), tuple(brought)

    def _spot(self, at: int) -> Spot:
        block = next(number for number, begin in enumerate(self._begins[1:]) if at < begin)
        return block, (at - self._begins[block]) % len(self.form.blocks[block].steps)

    def _found(self, at: int) -> tuple[int, Step]:
        """The place among the section's own steps of the one at a place among all, or where it would be."""
        block, place = self._spot(at)
        round_ = (at - self._begins[block]) // len(self.form.blocks[block].steps)
        inside = self._inside[block]
        return self._own[block] + round_ * inside[-1] + inside[place], self.form.blocks[block].steps[place]
