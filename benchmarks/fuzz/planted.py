"""Faults that the fuzz of files must find, each as readers of such files have had them."""

from __future__ import annotations

from math import prod
from typing import Any

from weft.formats import quantised
from weft.formats.gguf import header
from weft.formats.gguf.header import GgufTensor


def lengths_are_believed() -> None:
    """A text's length is taken from the file as it is."""

    def text(self: Any, longest: int) -> str:
        length = self._take("<Q")
        data = bytes(self._view[self._at : self._at + length])
        self._at += length
        return data.decode(errors="replace")

    header._HeaderReader._text = text  # type: ignore[method-assign]


def ends_are_not_looked_at() -> None:
    """Tensors are where the header says, also beyond the end of the file."""

    def tensors(self: Any, count: int, alignment: int) -> tuple[dict[str, GgufTensor], int]:
        told = [self._tensor() for _ in range(count)]
        size = -(-self._at // alignment) * alignment
        return {
            name: GgufTensor(name, shape, kind, size + offset, prod(shape) // kind.numbers * kind.bytes)
            for name, shape, kind, offset in told
        }, size

    header._HeaderReader.tensors = tensors  # type: ignore[method-assign]


def scales_are_not_counted() -> None:
    """As many as there are will do."""

    def transposed(self: Any, scale: str, zero: str, height: int, each: int) -> int:
        groups: int = self._matrix(zero)[0]
        return groups

    quantised.QuantisedCheckpoint._transposed = transposed  # type: ignore[method-assign]


# What is said of each when it is found.
PLANTED = {
    "lengths_are_believed": "an error of several lines|MemoryError|OverflowError|is not what the package reads",
    "ends_are_not_looked_at": "ValueError: mmap|ended with",
    "scales_are_not_counted": "RuntimeError|AssertionError|IndexError",
}
