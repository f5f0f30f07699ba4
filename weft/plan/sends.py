"""From messages between sections that were measured to what they cost. Knows seconds; runs nothing itself. No torch."""

from __future__ import annotations

from weft.plan.samples import Samples, sent_to
from weft.program.stages import Kind
from weft.simulate.cost import Contention, Table
from weft.timeline.timeline import Timeline, median

KERNEL = 1.2  # interrupts of the network's are on no process's account: measured, docs/log.md
LOST = 0.5  # of what a message takes of the processor, that computation beside it goes without


class Sends:
    """Round trips to each section from the one before it."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.subject = samples, samples.subject
        assert self.subject.layout is not None, "a layout of one section sends nothing on"
        self.sections = self.subject.layout.sections

    def table(self, wire: str) -> Table:
        """Seconds of a message against its bytes, between the two sections where that takes longest."""
        return Table.slowest([self._to(number, wire) for number in range(1, len(self.sections))])

    def _to(self, number: int, wire: str) -> Table:
        row, name = self.subject.width * self.subject.elements[wire], sent_to(number)
        rows = sorted({run.rows for run in self.samples.runs if run.name == name})
        seconds, first = list[float](), self.sections[number - 1].ranks[0]
        for n in rows:
            taken = [each for sample in self.samples.of(name, n, wire) for each in halves(sample.timeline, first)]
            seconds.append(max([median(taken), *seconds[-1:]]))
        return Table(tuple(n * row for n in rows), tuple(seconds)) if len(rows) > 1 else Table.line(seconds[0], 0.0)

    def contention(self) -> Contention:
        """What a message does to computation beside it, by what it takes of the processor."""
        name = sent_to(1)
        rows = sorted({run.rows for run in self.samples.runs if run.name == name})
        some, many = (self._processor(name, n) for n in (rows[0], rows[-1]))
        row = self.subject.width * self.subject.elements[self.subject.first_wire]
        per_byte = max(0.0, many - some) / max(1.0, (rows[-1] - rows[0]) * row)
        return Contention(small=LOST * some, fixed=LOST * some, per_byte=LOST * per_byte)

    def _processor(self, name: str, rows: int) -> float:
        """Seconds of one message, on the rank that takes most."""
        each = []
        for sample in self.samples.of(name, rows):
            count = sum(event.rank == sample.timeline.ranks[0] for event in sample.timeline.events)
            each.append(KERNEL * max(sample.processor) / count)
        return median(each)


def halves(timeline: Timeline, rank: int) -> list[float]:
    """Half of each round trip but the first, on the clock of a rank that begins them."""
    sent = [e for e in sorted(timeline.events, key=lambda e: e.stop) if e.rank == rank and e.kind is Kind.SEND]
    return [(back.stop - there.start) / 2 for there, back in zip(sent[::2], sent[1::2], strict=True)][1:]
