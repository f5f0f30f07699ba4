"""GGUF's blocks as codes with their scales, for the types that people use; the others through the `gguf` package.

Each function takes bytes [R, B, of a block] and gives codes [R, B * numbers of a block]. Operations are those of
ggml's reference in its order, so that results are the same bits. Knows bytes; knows nothing of files or names.

Why not the package for all: it gives numbers only, and takes two to three times as long (benchmarks/formats.py).
Source: ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from weft.formats.gguf.types import BlockType
from weft.formats.packed import Codes

PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl
MX = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice e2m1's


def _half(data: Tensor) -> Tensor:
    """Two bytes at the end as one float16 [R, B]; in float32."""
    return data.contiguous().view(torch.float16).to(torch.float32).squeeze(-1)


def _flat(codes: Tensor) -> Tensor:
    return codes.reshape(codes.shape[0], -1)


def _nibbles(data: Tensor, run: int) -> Tensor:
    """[R, B, bytes] -> [R, B, 2 * bytes]: of each `run` bytes first the low halves, then the high ones."""
    runs = torch.unflatten(data, 2, (-1, 1, run))
    return torch.cat((runs & 15, runs >> 4), dim=3).flatten(2)


def _bits(data: Tensor, width: int, run: int) -> Tensor:
    """The same for parts of `width` bits, the lowest first."""
    runs = torch.unflatten(data, 2, (-1, 1, run))
    parts = [runs >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
    return torch.cat(parts, dim=3).flatten(2)


def _fifth_bits(data: Tensor) -> Tensor:
    """4 bytes of a block, a bit for each of its numbers: [R, B, 32], 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (data[..., None] >> shifts & 1).flatten(2) << 4


def _q4_0(data: Tensor) -> Codes:
    return Codes(_flat(_nibbles(data[..., 2:], 16).view(torch.int8) - 8), _half(data[..., :2]))


def _q4_1(data: Tensor) -> Codes:
    return Codes(_flat(_nibbles(data[..., 4:], 16)), _half(data[..., :2]), _half(data[..., 2:4]))


def _q5_0(data: Tensor) -> Codes:
    codes = _nibbles(data[..., 6:], 16) | _fifth_bits(data[..., 2:6])
    return Codes(_flat(codes.view(torch.int8) - 16), _half(data[..., :2]))


def _q5_1(data: Tensor) -> Codes:
    codes = _nibbles(data[..., 8:], 16) | _fifth_bits(data[..., 4:8])
    return Codes(_flat(codes), _half(data[..., :2]), _half(data[..., 2:4]))


def _q8_0(data: Tensor) -> Codes:
    return Codes(_flat(data[..., 2:].contiguous().view(torch.int8)), _half(data[..., :2]))


def _q2_k(data: Tensor) -> Codes:
    scales = data[..., :16]
    d, least = _half(data[..., 80:82]), _half(data[..., 82:84])
    scale, offset = d[..., None] * (scales & 15).float(), least[..., None] * (scales >> 4).float()
    return Codes(_flat(_bits(data[..., 16:80], 2, 32)), _flat(scale), -_flat(offset))


def _q3_k(data: Tensor) -> Codes:
    high, low, packed = data[..., :32], data[..., 32:96], data[..., 96:108]
    scale = _nibbles(packed[..., :8], 8) | _bits(packed[..., 8:], 2, 4) << 4
    scale = _half(data[..., 108:110])[..., None] * (scale.view(torch.int8) - 32).float()
    missing = (_bits(high, 1, 32) ^ 1) << 2
    return Codes(_flat(_bits(low, 2, 32).view(torch.int8) - missing.view(torch.int8)), _flat(scale))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima in 12 bytes [R, B, 12], as float32."""
    scale, least, both = torch.split(packed, 4, dim=2)
    scales = torch.cat((scale & 63, both & 15 | scale >> 2 & 48), dim=2)
    minima = torch.cat((least & 63, both >> 4 | least >> 2 & 48), dim=2)
    return scales.float(), minima.float()


def _scaled(data: Tensor) -> tuple[Tensor, Tensor]:
    scales, minima = _six_bits(data[..., 4:16])
    return _flat(_half(data[..., :2])[..., None] * scales), -_flat(_half(data[..., 2:4])[..., None] * minima)


def _q4_k(data: Tensor) -> Codes:
    return Codes(_flat(_nibbles(data[..., 16:], 32)), *_scaled(data))


def _q5_k(data: Tensor) -> Codes:
    codes = _nibbles(data[..., 48:], 32) | _bits(data[..., 16:48], 1, 32) << 4
    return Codes(_flat(codes), *_scaled(data))


def _q6_k(data: Tensor) -> Codes:
    codes = _nibbles(data[..., :128], 64) | _bits(data[..., 128:192], 2, 32) << 4
    scales = _half(data[..., 208:210])[..., None] * data[..., 192:208].contiguous().view(torch.int8).float()
    return Codes(_flat(codes.view(torch.int8) - 32), _flat(scales))


def _looked_up(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    return _flat(torch.tensor(table, dtype=torch.int8)[codes.int()])


def _iq4_nl(data: Tensor) -> Codes:
    return Codes(_looked_up(_nibbles(data[..., 2:], 16), NONLINEAR), _half(data[..., :2]))


def _iq4_xs(data: Tensor) -> Codes:
    scales = _nibbles(data[..., 4:8, None].flatten(2), 1) | _bits(data[..., 2:4], 2, 1) << 4
    scales = _half(data[..., :2])[..., None] * (scales.view(torch.int8) - 32).float()
    return Codes(_looked_up(_nibbles(data[..., 8:], 16), NONLINEAR), _flat(scales))


def _mxfp4(data: Tensor) -> Codes:
    return Codes(_looked_up(_nibbles(data[..., 1:], 16), MX), half_powers(data[..., 0]))


def half_powers(exponents: Tensor) -> Tensor:
    """2^(e - 128) in float32, for bytes e: half of what e8m0 says, because MX's values are doubled."""
    e = exponents.to(torch.int32)
    return torch.where(e < 2, 0x00200000 << e, e - 1 << 23).view(torch.float32)


UNPACK: dict[str, Callable[[Tensor], Codes]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip


def unpacked(rows: Tensor, kind: BlockType) -> Codes:
    """The codes of rows of whole blocks, bytes [R, B * bytes of a block]."""
    if kind.name in UNPACK:
        return UNPACK[kind.name](torch.unflatten(rows, 1, (-1, kind.bytes)))
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # random bytes may come to no number, as in any type
        return Codes(torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[kind.name])))
