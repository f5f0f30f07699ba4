"""GGUF's blocks, of every type: the same numbers, to the bit, as the format's own package has."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants

from tests.formats.gguf_files import HALVES, WRITTEN, blocks, encoded
from weft.formats.gguf.blocks import PLAIN, UNPACK, unpacked
from weft.formats.gguf.types import TYPES
from weft.formats.packed import Packed

KINDS = {kind.name: kind for kind in TYPES.values()}
PACKED = [name for name in KINDS if name not in PLAIN]


def test_types_are_the_packages() -> None:
    for number, kind in TYPES.items():
        assert (Type(number).name, gguf.GGML_QUANT_SIZES[Type(number)]) == (kind.name, (kind.numbers, kind.bytes))
    unread = {kind.name for kind in Type} - set(KINDS)
    assert unread == {"Q8_1", "Q8_K", "Q1_0"}, "types that are new in the package, or were only ever used in between"
    assert set(PACKED) >= set(HALVES) and set(KINDS) >= set(WRITTEN)


@pytest.mark.parametrize("kind", PACKED)
def test_any_bytes_come_to_the_packages_numbers(kind: str) -> None:
    """Infinities and what is no number included."""
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (24, 4 * 256 // KINDS[kind].numbers * KINDS[kind].bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(raw, Type[kind]).astype(np.float32)
    found = unpacked(torch.from_numpy(raw), KINDS[kind]).numbers().numpy()
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)) or _same(found, expected)


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    """But for which of the numbers that are none."""
    same = found.view(np.uint32) == expected.view(np.uint32)
    return bool((same | (np.isnan(found) & np.isnan(expected))).all()) and bool(same.mean() > 0.5)


@pytest.mark.parametrize("kind", [name for name in WRITTEN if name not in PLAIN])
def test_what_the_package_writes(kind: str) -> None:
    values = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    raw = encoded(values, kind, 0)
    found = unpacked(torch.from_numpy(raw), KINDS[kind]).numbers()
    assert torch.equal(found, torch.from_numpy(quants.dequantize(raw, Type[kind])))
    worst = {"TQ1_0": 4.0, "TQ2_0": 4.0, "MXFP4": 1.1}.get(kind, 0.5)
    assert float((found - values).abs().max()) < worst, "they are what was written, about"


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "IQ3_S"])
@pytest.mark.parametrize("keep", [range(0, 1024), range(5, 700), range(1023, 1024), range(9, 9)])
def test_parts_are_cut_out(kind: str, keep: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of a few rows, into a tensor of another dtype, or one that is not contiguous."""
    monkeypatch.setattr("weft.formats.packed.PIECE", 3000)
    raw = torch.from_numpy(blocks(kind, (11, 1024), 3))
    part = Packed(11, keep, lambda rows: unpacked(raw[rows.start : rows.stop], KINDS[kind]))
    expected = unpacked(raw, KINDS[kind]).numbers()[:, keep.start : keep.stop]
    assert part.shape == expected.shape and torch.equal(part.numbers(torch.float32), expected)
    assert torch.equal(part.numbers(torch.bfloat16), expected.to(torch.bfloat16))
    room = torch.zeros(11, len(keep) + 3)
    part.into(room[:, 1 : 1 + len(keep)])
    assert torch.equal(room[:, 1 : 1 + len(keep)], expected) and not room[:, -2:].any()


@pytest.mark.parametrize("kind", list(UNPACK))
def test_codes_carry_what_a_kernel_for_few_bits_needs(kind: str) -> None:
    """Whole numbers of 8 bits with scales for equal groups, and offsets where the type has minima."""
    raw = torch.from_numpy(blocks(kind, (4, 512), 5))
    codes = unpacked(raw, KINDS[kind])
    assert codes.codes.dtype in (torch.int8, torch.uint8) and codes.codes.shape == (4, 512)
    assert codes.scales is not None and 512 % codes.scales.shape[1] == 0 and codes.scales.shape[0] == 4
    assert (codes.offsets is not None) == (kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))
    limit = {"Q8_0": 128, "IQ4_NL": 127, "IQ4_XS": 127}.get(kind, 32)
    assert int(codes.codes.to(torch.int16).abs().max()) <= limit
