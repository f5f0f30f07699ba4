"""Quantised checkpoints in Hugging Face's format, over a reader of plain tensors.

A projection's weight is several tensors there, whose names say which; anything else is read as it is. Groups and packed
numbers that a part cuts through are read whole, and what is beyond is left out when they are unpacked. Knows layouts;
knows nothing of files.

Shapes: R rows (outputs), C columns (inputs), G groups of columns. Sources: compressed-tensors 0.20; AutoGPTQ's
qlinear_cuda_old and AutoAWQ's packing_utils, whose layouts are those of everybody's files; DeepSeek-V3's
weight_block_size; transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from weft.errors import InputError
from weft.formats.checkpoint import Checkpoint
from weft.formats.gguf.blocks import MX, half_powers
from weft.formats.packed import Codes, Packed, Plain, TensorPart
from weft.formats.schemes import AWQ, COMPRESSED, FP8, GPTQ, MXFP4, Scheme

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where column c of eight is: AWQ packs 0, 2, 4, 6, 1, 3, 5, 7
WEIGHT = ".weight"
PARTS = (".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".qweight", ".qzeros",
         ".scales", "_blocks", "_scales")  # fmt: skip
SUFFIXES = {
    COMPRESSED: (".weight_packed", ".weight_scale"), GPTQ: (".qweight",), AWQ: (".qweight",),
    FP8: (".weight_scale_inv", ".weight_scale"), MXFP4: ("_blocks",),
}  # fmt: skip


@dataclass(frozen=True)
class _StoredMatrix:
    """How one matrix is stored. `shape`: as if it were not."""

    shape: tuple[int, int]
    read: Callable[[range, range], Packed]


class QuantisedCheckpoint:
    """See `Checkpoint`. `plain`: the tensors as they are in the files."""

    def __init__(self, plain: Checkpoint, scheme: Scheme) -> None:
        self.path, self._plain, self._scheme = plain.path, plain, scheme
        readers: dict[str, Callable[[str], _StoredMatrix]] = {
            COMPRESSED: self._compressed, GPTQ: self._gptq, AWQ: self._awq, FP8: self._fp8, MXFP4: self._mxfp4,
        }  # fmt: skip
        self._reader = readers[scheme.method]

    def _stem(self, name: str) -> str | None:
        """Of a tensor that is stored in several: what their names have in common."""
        stem = name.removesuffix(WEIGHT)
        return stem if any(stem + suffix in self._plain for suffix in SUFFIXES[self._scheme.method]) else None

    def __contains__(self, name: str) -> bool:
        return name in self._plain or self._stem(name) is not None

    def shape(self, name: str) -> list[int]:
        """See `Checkpoint`."""
        stem = self._stem(name)
        return self._plain.shape(name) if stem is None else list(self._reader(stem).shape)

    def stored(self, name: str) -> int:
        """See `Checkpoint`."""
        stem = self._stem(name)
        parts = [name] if stem is None else [stem + part for part in PARTS if stem + part in self._plain]
        return sum(map(self._plain.stored, parts))

    def kinds(self) -> dict[str, tuple[int, int]]:
        """See `Checkpoint`."""
        return self._plain.kinds()

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> TensorPart:
        """See `Checkpoint`."""
        stem = self._stem(name)
        if stem is None:
            return self._plain.read(name, rows, columns)
        layout = self._reader(stem)
        height, width = layout.shape
        rows = range(height) if rows is None else rows
        columns = range(width) if columns is None else columns
        return layout.read(rows, columns) if rows and columns else Plain(torch.empty(len(rows), len(columns)))

    def unexpected(self, known: Collection[str]) -> list[str]:
        """See `Checkpoint`."""
        return self._plain.unexpected(known)

    def forget(self) -> None:
        """See `Checkpoint`."""
        self._plain.forget()

    def close(self) -> None:
        """See `Checkpoint`."""
        self._plain.close()

    # Reading what is beside a matrix

    def _demand(self, name: str) -> None:
        if name not in self._plain:
            raise InputError(f"{self.path} has no {name}, without which its matrix says nothing; download it again")

    def _tensor(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        self._demand(name)
        part = self._plain.read(name, rows, columns)
        assert isinstance(part, Plain), "what a quantised matrix is made of are plain tensors"
        return part.values

    def _matrix(self, name: str, dtype: torch.dtype = torch.int32) -> tuple[int, int]:
        """The shape of a packed one."""
        self._demand(name)
        shape = self._plain.shape(name)
        if len(shape) != 2 or 0 in shape or self._tensor(name, range(0)).dtype != dtype:
            raise InputError(f"{self.path}: {name} is {shape}, not a matrix of {dtype}; download it again")
        return shape[0], shape[1]

    def _whole(self, name: str, shape: list[int]) -> Tensor:
        """All of a tensor of whole numbers."""
        found = self._tensor(name)
        if list(found.shape) != shape or found.dtype not in (torch.int32, torch.int64):
            told = f"{name} is {list(found.shape)} of {found.dtype}, not {shape} of whole numbers"
            raise InputError(f"{self.path}: {told}; download it again")
        return found

    def _disagree(self, *names: str) -> InputError:
        told = " and ".join(f"{name} {self._plain.shape(name)}" for name in names)
        return InputError(f"{self.path}: the shapes of {told} don't go together; download it again")

    def _group(self, width: int, groups: int, names: tuple[str, str]) -> int:
        """How many columns share a scale. Raises `InputError` if nothing fits."""
        if groups == 1:
            return width
        fitting = [size for size in self._scheme.sizes if groups and -(-width // size) == groups]
        if not fitting and groups and width % groups == 0 and not self._scheme.sizes:
            fitting = [width // groups]
        if not fitting:
            raise self._disagree(*names)
        return fitting[0]

    def _scales(self, name: str, rows: range, height: int) -> Tensor:
        """[R, G] of some rows, in float32; one for all is one for each."""
        shape = self._plain.shape(name)
        if shape in ([], [1], [1, 1]):
            return self._tensor(name).reshape(1, 1).to(torch.float32).expand(len(rows), 1)
        if len(shape) == 1 and shape == [height]:
            return self._tensor(name, rows)[:, None].to(torch.float32)
        return self._tensor(name, rows).to(torch.float32)

    # Layouts

    def _compressed(self, stem: str) -> _StoredMatrix:
        if f"{stem}.weight_packed" not in self._plain:
            return self._scaled(stem, f"{stem}.weight_scale", self._scheme.block)
        packed, scale, zero = (f"{stem}.weight_{part}" for part in ("packed", "scale", "zero_point"))
        height, words = self._matrix(packed)
        rows, width = self._whole(f"{stem}.weight_shape", [2]).tolist()
        bits = next((bits for bits in (4, 8) if -(-width * bits // 32) == words), 0)
        if not bits or rows != height:
            told = f"{packed} is {[height, words]} for a matrix of {[rows, width]}"
            raise InputError(f"{self.path}: {told}; download it again")
        groups = self._groups(scale, height)
        group = self._group(width, groups, (packed, scale))
        cut = partial(_Columns.of, width, group, 32 // bits, self._index(f"{stem}.weight_g_idx", width, group, groups))

        def read(rows: range, columns: range) -> Packed:
            part = cut(columns)
            data = self._tensor(packed, rows, part.words)
            zeros: Tensor | int = 1 << bits - 1
            if zero in self._plain:  # packed along the rows
                found = self._whole(zero, [-(-height * bits // 32), groups])
                numbers = _numbers(found.T, bits).T[rows.start : rows.stop]
                zeros = part.of_groups(numbers)
            scales = part.of_groups(self._scales(scale, rows, height))
            return part.packed(len(rows), lambda some: _numbers(data[some], bits), scales, zeros)

        return _StoredMatrix((height, width), read)

    def _groups(self, scale: str, height: int) -> int:
        """Of the columns. Raises `InputError` where there are not as many scales as rows."""
        self._demand(scale)
        shape = self._plain.shape(scale)
        if shape in ([], [1], [1, 1], [height]):
            return 1
        if len(shape) != 2 or shape[0] != height:
            raise InputError(f"{self.path}: {scale} is {shape}, for {height} rows; download it again")
        return shape[1]

    def _index(self, name: str, width: int, group: int, groups: int) -> Tensor | None:
        """The group of each column, where they don't just follow each other."""
        if name not in self._plain:
            return None
        index = self._whole(name, [width]).long()
        if int(index.min()) < -1 or int(index.max()) >= groups:
            raise InputError(f"{self.path}: {name} names no group for each of {width} columns; download it again")
        follow = torch.equal(index, torch.arange(width) // group) or bool((index == -1).all())  # -1: not used
        return None if follow else index

    def _scaled(self, stem: str, scale: str, block: tuple[int, int] | None) -> _StoredMatrix:
        """Of one byte a number, each row, group or block with its scale."""
        weight = f"{stem}.weight"
        self._demand(weight)
        shape, kind = self._plain.shape(weight), self._tensor(weight, range(0)).dtype
        if len(shape) != 2 or 0 in shape or kind not in (torch.int8, torch.float8_e4m3fn):
            raise InputError(f"{self.path}: {weight} is {shape} of {kind}, not a matrix of 8 bits; download it again")
        height, width = shape
        blocks = self._plain.shape(scale)
        tall, wide = block if block else (1, 0)
        if len(blocks) == 2 and blocks != [1, 1] and block:
            if blocks != [-(-height // tall), -(-width // wide)]:
                raise self._disagree(weight, scale)
        else:
            tall, wide = 1, self._group(width, self._groups(scale, height), (weight, scale))
        cut, zero = partial(_Columns.of, width, wide, 1, None), f"{stem}.weight_zero_point"
        if zero in self._plain and self._plain.shape(zero) != blocks:
            raise self._disagree(zero, scale)

        def read(rows: range, columns: range) -> Packed:
            part = cut(columns)
            data = self._tensor(weight, rows, part.words)
            if tall > 1:
                places = torch.arange(rows.start, rows.stop) // tall
                found = self._tensor(scale).to(torch.float32)[places]
            else:
                found = self._scales(scale, rows, height)
            zeros: Tensor | int = part.of_groups(self._scales(zero, rows, height)) if zero in self._plain else 0
            return part.packed(len(rows), lambda some: data[some], part.of_groups(found), zeros)

        return _StoredMatrix((height, width), read)

    def _fp8(self, stem: str) -> _StoredMatrix:
        scale = next(name for suffix in SUFFIXES[FP8] if (name := stem + suffix) in self._plain)
        return self._scaled(stem, scale, self._scheme.block)

    def _gptq(self, stem: str) -> _StoredMatrix:
        """Packed along the columns, and transposed: [C / numbers of a word, R]."""
        weight, scale, zero = f"{stem}.qweight", f"{stem}.scales", f"{stem}.qzeros"
        words, height = self._matrix(weight)
        bits = self._scheme.bits
        each = 32 // bits
        width, groups = words * each, self._transposed(scale, zero, height, each)
        group = self._group(width, groups, (weight, scale))
        cut = partial(_Columns.of, width, group, each, self._index(f"{stem}.g_idx", width, group, groups))

        def read(rows: range, columns: range) -> Packed:
            part = cut(columns)
            data = self._tensor(weight, part.words, rows).T.contiguous()
            zeros, scales = self._beside(scale, zero, rows, each)
            zeros = _numbers(zeros, bits).T + int(self._scheme.zero_less) & (1 << bits) - 1
            low = rows.start % each
            some_zeros = part.of_groups(zeros[low : low + len(rows)])
            return part.packed(len(rows), lambda r: _numbers(data[r], bits), part.of_groups(scales), some_zeros)

        return _StoredMatrix((height, width), read)

    def _awq(self, stem: str) -> _StoredMatrix:
        """Packed along the rows, and transposed: [C, R / 8]; of eight rows even ones come first."""
        weight, scale, zero = f"{stem}.qweight", f"{stem}.scales", f"{stem}.qzeros"
        width, words = self._matrix(weight)
        height = words * 8
        groups = self._transposed(scale, zero, height, 8)
        cut = partial(_Columns.of, width, self._group(width, groups, (weight, scale)), 1, None)

        def in_order(data: Tensor) -> Tensor:
            """[C, R / 8] -> [R, C]."""
            return torch.unflatten(_numbers(data, 4), 1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1).T

        def read(rows: range, columns: range) -> Packed:
            part = cut(columns)
            packed = range(rows.start // 8, -(-rows.stop // 8))
            low = rows.start - packed.start * 8
            data = in_order(self._tensor(weight, part.words, packed))[low : low + len(rows)].contiguous()
            zeros, scales = self._beside(scale, zero, rows, 8)
            some_zeros = part.of_groups(in_order(zeros)[low : low + len(rows)])
            return part.packed(len(rows), lambda r: data[r], part.of_groups(scales), some_zeros)

        return _StoredMatrix((height, width), read)

    def _transposed(self, scale: str, zero: str, height: int, each: int) -> int:
        """The number of groups, whose scales [G, R] and zeros [G, R / numbers of a word] are there."""
        groups, words = self._matrix(zero)
        if scale not in self._plain or self._plain.shape(scale) != [groups, height] or words != -(-height // each):
            raise self._disagree(*(name for name in (scale, zero) if name in self._plain))
        return groups

    def _beside(self, scale: str, zero: str, rows: range, each: int) -> tuple[Tensor, Tensor]:
        """Packed zeros [G, words], and scales [R, G] in float32."""
        packed = range(rows.start // each, -(-rows.stop // each))
        return self._tensor(zero, columns=packed), self._tensor(scale, columns=rows).T.to(torch.float32)

    def _mxfp4(self, stem: str) -> _StoredMatrix:
        """Blocks [..., G, 16] of 32 values, a power of two for each [..., G]; what stands before are rows."""
        blocks, scales = f"{stem}_blocks", f"{stem}_scales"
        self._demand(scales)
        shape = self._plain.shape(blocks)
        if len(shape) < 3 or shape[-1] != 16 or self._plain.shape(scales) != shape[:-1]:
            raise self._disagree(blocks, scales)
        height, groups = prod(shape[:-2]), shape[-2]

        def read(rows: range, columns: range) -> Packed:
            data = self._tensor(blocks).reshape(height, groups * 16)[rows.start : rows.stop]
            powers = half_powers(self._tensor(scales).reshape(height, groups)[rows.start : rows.stop])
            values = torch.tensor(MX, dtype=torch.int8)

            def unpack(some: range) -> Codes:
                here = slice(some.start, some.stop)
                return Codes(values[_numbers(data[here], 4).int()], powers[here])

            return Packed(len(rows), columns, unpack)

        return _StoredMatrix((height, groups * 32), read)


@dataclass(frozen=True)
class _Columns:
    """Some columns of a matrix whose columns are packed, `each` to a word, and grouped: which words to read, which of
    their numbers to take, the groups, and which columns of those are wanted."""

    words: range
    numbers: slice
    groups: slice
    repeat: Tensor | None  # of each number's group, where they aren't all of one size
    keep: range

    @classmethod
    def of(cls, width: int, group: int, each: int, index: Tensor | None, columns: range) -> _Columns:
        """Of `columns`. `index`: the group of each column of the matrix, where they don't follow each other."""
        start, stop = columns.start, columns.stop
        first, last = start // group, -(-stop // group)
        if index is None:  # whole groups
            start, stop = first * group, min(last * group, width)
        words = range(start // each, -(-stop // each))
        numbers = slice(start - words.start * each, stop - words.start * each)
        keep = range(columns.start - start, columns.stop - start)
        if index is not None:
            return cls(words, numbers, slice(None), index[start:stop], keep)
        repeat = None if (last - first) * group == stop - start else torch.arange(stop - start) // group
        return cls(words, numbers, slice(first, last), repeat, keep)

    def of_groups(self, values: Tensor) -> Tensor:
        """Those of these groups [R, G]; if they aren't all of one size, of each column."""
        found = values[:, self.groups] if values.shape[1] > 1 else values
        return found if self.repeat is None or found.shape[1] == 1 else found[:, self.repeat]

    def packed(self, rows: int, numbers: Callable[[slice], Tensor], scales: Tensor, zeros: Tensor | int) -> Packed:
        """(number - zero) * scale, of each row."""

        def unpack(some: range) -> Codes:
            here = slice(some.start, some.stop)
            codes = numbers(here)[:, self.numbers]
            scale = scales[here]
            if codes.is_floating_point():
                return Codes(codes, scale)
            codes, zero = codes.to(torch.int16), zeros if isinstance(zeros, int) else zeros[here].to(torch.int16)
            if isinstance(zero, int):
                return Codes(codes - zero, scale)
            return Codes((torch.unflatten(codes, 1, (zero.shape[1], -1)) - zero[..., None]).flatten(1), scale)

        return Packed(rows, self.keep, unpack)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """Words [R, W] as the numbers that are packed into them, the lowest bits first: uint8 [R, W * of a word]."""
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # a single column may have any stride
    if bits == 8:
        return data
    return torch.stack([data >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=2).flatten(1)
