"""What a check has seen so far of each stage. Knows rows and lanes; knows no rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weft.program.batch import Rows
from weft.program.steps import Issued, ProgramError

Arrival = tuple[Rows, str, int]  # rows that a collective brings, its lane, its place on that lane


@dataclass
class Progress:
    """What has been issued of one stage so far, of one rank's steps."""

    entered: list[Rows] = field(default_factory=list)  # each rank its part
    gathered: list[Arrival] = field(default_factory=list)  # input
    started: list[Rows] = field(default_factory=list)  # by compute or body, or received
    received: list[Rows] = field(default_factory=list)  # from ranks that computed it
    bodies: list[Rows] = field(default_factory=list)
    partials: list[Rows] = field(default_factory=list)  # by compute or tail
    collected: list[Arrival] = field(default_factory=list)  # by a collective or a send

    def since(self, places: dict[str, int]) -> Any:
        """All of it, with places on lanes counted from these."""
        arrivals = ([(rows, lane, place - places[lane]) for rows, lane, place in each]
                    for each in (self.gathered, self.collected))  # fmt: skip
        mine = (self.entered, self.started, self.received, self.bodies, self.partials)
        return *(each[:] for each in mine), *arrivals

    def moved(self, places: dict[str, int]) -> None:
        """So many places on each lane later."""
        for each in (self.gathered, self.collected):
            each[:] = [(rows, lane, place + places[lane]) for rows, lane, place in each]

    def receive(self, rows: Rows, lane: str, place: int) -> None:
        """All of it, of these rows."""
        self.started.append(rows)
        self.received.append(rows)
        self.collected.append((rows, lane, place))


def once(done: list[Rows], step: Issued) -> None:
    """Raises `ProgramError` if some of a step's rows are among those that are done."""
    start, stop = step.rows
    if done and any([first < stop and start < last for first, last in done]):
        raise ProgramError(f"{step.name!r}: some of these rows were done before")


def covered(pieces: list[Rows], rows: Rows) -> int:
    """How many of `rows` are in one of the (disjoint) pieces."""
    if rows in pieces:
        return rows.length
    start, stop = rows
    total = 0
    for first, last in pieces:
        if first < stop and start < last:
            total += (last if last < stop else stop) - (first if first > start else start)
    return total
