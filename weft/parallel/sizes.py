"""What sums come to in bytes, and which of their algorithms follows from that. Knows wires by name. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

ONE_SHOT_BYTES = 64 * 1024  # of the encoded partial; above, two-shot's fewer bytes pay for its second hop
LIKELIEST_BYTES = 16.0  # of a wanted row: what each rank tells the others of its logits, see execute/sampler.py
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}  # by what is computed in
GROUPS = {"int8": 64, "int4": 32}  # numbers that share a scale, on wires of few bits
GROUP_SET = 128  # neighbouring numbers, of which the largest is kept apart


class RowLayout(NamedTuple):
    """A row on a wire of few bits: see parallel/quantised.py. `padded`: its numbers, made up to whole `groups`;
    `apart`: how many are kept so; `codes`, `row`: bytes of the codes and of all."""

    padded: int
    groups: int
    apart: int
    codes: int
    row: int


@cache
def layout_of(wire: str, width: int) -> RowLayout:
    """Of a row of so many numbers. Raises KeyError for a wire that is not one of few bits."""
    groups = -(-width // GROUPS[wire])
    padded, apart = groups * GROUPS[wire], -(-width // GROUP_SET)
    codes = padded if wire == "int8" else padded // 2
    row = codes + 2 * groups + 3 * apart
    return RowLayout(padded, groups, apart, codes, row + row % 2)  # rows begin where numbers of two bytes can


def row_bytes(wire: str, dtype: str, width: int) -> int:
    """Of a row of so many numbers of a computation in `dtype`. Raises KeyError for a wire that is not known."""
    if wire in GROUPS:
        return layout_of(wire, width).row
    return width * {"exact": NUMBER_BYTES[dtype], "bf16": NUMBER_BYTES["bfloat16"]}[wire]


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
