"""A rank's decoder: every stage as four functions, and what of them concerns one batch.

    enter(hidden) -> input                  row-wise: the norm
    body(forward, input, rows) -> features  up to the input of the stage's last projection
    tail(features) -> partial               row-wise: that projection; the sum over ranks is the contribution
    absorb(hidden, total)                   row-wise: adds the contribution to the residual stream

The caller may run them for any rows, in any order that `program.check` allows. Stages hold weights and constants;
what belongs to one batch comes in as a `Forward`. Knows nothing of lanes, programs or other ranks.

Shapes: T rows of the call, M model width, H this rank's query heads, G its key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from weft.cache.slabs import Slabs
from weft.config import ModelConfig
from weft.model.attention import attend
from weft.model.families import Flags
from weft.model.kernels import Linear, rotate, swiglu, unit_rows
from weft.model.rope import Rope
from weft.model.shares import HeadRun, Share
from weft.model.weights import AttentionWeights, MlpWeights, Weights
from weft.program.batch import Batch, Rows


class Decoder:
    """A rank's weights with all that is needed to apply them: `stages` by the names that programs use."""

    def __init__(
        self, config: ModelConfig, flags: Flags, share: Share, weights: Weights, rope: Rope, exact_rows: bool = False
    ) -> None:
        self.width, self.embedding, self.rope = config.hidden, weights.embedding, rope
        epsilon, head_epsilon = (
            torch.tensor(math.sqrt(width * config.norm_epsilon), device=self.embedding.device)
            for width in (config.hidden, config.head_dim)
        )
        self.stages: dict[str, StageFunctions] = {"embed": Embed(weights.embedding)}
        for layer, window in enumerate(flags.windows):
            heads = len(share.heads), len(share.kv_heads), config.head_dim
            shape = AttentionShape(*heads, share.runs, window, head_epsilon)
            attention, mlp = weights.attention[layer], weights.mlp[layer]
            self.stages[f"L{layer}.attention"] = Attention(layer, attention, shape, epsilon, exact_rows)
            self.stages[f"L{layer}.mlp"] = Mlp(mlp, epsilon, exact_rows)
        self.stages["head"] = Head(weights.head, weights.scale, epsilon, exact_rows)

    def begin(self, batch: Batch, tokens: Sequence[int], slabs: Slabs) -> Forward:
        """One forward pass of `tokens` (one id a row of the batch) over the key/value memory in `slabs`."""
        ids = torch.tensor(tokens, device=self.embedding.device)
        spans = [self.rope.angles(s.start, s.end, s.prompt or s.end) for s in batch.segments]
        angles = spans[0] if len(spans) == 1 else torch.cat(spans)
        return Forward(batch, ids, angles[:, None], slabs)

    def empty_hidden(self, rows: int) -> Tensor:
        """An uninitialised residual stream [rows, M]."""
        return self.embedding.new_empty(rows, self.width)


class Piece(NamedTuple):
    """Tokens of one sequence: its slot, the first one's position, and whether it is the sequence's next token alone."""

    slot: int
    start: int
    decoding: bool


@dataclass(slots=True)
class Forward:
    """What the stages need to know of one batch."""

    batch: Batch
    tokens: Tensor  # [all rows]
    angles: Tensor  # [all rows, 1, D/2], complex
    slabs: Slabs
    _pieces: dict[Rows, list[tuple[slice, Piece]]] = field(default_factory=dict)

    def pieces(self, rows: Rows) -> list[tuple[slice, Piece]]:
        """The sequences that have tokens in `rows`, and where in `rows`."""
        if rows not in self._pieces:  # every layer asks for the same few rows
            self._pieces[rows] = [
                (
                    slice(part.start - rows.start, part.stop - rows.start),
                    Piece(segment.sequence, self._position(part), segment.length == 1),
                )
                for segment, part in self.batch.within(rows)
            ]
        return self._pieces[rows]

    def _position(self, part: Rows) -> int:
        pairs = zip(self.batch.segments, self.batch.spans, strict=True)
        return next(segment.start + part.start - span.start for segment, span in pairs if span.contains(part))


@dataclass(frozen=True, slots=True)
class Embed:
    """Token ids to the residual stream; whole on every rank, no collective."""

    embedding: Tensor

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """Nothing to prepare."""
        return hidden_TM

    def body(self, forward: Forward, _: Tensor, rows: Rows) -> Tensor:
        """The embedding of the rows' tokens [T, M]."""
        return self.embedding[forward.tokens[rows.start : rows.stop]]

    def tail(self, features_TM: Tensor) -> Tensor:
        """No projection."""
        return features_TM

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Starts the residual stream."""
        hidden_TM.copy_(total_TM)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention on this rank: H, G, D, which heads share keys, how far a token sees.

    `epsilon`: of the norm of each head, if there is one.
    """

    queries: int
    groups: int
    width: int
    runs: tuple[HeadRun, ...]
    window: int | None
    epsilon: Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention, for this rank's heads."""

    layer: int
    weights: AttentionWeights
    shape: AttentionShape
    epsilon: Tensor
    exact_rows: bool

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return unit_rows(hidden_TM, self.epsilon, self.exact_rows)

    def body(self, forward: Forward, input_TM: Tensor, rows: Rows) -> Tensor:
        """Projects, turns, stores keys and values, attends: [T, H * D]."""
        if not self.shape.runs:  # more ranks than heads
            return input_TM.new_empty(input_TM.shape[0], 0)
        heads_TnD = self._project(forward, input_TM, rows)
        pieces = forward.pieces(rows)
        if len(pieces) == 1:
            return self._attend(forward.slabs, heads_TnD, pieces[0][1])
        return torch.cat([self._attend(forward.slabs, heads_TnD[here], piece) for here, piece in pieces])

    def _project(self, forward: Forward, input_TM: Tensor, rows: Rows) -> Tensor:
        """This rank's query, key and value heads, in this order, turned by position: [T, H + 2G, D]."""
        shape, scales = self.shape, self.weights.qk_norm
        heads = self.weights.qkv(input_TM).view(input_TM.shape[0], -1, shape.width)
        turned = heads[:, : shape.queries + shape.groups]
        if scales is not None:
            turned.copy_(unit_rows(turned, shape.epsilon, self.exact_rows).mul_(scales))
        rotate(turned, forward.angles[rows.start : rows.stop], self.exact_rows)
        return heads

    def _attend(self, slabs: Slabs, heads_TnD: Tensor, piece: Piece) -> Tensor:
        """Tokens of one sequence: [T, H * D]."""
        shape, (slot, start, decoding) = self.shape, piece
        query_HTD = heads_TnD[:, : shape.queries].transpose(0, 1)
        slabs.write(slot, self.layer, start, heads_TnD[:, shape.queries :])
        keys, values = slabs.read(slot, self.layer)
        if len(shape.runs) == 1:
            return attend(query_HTD, keys, values, start, shape.window, self.exact_rows, decoding)
        pieces = [
            attend(query_HTD[run.query], keys[run.key], values[run.key], start, shape.window, self.exact_rows, decoding)
            for run in shape.runs
        ]
        return torch.cat(pieces, dim=1)

    def tail(self, features: Tensor) -> Tensor:
        """The output projection: this rank's partial [T, M]."""
        return self.weights.output(features)

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Adds the contribution."""
        hidden_TM.add_(total_TM)


@dataclass(frozen=True, slots=True)
class Mlp:
    """One layer's MLP, for this rank's part of its width."""

    weights: MlpWeights
    epsilon: Tensor
    exact_rows: bool

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return unit_rows(hidden_TM, self.epsilon, self.exact_rows)

    def body(self, _: Forward, input_TM: Tensor, __: Rows) -> Tensor:
        """The gated activation [T, width of this rank]."""
        return swiglu(self.weights.gate_up(input_TM), self.exact_rows)

    def tail(self, features: Tensor) -> Tensor:
        """The down projection: this rank's partial [T, M]."""
        return self.weights.down(features)

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Adds the contribution."""
        hidden_TM.add_(total_TM)


@dataclass(frozen=True, slots=True)
class Head:
    """The output head, for this rank's part of the vocabulary, on the wanted rows only."""

    projection: Linear
    scale: Tensor
    epsilon: Tensor
    exact_rows: bool

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """Nothing: the norm waits until `body` has picked the rows."""
        return hidden_TM

    def body(self, forward: Forward, input_TM: Tensor, rows: Rows) -> Tensor:
        """The last norm of those rows that are wanted: [wanted rows, M]."""
        picked = [row - rows.start for row in forward.batch.wanted_rows if rows.start <= row < rows.stop]
        chosen = input_TM if len(picked) == len(input_TM) else input_TM[picked]
        return unit_rows(chosen, self.epsilon, self.exact_rows).mul_(self.scale)

    def tail(self, features: Tensor) -> Tensor:
        """Logits of this rank's vocabulary [wanted rows, vocabulary of this rank], float32."""
        return self.projection(features).float()

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """The end: nothing follows."""


StageFunctions = Embed | Attention | Mlp | Head
