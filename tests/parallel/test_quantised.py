"""Wires of few bits hold to what they say of bytes and errors, row by row, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.compiled.library import library
from weft.config import DTYPES
from weft.parallel import quantised
from weft.parallel.codec import codec_named
from weft.parallel.quantised import HUGE, TINY
from weft.parallel.sizes import GROUPS, layout_of, row_bytes

WIRES = tuple(GROUPS)
BYTES = {"int8": 0.27, "int4": 0.15}  # of float32's, at most


def there_and_back(wire: str, values: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(values, 7.0)
    codec_named(wire).decode(codec_named(wire).encode(values.clone()), out)
    return out


def largest_of_group(wire: str, values: torch.Tensor) -> torch.Tensor:
    """For each number the largest finite one of its group."""
    size, (rows, width) = GROUPS[wire], values.shape
    finite = values.abs().masked_fill(~values.isfinite(), 0.0)
    groups = torch.nn.functional.pad(finite, (0, -width % size)).view(rows, -1, size)
    return groups.amax(2, keepdim=True).expand_as(groups).reshape(rows, -1)[:, :width]


def demand_within(wire: str, values: torch.Tensor) -> None:
    values = values.float()
    out = there_and_back(wire, values)
    strange = ~values.isfinite()
    assert torch.equal(out[strange].nan_to_num(5.0, 3.0, 4.0), values[strange].nan_to_num(5.0, 3.0, 4.0))
    odd = torch.nn.functional.pad(strange, (0, -values.shape[1] % GROUPS[wire])).view(len(values), -1, GROUPS[wire])
    twice = 1.0 + 1.1 * odd.any(2, keepdim=True).expand_as(odd).reshape(len(values), -1)[:, : values.shape[1]]
    allowed = codec_named(wire).error * twice * largest_of_group(wire, values) + values.abs() / 256 + 8 * TINY
    off = (out - values).abs()
    assert bool((off <= allowed)[~strange].all()), (off - allowed)[~strange].max()


numbers = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(-0.99 * HUGE, 0.99 * HUGE, allow_nan=False, allow_infinity=False),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-38, -1e-30, 3.2e38, -3.2e38]),
)


@pytest.mark.parametrize("wire", WIRES)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_errors_are_within_what_is_said(wire: str, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 31, 32, 33, 64, 65, 100, 128, 129, 200, 576]))
    some = data.draw(st.lists(numbers, min_size=1, max_size=24))
    seed = data.draw(st.integers(0, 1000))
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(3, width, generator=random) * 10.0 ** data.draw(st.integers(-20, 20))
    for value in some:
        row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, width - 1))
        values[row, column] = value
    demand_within(wire, values)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-45, 3.2e38, -3.2e38, float("nan"), float("inf"), -float("inf")])
def test_rows_of_one_number(wire: str, value: float) -> None:
    demand_within(wire, torch.full((2, 200), value))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("width", [24, 64, 576, 1024, 2000])
def test_a_row_is_coded_by_itself(wire: str, width: int) -> None:
    """The same bytes alone, among others, beside a row a thousand times larger, and beside one that isn't finite."""
    codec, rows = codec_named(wire), torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    alone = torch.cat([codec.encode(row[None]) for row in rows])
    rows[3] *= 1000
    rows[5, 7] = float("nan")
    rows[6] = float("inf")
    together = codec.encode(rows)
    same = [0, 1, 2, 4, 7, 8]
    assert torch.equal(together[same], alone[same])
    strided = torch.cat([rows, rows], 1)[:, :width]  # also where rows don't lie one behind the other
    assert torch.equal(codec.encode(strided)[same], alone[same])


def odd_rows(kind: str, width: int) -> torch.Tensor:
    """Seven rows with what a coder may trip over."""
    chance = torch.Generator().manual_seed(width)
    rows, drawn = 3 * torch.randn(7, width, generator=chance), torch.rand(7, width, generator=chance)
    if kind in ("nan", "inf", "-inf"):
        return rows.masked_fill(drawn < 0.01, float(kind))
    if kind == "one nan a set":
        rows[:, ::128] = rows[:, ::128].view(torch.int32).bitwise_or(-0x3FFFFF).view(torch.float32)
        return rows
    sparse = rows * (drawn < 0.02)
    whole = rows.round()
    return {
        "plain": rows, "zeros": rows * 0, "ties": whole, "spikes": rows + 1000 * sparse, "tiny": rows * 1e-37,
        "huge": rows * 5e37, "beyond": rows * 1e38, "mostly zero": sparse, "signed zeros": whole * -0.0,
    }[kind]  # fmt: skip


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", [
    "plain", "zeros", "ties", "spikes", "tiny", "huge", "beyond", "mostly zero", "signed zeros", "nan", "inf", "-inf",
    "one nan a set",
])  # fmt: skip
def test_compiled_and_not_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch, wire: str, kind: str) -> None:
    """So that a rank without a compiler and one with it agree."""
    if library() is None:
        pytest.skip("nothing is compiled on this machine")
    codec = codec_named(wire)
    for width in (1, 31, 33, 64, 65, 96, 127, 128, 129, 200, 320, 576, 2048):
        rows = odd_rows(kind, width)
        each = []
        for found in (library(), None):
            monkeypatch.setattr(quantised, "library", lambda found=found: found)
            encoded, out, left = codec.encode(rows), torch.empty_like(rows), torch.ones_like(rows)
            codec.decode(encoded, out)
            codec.add(left, encoded, left)
            each.append((encoded, out.view(torch.int32), left.view(torch.int32)))
        assert all(torch.equal(one, other) for one, other in zip(*each, strict=True)), width


@pytest.mark.parametrize("wire", WIRES)
def test_a_row_beside_one_that_only_torch_codes(wire: str) -> None:
    rows = torch.randn(2, 256)
    rows[0, 5] = rows[1, 7] = rows[1, 90] = float("nan")
    codec = codec_named(wire)
    assert torch.equal(codec.encode(rows[:1].clone()), codec.encode(rows)[:1])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("place", [3, 200, 255])
def test_places_beyond_a_row_are_not_written_to(wire: str, place: int) -> None:
    """As bytes that another rank has spoilt may say."""
    codec, out = codec_named(wire), torch.zeros(2, 100)
    encoded = codec.encode(torch.ones(2, 100))
    layout = layout_of(wire, 100)
    encoded[1, layout.codes + 2 * layout.groups + 2 * layout.apart] = place
    beyond = torch.zeros(4, 100)
    if place >= 128:
        with pytest.raises(RuntimeError):
            codec.decode(encoded, beyond[:2])
        assert not beyond[2:].any()
    else:
        codec.decode(encoded, out)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("width", [576, 768, 896, 960, 1024, 1536, 2048, 2560, 4096, 5120, 8192])
def test_bytes_are_few(wire: str, width: int) -> None:
    encoded = codec_named(wire).encode(torch.randn(2, width))
    assert encoded.nbytes == 2 * row_bytes(wire, "float32", width) <= 2 * BYTES[wire] * 4 * width


@pytest.mark.parametrize("wire", WIRES)
def test_the_largest_do_not_coarsen_their_neighbours(wire: str) -> None:
    """One number of each 128 may be as large as it likes."""
    values = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
    plain = (there_and_back(wire, values) - values).abs()
    spiked = values.clone()
    spiked[:, 100::128] = 1e6
    off = (there_and_back(wire, spiked) - spiked).abs()
    off[:, 100::128] = 0.0
    assert off.max() <= 1.5 * plain.max()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_is_decoding_and_adding(wire: str, dtype: str) -> None:
    left, right = (torch.randn(5, 192, dtype=getattr(torch, dtype)) for _ in range(2))
    codec = codec_named(wire)
    encoded, decoded = codec.encode(right), torch.empty(5, 192)
    codec.decode(encoded, decoded)
    expected = left + decoded.to(left.dtype)
    codec.add(left, encoded, left)
    assert torch.equal(left, expected)
    settled = right.clone()
    codec.settle(settled)
    assert torch.equal(settled, decoded.to(right.dtype))
