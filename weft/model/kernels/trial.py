"""Tries the kernels of a format on a shape: whether they keep row bits, and how fast they are.

A kernel is taken if a row's result has the same bits whatever rows are computed with it, tried with every number of
rows from 1 to 70; of those that are, the one that is fastest for a prompt and its answer, with few rows made up to as
many as it needs. What is multiplied is made so that sums cancel: their order then shows also where a result is rounded
to a few bits. Knows clocks; knows nothing of files or models.

Shapes: T rows, K inputs, W outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import Tensor

from weft.formats.packed import Codes
from weft.model.kernels.few_bits import GROUP
from weft.model.kernels.linear import Linear, Maker, NoKernel, Stored
from weft.model.kernels.rotation import turned

COUNTS = (*range(1, 18), 23, 32, 33, 48, 64, 65, 70)  # of rows, that are tried on all outputs
MOST, FEWEST, WORK = 70, 256, 10**10  # all up to the first, on so many outputs, or as many as that work allows
LEAST = 16  # rows to which fewer may be made up: more would cost more than another kernel
PROMPT, ANSWER = 256, 64  # rows by which kernels are compared: of one product, and of so many that have one
BESIDE = 32 << 20  # bytes that are read between two products of a row, as those of other weights are
SMALL, LARGE = 1 << 16, 1 << 20  # numbers of a weight: products too short to tell, and those read from memory
WARM, TRIALS, LONGEST = 3, 40, 0.02  # calls at least and at most, and the seconds within which more begin
SEEN, ROUGHLY = 64, 0.05  # rows and outputs of which products are compared, and their error, as a part of their size
HOPELESS = 10  # times the time of the fastest


class KernelChoice(msgspec.Struct, frozen=True):
    """For one shape. `kernel`: its name; `least`: rows to which fewer are made up; `exact`: False where no kernel keeps
    row bits. `seconds`: by name, of one row and of PROMPT rows."""

    kernel: str
    least: int = 1
    exact: bool = True
    seconds: dict[str, tuple[float, float]] = {}


def choose(makers: dict[str, Maker], format_: str, shape: tuple[int, ...]) -> KernelChoice:
    """Of the kernels of a format, for weights of a shape [W, K]; there is one packed weight at a time. Raises
    `NoKernel` if there is none at all."""
    weight, rows = _cancelling(format_, shape)
    there = [name for name, maker in makers.items() if _made(maker, weight) is not None]
    if not there:
        raise NoKernel(f"this torch has no kernel for weights in {format_}")
    seconds: dict[str, tuple[float, float]] = {}
    if shape[0] * shape[1] > SMALL:
        for name in there:
            seconds[name] = timed(makers[name](weight, None, 1), shape, list(seconds.values()))
        there.sort(key=lambda name: weighed(seconds[name]))
    best: KernelChoice | None = None
    for name in there:
        if best is not None and weighed(best.seconds[best.kernel]) <= weighed(seconds[name]):
            break  # the others can't be faster, however few rows they keep the bits of
        least = _least(makers[name](weight, None, 1), rows, COUNTS)
        if not least or not _least_of_all(makers[name], weight, least, rows):
            continue
        if not seconds:
            return KernelChoice(name, least)
        if least > 1:
            seconds[name] = timed(makers[name](weight, None, least), shape)
        if best is None or weighed(seconds[name]) < weighed(best.seconds[best.kernel]):
            best = KernelChoice(name, least, True, seconds)
    return best or KernelChoice(there[0], 1, False, seconds)


def weighed(seconds: tuple[float, float]) -> float:
    """Seconds of a prompt and its answer."""
    return ANSWER * seconds[0] + seconds[1]


def _made(maker: Maker, weight: Stored) -> Linear | None:
    """A kernel whose products are what they should be; one that isn't there, or is wrong here, is None."""
    part = weight.rows(slice(SEEN)).numbers() if isinstance(weight, Codes) else weight[:SEEN].float()
    rows = torch.randn(SEEN, part.shape[1], generator=torch.Generator().manual_seed(1))
    expected = [rows @ part.T]
    if isinstance(weight, Codes) and weight.offsets is None:  # some kernels of int8 turn rows themselves
        expected.append(turned(rows) @ part.T)
    try:
        linear = maker(weight, None, 1)
        found = linear(rows)[:, :SEEN]
    except (NoKernel, RuntimeError):  # torch raises the latter for a shape that an operator doesn't take
        return None
    return linear if any((found - each).norm() <= ROUGHLY * each.norm() for each in expected) else None


def _cancelling(format_: str, shape: tuple[int, ...]) -> tuple[Stored, Tensor]:
    """A weight, and rows whose large numbers cancel in products with it: what is left of a sum depends on the order in
    which it was taken."""
    outputs, inputs = shape
    chance, half = torch.Generator().manual_seed(0), shape[1] // 2
    places = torch.randperm(inputs, generator=chance)
    one, other = places[:half], places[half : 2 * half]
    rows = torch.randn(2 * MOST, inputs, generator=chance)
    rows[:, one] *= 100
    rows[3::11, one[: max(1, half // 4)]] *= 1000
    rows = rows.bfloat16().float()  # whatever a kernel rounds rows to
    rows[:, other] = -rows[:, one]
    rows[5] = 0
    if format_ in ("float32", "bfloat16"):
        weight = torch.randn(outputs, inputs, generator=chance).to(getattr(torch, format_))
        weight[:, other] = weight[:, one]
        return weight, rows
    whole = torch.randint(0, 16, (outputs, inputs), generator=chance, dtype=torch.uint8)
    whole[:, other] = whole[:, one]
    if format_ == "int8":
        return Codes(whole.to(torch.int8), torch.ones(outputs, 1)), rows
    groups = outputs, -(-inputs // GROUP)
    return Codes(whole, torch.ones(groups), torch.full(groups, -8.0)), rows


def timed(
    linear: Linear, shape: tuple[int, ...], others: Sequence[tuple[float, float]] = ()
) -> tuple[float, float]:  # fmt: skip
    """Seconds of one row, a large weight being read from memory, and of PROMPT rows. `others`: those of other kernels;
    one that is many times as slow is not tried again."""
    one, many = torch.randn(1, shape[1]), torch.randn(PROMPT, shape[1])
    beside = torch.ones(BESIDE // 8, dtype=torch.int64) if shape[0] * shape[1] > LARGE else None

    def seconds(rows: Tensor, others: Iterable[float]) -> float:
        found, until = list[float](), time.perf_counter() + LONGEST
        hopeless = HOPELESS * min(others, default=math.inf)
        while len(found) < WARM or (len(found) < TRIALS and time.perf_counter() < until):
            if len(found) > 1 and min(found) > hopeless:  # the first one may be what made a kernel
                break
            if beside is not None and rows is one:
                beside.sum()
            begin = time.perf_counter()
            linear(rows)
            found.append(time.perf_counter() - begin)
        return min(found)

    return seconds(one, (each[0] for each in others)), seconds(many, (each[1] for each in others))


def _least(linear: Linear, rows: Tensor, counts: Sequence[int]) -> int:
    """The number of rows from which on all that are tried have the bits of many; 0 if that is too many."""
    whole, least = linear(rows), 0
    for count in sorted(counts, reverse=True):
        parts = [part.clone() for part in torch.split(rows, count) if len(part) == count]
        if not torch.equal(torch.cat([linear(part) for part in parts]), whole[: count * len(parts)]):
            break
        least = count
    return least if least <= LEAST else 0


def _least_of_all(maker: Maker, weight: Stored, least: int, rows: Tensor) -> bool:
    """Whether all counts of rows do, with as many outputs as there is time for."""
    outputs = max(FEWEST, WORK // (4 * MOST * MOST * rows.shape[1]))
    part = weight.rows(slice(outputs)) if isinstance(weight, Codes) else weight[:outputs]
    return _least(maker(part, None, least), rows, range(1, MOST + 1)) == 1
