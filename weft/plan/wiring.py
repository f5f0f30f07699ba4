"""Which wire each of a program's sums travels on.

A sum has the same one in all layers, but for those whose errors no later sum makes up for, which don't go below LAST:
the last layer's of wanted rows alone (they are few), and what is no sum (inputs, the residual stream itself). Knows
programs and wires by name; knows nothing of costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weft.program.stages import ROWS_TRAVEL, SUMS
from weft.program.steps import Form, Program, Step
from weft.wires import WIRES

LAST = "int8"
Sum = tuple[str, int]  # the part that it is of, and the number of its chunk


@dataclass(frozen=True)
class Wiring:
    """`usual`: of all sums but those in `others`."""

    usual: str
    others: Mapping[Sum, str] = field(default_factory=dict)

    @classmethod
    def by_sum(cls, wires: Mapping[Sum, str]) -> Wiring:
        """Of each sum; the usual one is that of most of them."""
        all_of_them = list(wires.values())
        usual = max(WIRES[::-1], key=all_of_them.count)
        return cls(usual, {each: wire for each, wire in wires.items() if wire != usual})

    def of(self, step: Step) -> str:
        """The wire of a collective."""
        wire = self.others.get((step.part, step.chunk), self.usual)
        final = step.wanted or step.kind not in SUMS
        return LAST if final and WIRES.index(wire) > WIRES.index(LAST) else wire

    def on(self, program: Program) -> Program:
        """The same program, travelling so."""

        def wired(step: Step) -> Step:
            wire = self.of(step) if travels(step) else self.usual
            return step._replace(wire=wire) if wire != self.usual else step

        return program if not self.others and self.usual != WIRES[-1] else program.by(wired)


def reasons(wiring: Wiring, exposed: Mapping[Sum, float], wires: Sequence[str], program: Program) -> tuple[str, ...]:
    """Why sums don't travel on more exact ones of these wires: a line for each wire. `exposed`: seconds that the pass
    would take longer with that one of the sums on the next more exact one."""
    by_wire: dict[str, list[Sum]] = {}
    for each in exposed:
        by_wire.setdefault(wiring.others.get(each, wiring.usual), []).append(each)
    if not exposed and len(wires) > 1:
        return ("all sums exact: with fewer bytes the pass would take hardly less",)
    return tuple(
        f"{_named(sums, program)} as {wire}: on {wires[wires.index(wire) - 1]} each alone would be exposed "
        + _longer([exposed[each] for each in sums])
        for wire, sums in by_wire.items()
    )


def _named(sums: Sequence[Sum], program: Program) -> str:
    if len(sums) == len(sums_of(program.form)):
        return "all sums"
    return ", ".join(f"{part} {program.rows[chunk]}" for part, chunk in sums)


def _longer(seconds: Sequence[float]) -> str:
    least, most = (f"{max(0.0, 1e3 * each):.1f}" for each in (min(seconds), max(seconds)))
    if not float(most):
        return "as soon as the link is a little slower than it was measured"
    return f"for {least if least == most else f'{least} to {most}'} ms a pass"


def travels(step: Step) -> bool:
    """Whether a wire makes a difference to it."""
    return step.kind in ROWS_TRAVEL


def sums_of(form: Form) -> list[Sum]:
    """Those of a form, in the order in which they are issued first."""
    steps = (step for block in form.blocks for step in block.steps if travels(step))
    return list(dict.fromkeys((step.part, step.chunk) for step in steps))
