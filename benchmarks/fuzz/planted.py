"""Faults that the fuzz of files must find, each as readers of such files have had them."""

from __future__ import annotations

import struct
from math import prod
from typing import Any

from weft.formats import quantised
from weft.formats.gguf import header
from weft.formats.gguf.header import GgufTensor


def headers_have_no_end() -> None:
    """Each value is taken to be there."""

    def take(self: Any, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._view, self._at)
        self._at += struct.calcsize(form)
        return value

    header._HeaderReader._take = take  # type: ignore[method-assign]


def ends_are_not_looked_at() -> None:
    """Tensors are where the header says, also beyond the end of the file."""

    def tensors(self: Any, alignment: int) -> tuple[dict[str, GgufTensor], int]:
        told = [self._tensor() for _ in range(self._named)]
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
    "headers_have_no_end": "error: unpack_from requires a buffer",
    "ends_are_not_looked_at": "ValueError: mmap|ended with",
    "scales_are_not_counted": "RuntimeError|AssertionError|IndexError",
}
