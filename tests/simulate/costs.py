"""Costs as a small pair of machines might have them, for tests without machines."""

from __future__ import annotations

from dataclasses import replace

from weft.simulate.cost import ComputeCosts, Contention, Costs, Table, WireCosts


def table(*points: tuple[float, float]) -> Table:
    """Sizes with milliseconds."""
    return Table(tuple(size for size, _ in points), tuple(ms / 1e3 for _, ms in points))


NOTHING = Table((1.0,), (0.0,))
RANK = ComputeCosts(
    body={
        "attention": table((1, 0.4), (16, 0.8), (64, 1.9), (256, 7)),
        "mlp": table((1, 0.5), (16, 2), (64, 4.5), (256, 14)),
        "embed": table((1, 0.05), (256, 0.4)), "head": table((1, 1.9), (16, 4.8)),
    },
    tail={
        "attention": table((1, 0.4), (16, 0.67), (64, 1.0), (128, 1.9)),
        "mlp": table((1, 0.7), (16, 1.3), (64, 2.6), (128, 4.9)), "embed": NOTHING, "head": NOTHING,
    },
    enter=table((0, 0), (128, 0.2)), present=Table.line(1.2e-8, 0.0), past=2.2e-8, one=3e-7,
    begin=Table.line(2e-4, 0.0), scored="attention",
)  # fmt: skip


def costs(
    times: float = 1.0, *, ranks: tuple[ComputeCosts, ...] = (RANK,), contention: Contention | None = None
) -> Costs:
    """Two ranks of a model of width 1024 over a link of `times` 420 Mbit/s, which is about balance."""
    a_byte = 19e-9 / times
    wire = WireCosts({"exchange": Table.line(0.3e-3, a_byte)}, 65536, Table.line(0.3e-3, a_byte / 2), element=4.0)
    half = replace(wire, element=2.0)
    return Costs(ranks, {"exact": wire, "bf16": half}, contention or Contention(), 1024, 16384.0, 2)
