"""Kernels: right, and with `exact_rows` the same bits for a row wherever it stands."""

from __future__ import annotations

import pytest
import torch

from weft.model import attention, kernels
from weft.model.attention import GRANULE, attend
from weft.model.kernels import Linear, rotate, swiglu, unit_rows

ROWS = 300
PARTS = [(0, 1), (7, 8), (3, 20), (64, 192), (100, 300), (17, 150)]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("width", "inputs"), [(96, 64), (37, 100), (704, 256), (1000, 999)])
def test_exact_rows_of_products(threads, packed: bool, width: int, inputs: int) -> None:
    weight, bias, rows = torch.randn(width, inputs), torch.randn(width), torch.randn(ROWS, inputs)
    linear = Linear(weight, bias, exact_rows=True, packed=packed)
    whole = linear(rows)
    assert torch.allclose(whole, rows @ weight.T + bias, atol=1e-3)
    for start, stop in PARTS:
        assert torch.equal(linear(rows[start:stop].contiguous()), whole[start:stop])


def test_products_without_rows_or_heads() -> None:
    assert Linear(torch.randn(5, 4))(torch.randn(0, 4)).shape == (0, 5)
    assert torch.equal(Linear(torch.randn(5, 0))(torch.randn(3, 0)), torch.zeros(3, 5))


@pytest.mark.parametrize("width", [704, 100, 37])
def test_exact_rows_of_swiglu(threads, width: int) -> None:
    both = torch.randn(ROWS, 2 * width)
    whole = swiglu(both, True)
    assert torch.allclose(whole, torch.nn.functional.silu(both[:, :width]) * both[:, width:], atol=1e-6)
    for start, stop in PARTS:
        assert torch.equal(swiglu(both[start:stop], True), whole[start:stop])


@pytest.mark.parametrize(("heads", "width"), [(5, 64), (3, 6), (12, 32)])
def test_exact_rows_of_rotate(threads, heads: int, width: int) -> None:
    values = torch.randn(ROWS, heads, width)
    turns = torch.randn(ROWS, width // 2)
    angles = torch.polar(torch.ones_like(turns), turns)[:, None]
    whole = rotate(values.clone(), angles, True)
    assert torch.allclose(whole, rotate(values.clone(), angles, False), atol=1e-6)
    for start, stop in PARTS:
        assert torch.equal(rotate(values[start:stop].clone(), angles[start:stop], True), whole[start:stop])


@pytest.mark.parametrize("width", [64, 100, 2048])
def test_exact_rows_of_the_norm(threads, width: int) -> None:
    rows, weight = torch.randn(ROWS, width), torch.randn(width)
    epsilon = torch.tensor(1e-5 * width).sqrt()
    whole = unit_rows(rows, epsilon, True)
    expected = torch.nn.functional.rms_norm(rows, (width,), weight, 1e-5)
    for exact in (True, False):
        assert torch.allclose(unit_rows(rows, epsilon, exact) * weight * width**0.5, expected, atol=1e-5)
    for start, stop in PARTS:
        assert torch.equal(unit_rows(rows[start:stop], epsilon, True), whole[start:stop])


def test_blocks_keep_row_bits_on_the_block(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packed weights are missing: products of a fixed size, if cuts fall on it."""
    monkeypatch.setattr(kernels, "packed_weights_work", lambda: False)
    linear, rows = Linear(torch.randn(100, 64), exact_rows=True), torch.randn(ROWS, 64)
    whole = linear(rows)
    for start, stop in ((0, 64), (64, 192), (128, 300)):
        assert torch.equal(linear(rows[start:stop]), whole[start:stop])


def test_fallback_without_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_pack", lambda weight: (_ for _ in ()).throw(AttributeError("no such operator")))
    kernels.packed_weights_work.cache_clear()
    try:
        assert not kernels.packed_weights_work()
        linear = Linear(torch.eye(4))
        assert not linear.packed and torch.equal(linear(torch.ones(2, 4)), torch.ones(2, 4))
    finally:
        kernels.packed_weights_work.cache_clear()


@pytest.mark.parametrize("window", [None, 30, 200, 1000])
@pytest.mark.parametrize("exact", [False, True])
def test_attention_in_chunks_is_attention_in_one(window: int | None, exact: bool) -> None:
    tokens, heads, groups, width = 500, 4, 2, 16
    query, keys, values = (torch.randn(n, tokens, width) for n in (heads, groups, groups))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (distance >= 0) & (distance < (window or tokens))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0), attn_mask=seen
    )
    expected = expected.transpose(0, 1).flatten(1)
    whole = attend(query, keys, values, 0, window, exact)
    assert torch.allclose(whole, expected, atol=1e-5)
    cuts = [0, GRANULE, 3 * GRANULE, tokens] if exact else [0, 1, 90, 91, 400, tokens]
    pieces = [attend(query[:, a:b], keys, values, a, window, exact) for a, b in zip(cuts, cuts[1:], strict=False)]
    together = torch.cat(pieces)
    assert torch.equal(together, whole) if exact else torch.allclose(together, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 30])
def test_attention_without_the_fused_kernel(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = (torch.randn(n, 200, 16) for n in (4, 2, 2))
    fused = [attend(query[:, a:b], keys, values, a, window, False) for a, b in ((0, 90), (90, 200))]
    monkeypatch.setattr(attention, "fused_attention_works", lambda: False)
    plain = [attend(query[:, a:b], keys, values, a, window, False) for a, b in ((0, 90), (90, 200))]
    assert torch.allclose(torch.cat(fused), torch.cat(plain), atol=1e-5)


def test_exact_attention_wants_the_granule() -> None:
    query = torch.randn(1, 10, 8)
    with pytest.raises(ValueError, match="not a multiple of 128"):
        attend(query, query, query, 5, None, True)


def test_a_single_row_that_a_cut_left_has_the_bits_of_the_whole() -> None:
    query, keys, values = torch.randn(4, 129, 16), torch.randn(2, 129, 16), torch.randn(2, 129, 16)
    whole = attend(query, keys, values, 0, None, True)
    last = attend(query[:, 128:], keys, values, 128, None, True, decoding=False)
    assert torch.equal(whole[128:], last)
