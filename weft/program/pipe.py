"""Pipelines: sections of layers on ranks of their own, through which a batch's pieces flow one behind the other.

    time       1          2          3          4
    section 0  piece 0    piece 1    piece 2
    section 1             piece 0    piece 1    piece 2

Steps are issued in this order, column by column; each section's part of a piece ends with the sends of its rows. So
ranks are told to receive the next piece before they compute one, and it travels meanwhile. Between each two sections
rows travel on a lane of their own, as the sums inside a section do.
Knows parts of forms; knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from weft.layout import Layout, Section
from weft.program.batch import Rows
from weft.program.stages import Kind, Outline
from weft.program.steps import Block, Form, Step


class SomeLayers(NamedTuple):
    """Some layers of a model: how many; whether what comes before all of them is with them, and what comes after them.
    `narrows`: rows that nobody wants stop in these layers."""

    layers: int
    begins: bool
    ends: bool
    narrows: bool


def lane_of(section: int) -> str:
    """On which rows come to a section."""
    return f"pipe{section}"


def piped(
    outline: Outline, pieces: Sequence[Rows], layout: Layout | None, part_of: Callable[[Rows, SomeLayers], Form]
) -> Form:  # fmt: skip
    """The form in which `pieces` (in numbers of offsets) flow through a layout's sections; without one, through the
    layers of all ranks. `part_of`: the form of a part, whose rows are counted from the piece's first one."""
    sections = layout.sections if layout is not None else (Section(0, outline.layers, (), ()),)
    pipe = _Pipe(outline, sections, part_of)
    for time in range(len(pieces) + len(sections) - 1):
        for number in range(len(sections)):
            if 0 <= time - number < len(pieces):
                pipe.part(number, pieces[time - number])
    pipe.head(Rows(pieces[0].start, pieces[-1].stop))
    return pipe.form()


class _Pipe:
    """What is issued so far. `sent`: of each section the sends to it that no part has waited for yet, by the place in
    issue order; `ended`: places of what the last section left."""

    def __init__(
        self, outline: Outline, sections: Sequence[Section], part_of: Callable[[Rows, SomeLayers], Form]
    ) -> None:  # fmt: skip
        self.outline, self.sections, self.part_of = outline, sections, part_of
        self.blocks: list[Block] = []
        self.length = 0
        self.chunks: dict[Rows, int] = {}
        self.sent: list[list[int]] = [[] for _ in sections]
        self.ended: list[int] = []

    def part(self, number: int, piece: Rows) -> None:
        """A section's layers, for one piece."""
        section, last = self.sections[number], number + 1 == len(self.sections)
        form = self.part_of(piece, SomeLayers(section.layers, number == 0, last, last and self.outline.narrows))
        chunks = [self._chunk(Rows(piece.start + first, piece.start + stop)) for first, stop in form.chunks]
        arriving = sum(step.kind is Kind.SEND and not step.part for step in form.blocks[0].steps)
        sent, self.sent[number] = self.sent[number][:arriving], self.sent[number][arriving:]
        for place, block in enumerate(form.blocks):
            steps = block.steps if place else self._joined(block.steps, sent)
            self._add(replace(block, steps=tuple([self._here(step, number, chunks) for step in steps])), number)

    def _joined(self, steps: Sequence[Step], sent: Sequence[int]) -> tuple[Step, ...]:
        """A part's first steps, without those that stand for sends: what waits for these waits for the sends."""

        def after(at: int, distance: int) -> int:
            return self.length + at - len(sent) - sent[at - distance] if at - distance < len(sent) else distance

        return tuple(
            step._replace(after=tuple([after(at, distance) for distance in step.after]))
            for at, step in enumerate(steps)
        )[len(sent) :]

    def _here(self, step: Step, number: int, chunks: Sequence[int]) -> Step:
        """A part's step, on the ranks of its section."""
        section = self.sections[number]
        step = step.later(section.first)._replace(chunk=chunks[step.chunk], ranks=section.ranks)
        if step.kind is not Kind.SEND:
            return step
        return step._replace(on=lane_of(number + 1), to=self.sections[number + 1].ranks)

    def _add(self, block: Block, number: int) -> None:
        """A block, joined with one before it that is issued once too; and what others will wait for."""
        ends = self.outline.stages[-1 - len(self.outline.after)]
        final = block.layers * (block.rounds - 1)
        for at, step in enumerate(block.steps):
            place = self.length + len(block.steps) * (block.rounds - 1) + at
            if step.kind is Kind.SEND:
                self.sent[number + 1].append(place)
            elif step.kind is ends.collective and (step.part, step.later(final).layer) == (ends.part, ends.layer):
                self.ended.append(place)
        self.length += len(block.steps) * block.rounds
        if self.blocks and block.rounds == self.blocks[-1].rounds == 1:
            block = replace(block, steps=(*self.blocks.pop().steps, *block.steps))
        self.blocks.append(block)

    def head(self, rows: Rows) -> None:
        """What comes after all layers, once, for all rows."""
        [stage] = self.outline.after
        chunk, ranks = self._chunk(rows), self.sections[-1].ranks
        after = tuple([self.length - place for place in self.ended])
        compute = Step(Kind.COMPUTE, stage.part, None, chunk, after, wanted=True, ranks=ranks)
        gather = Step(Kind.GATHER, stage.part, None, chunk, wanted=True, ranks=ranks)
        self._add(Block((compute, gather)), len(self.sections) - 1)

    def _chunk(self, rows: Rows) -> int:
        return self.chunks.setdefault(rows, len(self.chunks))

    def form(self) -> Form:
        """All of it."""
        return Form(tuple(self.blocks), tuple((rows.start, rows.stop) for rows in self.chunks))
