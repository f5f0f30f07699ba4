"""Tensors by their names in Hugging Face's words, whatever files they are in; only what is asked for leaves the disk.

Knows which format is which; knows nothing of ranks or of what the tensors are for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

from weft.formats.fingerprint import Wanted
from weft.formats.gguf.architectures import Architecture
from weft.formats.gguf.files import is_gguf
from weft.formats.packed import TensorPart

Bring = Callable[[Wanted], None]  # sees that those bytes are here


class Checkpoint(Protocol):
    """A model's tensors. `path`: its directory, or its file, or the first of them."""

    path: Path

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, from a header alone. Raises `InputError` if there is none."""
        ...

    def stored(self, name: str) -> int:
        """Bytes that it takes in its files."""
        ...

    def kinds(self) -> dict[str, tuple[int, int]]:
        """How its tensors are stored: of each kind how many there are, and their bytes."""
        ...

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> TensorPart:
        """A tensor, or these rows or columns of it, as it is stored. Raises `InputError`."""
        ...

    def unexpected(self, known: Collection[str]) -> list[str]:
        """Names of tensors that would change what is computed, and are none of those that are known."""
        ...

    def forget(self) -> None:
        """Lets go of mapped files, so that their pages stop counting as this process's memory."""
        ...

    def close(self) -> None:
        """The same, for good."""
        ...


def open_checkpoint(
    path: Path, fields: dict[str, Any], bring: Bring | None = None, aliases: Sequence[tuple[str, str]] = (),
    architectures: Sequence[Architecture] = (),
) -> Checkpoint:  # fmt: skip
    """The tensors of a model, by its configuration's `fields`. `bring`: for files that are not here yet, or not whole.
    `aliases`: how names may begin, and how in files then; `architectures`: what the model may be called in GGUF.

    Raises `InputError` for files that can't be read.
    """
    from weft.formats.gguf.tensors import GgufCheckpoint
    from weft.formats.quantised import QuantisedCheckpoint
    from weft.formats.safetensor import SafetensorsCheckpoint
    from weft.formats.schemes import scheme_of

    if is_gguf(path):
        return GgufCheckpoint(path, architectures, bring)
    plain, scheme = SafetensorsCheckpoint(path, bring, aliases), scheme_of(fields)
    return QuantisedCheckpoint(plain, scheme) if scheme is not None else plain


def bits_of(checkpoint: Checkpoint, name: str) -> float:
    """Of a number of a tensor, its scales included; more than any format has if it isn't there."""
    return 8 * checkpoint.stored(name) / max(1, prod(checkpoint.shape(name))) if name in checkpoint else 64.0


def counted(tensors: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Kinds with how many there are and their bytes, from the kind and the bytes of each; most bytes first."""
    found: dict[str, tuple[int, int]] = {}
    for kind, size in tensors:
        count, bytes_ = found.get(kind, (0, 0))
        found[kind] = count + 1, bytes_ + size
    return dict(sorted(found.items(), key=lambda each: -each[1][1]))
