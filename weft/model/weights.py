"""One rank's weights, read from a checkpoint: its rows of the column-parallel matrices, its columns of the others.

    q, k, v, gate, up   by rows: each rank computes its own heads and its own part of the MLP
    o, down             by columns: each rank adds a partial of the whole width
    embedding           whole on every rank; output head by rows (vocabulary)
    norms               whole on every rank, folded into the projection that follows (see kernels.unit_rows)

Matrices are read, fused, converted and packed one at a time, so that loading peaks at the shard and one matrix.
Knows names and shares; knows nothing of how the weights are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.checkpoint import Checkpoint
from weft.model.families import Flags
from weft.model.kernels import Linear
from weft.model.shares import Share

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class AttentionWeights:
    """Fused query/key/value and output projections, and the scales of per-head norms [heads, D] if any."""

    qkv: Linear
    output: Linear
    qk_norm: Tensor | None


@dataclass(frozen=True)
class MlpWeights:
    """Fused gate and up projection, down projection."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """All that one rank holds. `scale` [hidden]: of the last norm, which a tied head can't take in."""

    embedding: Tensor
    attention: tuple[AttentionWeights, ...]
    mlp: tuple[MlpWeights, ...]
    scale: Tensor
    head: Linear


def load(
    checkpoint: Checkpoint, config: ModelConfig, flags: Flags, share: Share, *, device: str = "cpu",
    dtype: torch.dtype = torch.float32, exact_rows: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:  # fmt: skip
    """Reads a rank's shard. `progress(done, total)` is called in layers.

    Raises `InputError` for missing, unreadable or misshapen tensors.
    """
    reader = _Reader(checkpoint, config, flags, share, device, dtype, exact_rows)
    attention, mlp = [], []
    for layer in range(config.layers):
        attention.append(reader.attention(f"model.layers.{layer}."))
        mlp.append(reader.mlp(f"model.layers.{layer}."))
        checkpoint.forget()
        progress(layer + 1, config.layers)
    embedding = reader.whole(reader.embedding_name, config.vocabulary, config.hidden)
    head = reader.head(embedding)
    scale = reader.scale("model.norm.weight", config.hidden).to(dtype)
    checkpoint.forget()
    return Weights(embedding, tuple(attention), tuple(mlp), scale, head)


def _pairs(heads: Tensor) -> Tensor:
    """Reorders a head's width D from halves (x, x + D/2) to neighbours, as `kernels.rotate` wants it.

    Queries and keys are reordered alike, so their products stay what they were. [..., D, ...] with D second.
    """
    count, width = heads.shape[:2]
    halves = torch.unflatten(heads, 1, (2, width // 2))
    return halves.transpose(1, 2).reshape(count, width, *heads.shape[2:])


class _Reader:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, flags: Flags, share: Share, device: str,
        dtype: torch.dtype, exact_rows: bool,
    ) -> None:  # fmt: skip
        self.checkpoint, self.config, self.flags, self.share = checkpoint, config, flags, share
        self.device, self.dtype, self.exact_rows = device, dtype, exact_rows

    def whole(self, name: str, *shape: int) -> Tensor:
        self._demand(name, *shape)
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def scale(self, name: str, width: int) -> Tensor:
        """A norm's weight times sqrt(width), in float32: what is left of the norm after `kernels.unit_rows`."""
        self._demand(name, width)
        return self.checkpoint.read(name).to(self.device, torch.float32) * math.sqrt(width)

    def _folded(self, weight: Tensor, norm: str) -> Tensor:
        """What is left of a norm, taken into the projection behind it: in float32, because a product of two bfloat16
        would be rounded twice."""
        return weight.mul_(self.scale(norm, self.config.hidden)).to(self.dtype)

    def attention(self, prefix: str) -> AttentionWeights:
        config, flags, prefix_ = self.config, self.flags, prefix + "self_attn."
        parts = [self._heads(f"{prefix_}{p}_proj", heads, p != "v") for p, heads in self._qkv()]
        weight = self._folded(torch.cat([weight for weight, _ in parts]), prefix + "input_layernorm.weight")
        bias = self._joined([bias for _, bias in parts if bias is not None]) if flags.qkv_bias else None
        output = self._columns(f"{prefix_}o_proj", self._spread(self.share.heads), config.heads, flags.output_bias)
        return AttentionWeights(self._linear(weight, bias), output, self._qk_norm(prefix_))

    def _qkv(self) -> tuple[tuple[str, tuple[range, int]], ...]:
        query, kv = (self.share.heads, self.config.heads), (self.share.kv_heads, self.config.kv_heads)
        return ("q", query), ("k", kv), ("v", kv)

    def _spread(self, heads: range) -> range:
        return range(heads.start * self.config.head_dim, heads.stop * self.config.head_dim)

    def _heads(self, name: str, heads: tuple[range, int], paired: bool) -> tuple[Tensor, Tensor | None]:
        """Rows of a projection for these heads, and their bias; `paired` for what rope turns."""
        mine, total = heads
        width, hidden = self.config.head_dim, self.config.hidden
        self._demand(name + ".weight", total * width, hidden)
        weight = self._rows(name + ".weight", self._spread(mine)).view(len(mine), width, hidden)
        bias = None
        if self.flags.qkv_bias:
            self._demand(name + ".bias", total * width)
            bias = self._rows(name + ".bias", self._spread(mine)).view(len(mine), width)
        if paired:
            weight, bias = _pairs(weight), _pairs(bias) if bias is not None else None
        return weight.reshape(-1, hidden), bias.reshape(-1) if bias is not None else None

    def _qk_norm(self, prefix: str) -> Tensor | None:
        """One row a head, queries first: [heads + key heads, D]."""
        if not self.flags.qk_norm:
            return None
        width = self.config.head_dim
        query, key = (_pairs(self.scale(f"{prefix}{p}_norm.weight", width)[None]) for p in ("q", "k"))
        return self._joined([query.expand(len(self.share.heads), -1), key.expand(len(self.share.kv_heads), -1)])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self.dtype)

    def mlp(self, prefix: str) -> MlpWeights:
        config, flags, width = self.config, self.flags, self.share.width
        names = [f"{prefix}mlp.{part}_proj" for part in ("gate", "up")]
        for name in names:
            self._demand(name + ".weight", config.intermediate, config.hidden)
        weight = torch.cat([self._rows(name + ".weight", width) for name in names])
        weight = self._folded(weight, prefix + "post_attention_layernorm.weight")
        bias = self._joined([self._rows(name + ".bias", width) for name in names]) if flags.mlp_bias else None
        gate_up = self._linear(weight, bias)
        del weight  # before the next matrix is read: one at a time
        down = self._columns(f"{prefix}mlp.down_proj", width, None, flags.mlp_bias)
        return MlpWeights(gate_up, down)

    @property
    def embedding_name(self) -> str:
        """Of tied ones, either may be what was saved."""
        name = "model.embed_tokens.weight"
        swapped = self.config.tied_embeddings and HEAD in self.checkpoint and name not in self.checkpoint
        return HEAD if swapped else name

    def head(self, embedding: Tensor) -> Linear:
        """A view of the embedding, if they are tied and the checkpoint doesn't say otherwise: as in transformers, a
        head of its own that differs counts for more than config.json."""
        rows, config = self.share.vocabulary, self.config
        weight = embedding[rows.start : rows.stop]
        if not config.tied_embeddings or HEAD in self.checkpoint:
            self._demand(HEAD, config.vocabulary, config.hidden)
            own = self._rows(HEAD, rows).to(self.dtype)
            weight = weight if config.tied_embeddings and torch.equal(own, weight) else own
        return Linear(weight, exact_rows=self.exact_rows, packed=False)

    def _columns(self, name: str, columns: range, heads: int | None, biased: bool) -> Linear:
        inputs = self.config.intermediate if heads is None else heads * self.config.head_dim
        self._demand(name + ".weight", self.config.hidden, inputs)
        weight = self.checkpoint.read(name + ".weight", columns=columns).to(self.device, self.dtype)
        # The sum over ranks would count a bias once a rank: one rank adds it.
        bias = self.whole(name + ".bias", self.config.hidden) if biased and self.share.leads else None
        return self._linear(weight.contiguous(), bias)

    def _rows(self, name: str, rows: range) -> Tensor:
        """In float32."""
        return self.checkpoint.read(name, rows=rows).to(self.device, torch.float32)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(weight, bias, exact_rows=self.exact_rows)

    def _demand(self, name: str, *shape: int) -> None:
        there = self.checkpoint.shape(name)
        if there != list(shape):
            raise InputError(f"{name} has the shape {there}, but config.json calls for {list(shape)}")
