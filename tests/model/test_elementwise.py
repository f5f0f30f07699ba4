"""Kernels: right, and with `exact_rows` the same bits for a row wherever it stands."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from weft.cache import slabs
from weft.cache.slabs import KeyValues, PlainKeyValues, Slabs
from weft.model import attention, elementwise
from weft.model.attention import GRANULE, Scoring, attend
from weft.model.elementwise import UnitRows, activation, capped, rotate
from weft.model.family import ACTIVATIONS

ROWS = 300
PARTS = [(0, 1), (7, 8), (3, 20), (64, 192), (100, 300), (17, 150)]


@pytest.fixture(params=["compiled", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """weft's own kernels, or what there is without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(elementwise, "library", lambda: None)
    elif elementwise.library() is None:
        pytest.skip("nothing is compiled on this machine")


@pytest.mark.parametrize("width", [704, 100, 37])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu2"])
def test_activations(by, threads, name: str, gated: bool, width: int) -> None:
    """They are transformers', and the exact forms have the same bits wherever a row stands."""
    rows = 3 * torch.randn(ROWS, 2 * width if gated else width)
    expected = ACT2FN[name](rows[:, :width]) * (rows[:, width:] if gated else 1)
    fast, exact = (activation(ACTIVATIONS[name], gated, exact) for exact in (False, True))
    whole = exact(rows)
    for got in (fast(rows), whole):
        assert torch.allclose(got, expected, atol=1e-5)
    for start, stop in PARTS:
        assert torch.equal(exact(rows[start:stop].clone()), whole[start:stop])
    far = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
    assert torch.allclose(activation(ACTIVATIONS[name], False, True)(far), ACT2FN[name](far), atol=1e-5)


@pytest.mark.parametrize("width", [131, 37])
def test_capped(threads, width: int) -> None:
    rows = 40 * torch.randn(ROWS, width)
    whole = capped(rows.clone(), 30.0)
    assert torch.allclose(whole, torch.tanh(rows / 30) * 30, atol=2e-5)
    for start, stop in PARTS:
        assert torch.equal(capped(rows[start:stop].clone(), 30.0), whole[start:stop])
    assert capped(torch.tensor([-1e9, 0.0, 1e9]), 30.0).tolist() == [-30.0, 0.0, 30.0]


@pytest.mark.parametrize(("heads", "width"), [(5, 64), (3, 6), (12, 32)])
def test_exact_rows_of_rotate(by, threads, heads: int, width: int) -> None:
    values = torch.randn(ROWS, heads, width)
    turns = torch.randn(ROWS, width // 2)
    angles = torch.polar(torch.ones_like(turns), turns)[:, None]
    whole = rotate(values.clone(), angles, True)
    assert torch.allclose(whole, rotate(values.clone(), angles, False), atol=1e-6)
    for start, stop in PARTS:
        assert torch.equal(rotate(values[start:stop].clone(), angles[start:stop], True), whole[start:stop])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [64, 100, 2048, 37])
def test_exact_rows_of_the_norm(by, threads, width: int, centred: bool) -> None:
    rows, weight = torch.randn(ROWS, width) + 0.5, torch.randn(width)
    if centred:
        expected = torch.nn.functional.layer_norm(rows, (width,), weight, None, 1e-5)
    else:
        expected = torch.nn.functional.rms_norm(rows, (width,), weight, 1e-5)
    unit = {exact: UnitRows(width, 1e-5, torch.device("cpu"), exact, centred) for exact in (True, False)}
    for each in unit.values():
        assert torch.allclose(each(rows) * weight * (1.0 if centred else width**0.5), expected, atol=1e-5)
    for start, stop in PARTS:
        assert torch.equal(unit[True](rows[start:stop]), unit[True](rows)[start:stop])


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """In plain words, [n, H * D]."""
    heads, tokens, width = query.shape
    each = heads // keys.shape[0]
    scores = query @ keys.repeat_interleave(each, 0).transpose(1, 2) / width**0.5
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    scores = scores.masked_fill((distance < 0) | (distance >= (scoring.window or tokens)), -torch.inf)
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks[:, :, None].expand(-1, tokens, 1)], dim=2)
    parts = scores.softmax(dim=2)[:, :, :tokens]
    return (parts @ values.repeat_interleave(each, 0)).transpose(0, 1).flatten(1)


SINKS = torch.tensor([[-2.0], [0.0], [1.0], [4.0]])
SCORINGS = [
    *(Scoring(window) for window in (None, 30, 200, 300, 1000)), Scoring(None, 2.0), Scoring(30, 2.0),
    Scoring(None, None, SINKS), Scoring(30, None, SINKS), Scoring(200, 2.0, SINKS),
]  # fmt: skip


def kept(keys: torch.Tensor, values: torch.Tensor, rounded: bool) -> tuple[KeyValues, torch.Tensor, torch.Tensor]:
    """In memory, and what is read from there."""
    groups, tokens, width = keys.shape
    memory = Slabs(1, 1, groups, tokens, width, rounded=rounded)
    memory.write(0, 0, 0, torch.cat([keys, values]).transpose(0, 1))
    return memory.read(0, 0), *memory.read(0, 0).span(0, tokens)


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda s: f"{s.window}-{s.softcap}-{s.sinks is not None}")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_attention_in_chunks_is_attention_in_one(
    scoring: Scoring, exact: bool, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "PIECE", 100)
    tokens, heads, groups, width = 500, 4, 2, 16
    query, *floats = (torch.randn(n, tokens, width) for n in (heads, groups, groups))
    memory, keys, values = kept(*floats, rounded)
    assert torch.allclose(keys, floats[0], atol=0.03) and torch.equal(keys, floats[0]) is not rounded
    expected = reference(query, keys, values, scoring)

    def attended(start: int, stop: int) -> torch.Tensor:
        return attend(query[:, start:stop], memory, start, scoring, exact)

    whole = attended(0, tokens)
    assert torch.allclose(whole, expected, atol=1e-5)
    cuts = [0, GRANULE, 2 * GRANULE, 3 * GRANULE, tokens] if exact else [0, 1, 90, 91, 400, tokens]
    together = torch.cat([attended(*pair) for pair in zip(cuts, cuts[1:], strict=False)])
    assert torch.equal(together, whole) if exact else torch.allclose(together, expected, atol=1e-5)
    halves = torch.cat([attended(0, 256), attended(256, tokens)])
    assert torch.equal(halves, whole) if exact else torch.allclose(halves, expected, atol=1e-5)
    for at in (0, 1, 29, 30, 31, 99, 100, 257, 499):  # token by token, as when decoding
        assert torch.allclose(attended(at, at + 1), expected[at : at + 1], atol=1e-5), at


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda s: f"{s.window}-{s.softcap}-{s.sinks is not None}")
def test_attention_without_the_fused_kernel(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = (torch.randn(n, 200, 16) for n in (4, 2, 2))
    memory = PlainKeyValues(keys, values)
    fused = [attend(query[:, a:b], memory, a, scoring, False) for a, b in ((0, 90), (90, 200))]
    monkeypatch.setattr(attention, "fused_attention_works", lambda: False)
    plain = [attend(query[:, a:b], memory, a, scoring, False) for a, b in ((0, 90), (90, 200))]
    assert torch.allclose(torch.cat(fused), torch.cat(plain), atol=1e-5)


def test_how_rows_lie_changes_nothing(by) -> None:
    """A slice of one row lies without gaps, one of several doesn't."""
    wide = torch.randn(9, 5, 96)
    unit, gate = UnitRows(64, 1e-5, torch.device("cpu"), True), activation("silu", True, True)
    for part, kernel in ((wide[:, :3, :64], unit), (wide.flatten(1)[:, :200], gate)):
        whole = kernel(part)
        assert torch.equal(kernel(part.contiguous()), whole)
        for row in range(9):
            assert torch.equal(kernel(part[row : row + 1]), whole[row : row + 1])


def test_far_from_zero_gates_are_shut(by) -> None:
    rows = torch.tensor([[-1e38, -3e38, -200.0, 100.0, 2.0, 2.0, 2.0, 2.0]])
    shut = activation("silu", True, False)(rows)
    assert torch.allclose(shut, torch.tensor([[0.0, 0.0, 0.0, 200.0]]), atol=1e-30)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none_where_it_is(by, bad: float) -> None:
    rows = torch.randn(4, 64)
    rows[2, 5] = bad
    unit, gate = UnitRows(64, 1e-5, torch.device("cpu"), False), activation("silu", True, False)
    for got in (unit(rows), gate(rows) if bad != -torch.inf else unit(rows)):
        assert not got[2].isfinite().all() or bad != torch.nan
        assert got[[0, 1, 3]].isfinite().all()


def test_exact_attention_wants_the_granule() -> None:
    query = torch.randn(1, 10, 8)
    with pytest.raises(ValueError, match="not a multiple of 128"):
        attend(query, PlainKeyValues(query, query), 5, Scoring(), True)


def test_a_single_row_that_a_cut_left_has_the_bits_of_the_whole() -> None:
    query, keys, values = torch.randn(4, 129, 16), torch.randn(2, 129, 16), torch.randn(2, 129, 16)
    whole = attend(query, PlainKeyValues(keys, values), 0, Scoring(), True)
    last = attend(query[:, 128:], PlainKeyValues(keys, values), 128, Scoring(), True, decoding=False)
    assert torch.equal(whole[128:], last)
