"""Which kernel runs for which weight: measured once on each machine, for each shape, and kept in the user's cache.

Knows formats, kernels and files; knows nothing of models.

Shapes: W outputs, K inputs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from platformdirs import user_cache_path
from torch import Tensor

from weft.compiled.library import library
from weft.config import available_cores, processor_name
from weft.formats.packed import Codes
from weft.locks import locked
from weft.model.kernels.compiled import Compiled4, Compiled8, CompiledFloats, CompiledPlain, FewBits
from weft.model.kernels.few_bits import INT8, Groups4
from weft.model.kernels.floats import MklProduct, OneDnnProduct, PlainProduct
from weft.model.kernels.formats import FEW_BITS, kept_shape, random_codes
from weft.model.kernels.linear import Gained, InBlocks, Linear, Maker, NoKernel, Stored
from weft.model.kernels.rotation import Turned, matrix
from weft.model.kernels.trial import LEAST, PROMPT, KernelChoice, choose, timed, weighed
from weft.model.shares import STORED_BITS

KERNELS: dict[str, dict[str, Maker]] = {
    "float32": {"compiled": CompiledFloats, "onednn": OneDnnProduct, "mkl": MklProduct, "plain": PlainProduct},
    "bfloat16": {"onednn": OneDnnProduct, "plain": PlainProduct},
    "int8": {"compiled": Compiled8, **INT8},
    "int4": {
        "compiled": Compiled4,
        "bfloat16 rows": Groups4,
        "float32 rows": partial(Groups4, dtype=torch.float32),
    },
}
SHARED: dict[str, dict[str, Maker]] = {  # with a weight that somebody else uses too: nothing is packed
    "float32": {
        "compiled": CompiledPlain,
        "onednn": partial(OneDnnProduct, packed=False),
        "plain": PlainProduct,
    },
    "bfloat16": {"onednn": partial(OneDnnProduct, packed=False), "plain": PlainProduct},
}
BLOCK = 64  # rows of one product where no kernel keeps row bits and they are asked for
MOST_OUTPUTS = 4096  # of a weight on which two formats are compared
FORMAT = 1  # counts what of the file was given another meaning


class Kernels:
    """Makes products, each by the kernel that suits its shape here. `exact_rows`: row bits are kept at any price."""

    def __init__(self, exact_rows: bool = False) -> None:
        self.exact_rows, self.known = exact_rows, recall(torch.get_num_threads())
        self._turn: Linear | None = None

    def linear(self, weight: Stored, bias_W: Tensor | None = None, shared: bool = False) -> Linear:
        """Of a weight in any format. `shared`: somebody else uses it too, so that it stays as it is. Raises `NoKernel`
        for a format that nothing here multiplies with."""
        return self._linear(weight, bias_W, shared, self.exact_rows)

    def gained(self, linear: Linear, scale_K: Tensor, bias_K: Tensor | None) -> Linear:
        """Of rows that are multiplied by a scale first, and to which a bias is added: a norm's."""
        if isinstance(linear, FewBits) and bias_K is None:
            return linear.gained(scale_K)
        return Gained(linear, scale_K, bias_K)

    def _linear(self, weight: Stored, bias_W: Tensor | None, shared: bool, exact_rows: bool) -> Linear:
        shape = tuple((weight.codes if isinstance(weight, Codes) else weight).shape)
        if 0 in shape:
            return PlainProduct(torch.empty(shape), bias_W)
        if isinstance(weight, Tensor) and weight.device.type != "cpu":
            return PlainProduct(weight, bias_W)
        format_ = format_of(weight)
        makers, choice = (SHARED if shared else KERNELS)[format_], self.choice(format_, shape, shared)
        maker = makers[choice.kernel]
        if choice.exact or not exact_rows:
            linear = maker(weight, bias_W, choice.least)
        elif isinstance(weight, Tensor):
            return PlainProduct(weight, bias_W, block=BLOCK)
        else:
            linear = InBlocks(maker(weight, bias_W, 1), BLOCK)
        if format_ != "int8" or maker is Compiled8:  # ours turns rows itself
            return linear
        self._turn = self._turn or self._linear(matrix(), None, False, True)
        return Turned(linear, self._turn, shape[1])

    def choice(self, format_: str, shape: tuple[int, ...], shared: bool = False) -> KernelChoice:
        """For weights in a format, of a shape [W, K]; measured now, where that isn't known yet."""
        makers = (SHARED if shared else KERNELS)[format_]
        key = f"{format_}{' shared' if shared else ''} {shape[0]}x{shape[1]}"
        if key not in self.known or self.known[key].kernel not in makers:
            self._measure(key, lambda: choose(makers, format_, shape), makers)
        return self.known[key]

    def _measure(self, key: str, measure: Callable[[], KernelChoice], allowed: Container[str]) -> None:
        """One rank of a machine at a time, and only if no other has meanwhile: all are to choose alike."""
        threads = torch.get_num_threads()
        with locked(path_of(threads).with_suffix(".lock")):
            self.known |= recall(threads)
            if key not in self.known or self.known[key].kernel not in allowed:
                self.known[key] = measure()
                keep(threads, self.known)

    def choose_for(self, format_: str, shape: tuple[int, int], shared: bool = False) -> None:
        """Of a weight that will be gathered: while there is none yet, there is most room to try."""
        if 0 not in shape:
            self.choice(format_, kept_shape(format_, shape), shared)

    def works(self, format_: str) -> bool:
        """Whether anything here multiplies with weights in a format."""
        try:
            self.choice(format_, kept_shape(format_, (64, 64)))
        except NoKernel:
            return False
        return True

    def faster(self, shape: tuple[int, int]) -> str:
        """int4 or int8, for a weight of this shape, all that belongs to a product being counted."""
        formats = [format_ for format_ in FEW_BITS if self.works(format_)]
        key = f"4 bits {shape[0]}x{shape[1]}"
        if key not in self.known:
            some = min(shape[0], MOST_OUTPUTS), shape[1]
            made = {
                format_: self.linear(random_codes(format_, some)) for format_ in formats
            }  # each measures for itself

            def measure() -> KernelChoice:
                seconds = {format_: timed(linear, some) for format_, linear in made.items()}
                return KernelChoice(min(seconds, key=lambda each: weighed(seconds[each])), seconds=seconds)

            self._measure(key, measure, formats)
        return self.known[key].kernel


def format_of(weight: Stored) -> str:
    """By what a weight is made of."""
    if isinstance(weight, Codes):
        return "int4" if weight.offsets is not None else "int8"
    return str(weight.dtype).removeprefix("torch.")


class _KernelChoices(msgspec.Struct):
    """A machine's file: of what it was measured, and the choices by shape."""

    machine: dict[str, str]
    choices: dict[str, KernelChoice]


def machine(threads: int) -> dict[str, str]:
    """All that choices depend on beside the shape."""
    found = library()
    return {
        "file": str(FORMAT), "processor": processor_name(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__), "threads": str(threads),
        "compiled": Path(found._name).stem if found else "",
    }  # fmt: skip


def path_of(threads: int) -> Path:
    """Where choices for so many threads are kept."""
    name = hashlib.sha256(msgspec.json.encode(machine(threads), order="sorted")).hexdigest()[:20]
    return user_cache_path("weft") / "kernels" / f"{name}.json"


def recall(threads: int) -> dict[str, KernelChoice]:
    """What was measured on this machine; nothing, where that can't be read."""
    try:
        kept = msgspec.json.decode(path_of(threads).read_bytes(), type=_KernelChoices)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    sound = all(1 <= choice.least <= LEAST for choice in kept.choices.values())
    return kept.choices if sound and kept.machine == machine(threads) else {}


def keep(threads: int, choices: dict[str, KernelChoice]) -> None:
    """Beside what others have measured meanwhile; where the file can't be written, later starts measure again."""
    path, merged = path_of(threads), {**recall(threads), **choices}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{time.monotonic_ns()}")
        fresh.write_bytes(msgspec.json.encode(_KernelChoices(machine(threads), merged)))
        fresh.replace(path)


class MeasuredKernel(NamedTuple):
    """One choice: with so many threads, for a format and a shape [W, K]."""

    threads: int
    format: str
    shape: tuple[int, int]
    choice: KernelChoice

    @property
    def speeds(self) -> tuple[float, float]:
        """Bytes of the weight a second with one row, and floating-point operations a second with many; 0 of what was
        too short to tell."""
        one, many = self.choice.seconds.get(self.choice.kernel, (math.inf, math.inf))
        numbers = self.shape[0] * self.shape[1]
        return numbers * STORED_BITS[self.format] / 8 / one, 2.0 * numbers * PROMPT / many


def all_kept() -> Iterator[MeasuredKernel]:
    """What is kept of this machine."""
    for threads in range(1, available_cores() + 1):
        for key, choice in recall(threads).items():
            format_, _, shape = key.partition(" ")
            if format_ in KERNELS:
                outputs, inputs = map(int, shape.removeprefix("shared ").split("x"))
                yield MeasuredKernel(threads, format_, (outputs, inputs), choice)
