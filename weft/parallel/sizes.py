"""What sums come to in bytes, and which of their algorithms follows from that. Knows wires by name. No torch."""

from __future__ import annotations

from collections.abc import Sequence

ONE_SHOT_BYTES = 64 * 1024  # of the encoded partial; above, two-shot's fewer bytes pay for its second hop
LIKELIEST_BYTES = 16.0  # of a wanted row: what each rank tells the others of its logits, see execute/sampler.py
NUMBER_BYTES = {"float32": 4.0, "bfloat16": 2.0}  # by what is computed in


def element_bytes(wire: str, dtype: str) -> float:
    """Bytes of one number of a computation in `dtype` on this wire. Raises KeyError for one that is not known."""
    return {"exact": NUMBER_BYTES[dtype], "bf16": NUMBER_BYTES["bfloat16"]}[wire]


def usual_algorithm(world: int, size: float) -> str:
    """Of a sum of so many encoded bytes, where costs are not known."""
    if world == 2:
        return "exchange"
    return "one-shot" if size <= ONE_SHOT_BYTES else "two-shot"


def algorithms(machines: Sequence[int]) -> tuple[str, ...]:
    """Those that may pay between ranks of these machines (a number for each rank)."""
    if len(machines) < 3:
        return ("exchange",)
    several = len(machines) > len(set(machines)) > 1
    return ("one-shot", "two-shot", "star", *(("hierarchical",) if several else ()))
