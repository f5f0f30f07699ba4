"""Attention of some new tokens of one sequence over its key/value memory.

A chunk over a past runs as two calls, past (every key, no mask) and present (causal), merged by their
log-sum-exp: no mask matrix, and no work on masked pairs. Knows keys and values of one layer; knows nothing of
weights, batches or ranks.

Shapes: H query heads, G key/value heads, n new tokens, S keys, D head width.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from weft.cache.places import PassagePlaces
from weft.cache.slabs import KeyValues
from weft.model.elementwise import capped
from weft.program.strategy import GRANULE

CAPPED_BLOCK = 128  # query positions to one call where scores are capped, and so all there at once
WINDOW_BLOCK = 256  # query positions to one masked call when attention is limited to a window


@cache
def fused_attention_works() -> bool:
    """True if torch's CPU attention kernel that returns the log-sum-exp is there: it is private to torch."""
    try:
        query = torch.randn(2, 3, 8)
        out, weight = _fused(query, query[:1], query[:1], True, None)
        expected, expected_weight = _plain(query, query[:1], query[:1], True, None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(out, expected, atol=1e-5) and torch.allclose(weight, expected_weight, atol=1e-5)


class Scoring(NamedTuple):
    """What becomes of scores. `window`: positions that a token sees, itself included. `softcap`: scores s become
    softcap * tanh(s / softcap). `sinks` [H, 1]: a score a head that counts in the denominator alone."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """A kernel's own softmax does."""
        return self.softcap is None and self.sinks is None


def attend(
    query_HnD: Tensor, kept: KeyValues, start: int, scoring: Scoring, exact_rows: bool, decoding: bool = True
) -> Tensor:  # fmt: skip
    """Attention of the tokens at positions start, start + 1, … over keys 0 … start + n: [n, H * D].

    The keys and values of the new tokens are already in memory. `exact_rows`: bits of a row do not depend on where the
    sequence was cut, as long as `start` is a multiple of GRANULE; raises ValueError if it isn't and n > 1. `decoding`:
    a single token is the next one of its sequence, not what a cut left of a longer piece, which must have the bits that
    it has in that piece.
    """
    count, end, window = query_HnD.shape[1], start + query_HnD.shape[1], scoring.window
    if count == 1 and (decoding or not exact_rows):
        return _one_token(query_HnD, kept, end, scoring)
    if exact_rows and start % GRANULE:
        raise ValueError(f"a chunk starts at position {start}, which is not a multiple of {GRANULE}")
    block = GRANULE if exact_rows else count
    if window is not None and end > window:
        block = min(block, WINDOW_BLOCK)
    if scoring.softcap is not None:
        block = min(block, CAPPED_BLOCK)
    pieces = [_block(query_HnD[:, at : at + block], kept, start + at, scoring) for at in range(0, count, block)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def attend_each(heads_TnD: Tensor, places: PassagePlaces, layer: int, scoring: Scoring) -> Tensor:
    """Attention of single tokens of some sequences, all at once, by weft's own kernels: [T, H * D]."""
    sinks_H = None if scoring.sinks is None else scoring.sinks.flatten().contiguous()
    return places.attend(layer, heads_TnD, scoring.window, scoring.softcap, sinks_H)


def _one_token(query_H1D: Tensor, kept: KeyValues, end: int, scoring: Scoring) -> Tensor:
    """One new token: the heads of a group are rows of one query block, which saves reading the keys again."""
    limited = scoring.window is not None and end > scoring.window
    spans = [kept.span(end - scoring.window, end)] if limited and scoring.window else kept.pieces(end)
    merged: tuple[Tensor, Tensor] | None = None
    for keys, values in spans:
        query = query_H1D.view(keys.shape[0], -1, keys.shape[2])
        if scoring.plain and keys.shape[1] == (scoring.window if limited else end):  # all there is
            out = functional.scaled_dot_product_attention(query[None], keys[None], values[None])
            return out.reshape(1, -1)
        merged = _merged(merged, _call(query, keys, values, causal=False, softcap=scoring.softcap))
    assert merged is not None, "a token sees itself"
    out, weight = merged[0].reshape(query_H1D.shape), merged[1].reshape(-1, 1)
    return _rows(_sunk(out, weight, scoring.sinks))


def _merged(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, by the log-sum-exp of each."""
    if one is None:
        return other
    (out, weight), (more, more_weight) = one, other
    share = torch.sigmoid(more_weight - weight).to(out.dtype)[..., None]
    return torch.lerp(out, more, share), torch.logaddexp(weight, more_weight)


def _block(query_HnD: Tensor, kept: KeyValues, start: int, scoring: Scoring) -> Tensor:
    """[n, H * D] of consecutive positions from `start`."""
    count, end = query_HnD.shape[1], start + query_HnD.shape[1]
    # By the block's own end: its bits don't depend on what comes after it.
    if scoring.window is not None and end > scoring.window:
        first = max(0, start - scoring.window + 1)
        mask, span = _mask(count, end - first, scoring.window).to(query_HnD), kept.span(first, end)
        merged = _call(query_HnD, *span, causal=False, mask=mask, softcap=scoring.softcap)
        return _rows(_sunk(*merged, scoring.sinks))
    capped_mask = None if scoring.softcap is None else _mask(count, count, None).to(query_HnD)
    present = kept.span(start, end)
    merged = _call(query_HnD, *present, causal=capped_mask is None, mask=capped_mask, softcap=scoring.softcap)
    if start > 0:
        for keys, values in kept.pieces(start):
            merged = _merged(merged, _call(query_HnD, keys, values, causal=False, softcap=scoring.softcap))
    return _rows(_sunk(*merged, scoring.sinks))


def _sunk(out_HnD: Tensor, weight_Hn: Tensor, sinks_H1: Tensor | None) -> Tensor:
    """With the sinks in the denominators, from the log-sum-exp of the other scores."""
    if sinks_H1 is None:
        return out_HnD
    return out_HnD * torch.sigmoid(weight_Hn - sinks_H1).to(out_HnD.dtype)[..., None]


def _rows(out_HnD: Tensor) -> Tensor:
    return out_HnD.transpose(0, 1).flatten(1)


@lru_cache(maxsize=4)
def _window_mask(window: int) -> Tensor:
    """[n, S] of the last n = WINDOW_BLOCK positions and all S that one of them sees: 0 where a token sees a key, minus
    infinity elsewhere. Those of fewer tokens, or of fewer keys, are a part of it."""
    keys = window + WINDOW_BLOCK - 1
    query, key = torch.arange(window - 1, keys)[:, None], torch.arange(keys)[None, :]
    seen = (key <= query) & (key > query - window)
    return torch.zeros(WINDOW_BLOCK, keys).masked_fill_(~seen, -math.inf)


@lru_cache(maxsize=1)
def _causal_mask() -> Tensor:
    """The same of CAPPED_BLOCK positions with themselves, where nothing limits how far they see."""
    return torch.full((CAPPED_BLOCK, CAPPED_BLOCK), -math.inf).triu_(1)


def _mask(count: int, keys: int, window: int | None) -> Tensor:
    """[n, S] for the last n of S positions that begin a sequence or are all that the first of them sees; or of the n
    with themselves, where they see all before them."""
    if window is None:
        return _causal_mask()[:count, :count]
    first = window - 1 - (keys - count)  # a sequence's beginning has fewer positions before it
    return _window_mask(window)[:count, first : first + keys].contiguous()


def _call(
    query_HnD: Tensor,
    keys_GSD: Tensor,
    values_GSD: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [H, n, D] and log-sum-exp of the scores [H, n]. `causal` wants n == S."""
    if softcap is not None:
        return _capped(query_HnD, keys_GSD, values_GSD, mask, softcap)
    fused = query_HnD.device.type == "cpu" and fused_attention_works()
    return (_fused if fused else _plain)(query_HnD, keys_GSD, values_GSD, causal, mask)


def _capped(
    query_HnD: Tensor, keys_GSD: Tensor, values_GSD: Tensor, mask: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """No fused kernel of torch's caps scores. `mask`: of all keys, or of the last ones."""
    heads, count, width = query_HnD.shape
    groups = keys_GSD.shape[0]
    query = (query_HnD / math.sqrt(width)).reshape(groups, -1, width)  # a group's heads are rows of one product
    scores = capped((query @ keys_GSD.transpose(1, 2)).float(), softcap).view(heads, count, -1)
    if mask is not None:
        scores[..., scores.shape[2] - mask.shape[1] :].add_(mask)
    weight = torch.logsumexp(scores, dim=2)
    parts = scores.sub_(weight[..., None]).exp_().to(values_GSD.dtype)
    return (parts.view(groups, -1, parts.shape[2]) @ values_GSD).view(heads, count, width), weight


def _fused(
    query_HnD: Tensor, keys_GSD: Tensor, values_GSD: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query_HnD.unsqueeze(0), keys_GSD.unsqueeze(0), values_GSD.unsqueeze(0), 0.0, causal, attn_mask=mask
    )
    return out.squeeze(0), weight.squeeze(0)


def _plain(
    query_HnD: Tensor, keys_GSD: Tensor, values_GSD: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, where no fused kernel returns the log-sum-exp."""
    group = query_HnD.shape[0] // keys_GSD.shape[0]
    keys, values = (tensor.repeat_interleave(group, dim=0) for tensor in (keys_GSD, values_GSD))
    scores = (query_HnD @ keys.transpose(1, 2)).float() / math.sqrt(query_HnD.shape[2])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores + mask
    weight = torch.logsumexp(scores, dim=2)
    return (scores - weight[..., None]).exp().to(values.dtype) @ values, weight
