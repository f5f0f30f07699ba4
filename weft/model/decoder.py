"""A rank's decoder: every stage as four functions, and what of them concerns one batch.

    enter(stage, hidden) -> input              row-wise: the norm
    body(stage, input, rows) -> features       up to the input of the stage's last projection
    tail(stage, features) -> partial           row-wise: that projection; the sum over ranks is the contribution
    absorb(stage, hidden, total) -> hidden     row-wise: adds the contribution to the residual stream

The caller may run them for any rows, in any order that `program.check` allows. Knows nothing of lanes, programs
or other ranks.

Shapes: T rows of the call, M model width, H this rank's query heads, G its key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.cache.slabs import Slabs
from weft.config import ModelConfig
from weft.model.attention import attend
from weft.model.families import Flags
from weft.model.kernels import rms_norm, rotate, swiglu
from weft.model.rope import Rope
from weft.model.shares import Share
from weft.model.weights import AttentionWeights, MlpWeights, Weights
from weft.program.batch import Batch, Rows


@dataclass(frozen=True)
class Decoder:
    """A rank's weights with all that is needed to apply them. The same for every batch."""

    config: ModelConfig
    flags: Flags
    share: Share
    weights: Weights
    rope: Rope
    exact_rows: bool = False

    def begin(self, batch: Batch, tokens: Sequence[int], slabs: Slabs) -> Forward:
        """One forward pass of `tokens` (one id a row of the batch) over the key/value memory in `slabs`."""
        device = self.weights.embedding.device
        ids = torch.tensor(tokens, device=device)
        spans = [self.rope.angles(s.start, s.end, s.end) for s in batch.segments]
        angles = spans[0] if len(spans) == 1 else torch.cat(spans)
        return Forward(self, batch, ids, angles[:, None], slabs)


@dataclass(frozen=True)
class Forward:
    """The four functions, for one batch."""

    decoder: Decoder
    batch: Batch
    tokens: Tensor  # [all rows]
    angles: Tensor  # [all rows, 1, D/2], complex
    slabs: Slabs

    def stage(self, name: str) -> StageFunctions:
        """The stage's functions, by the name that programs use."""
        if name == "embed":
            return Embed(self)
        if name == "head":
            return Head(self)
        layer, _, part = name.partition(".")
        number = int(layer.removeprefix("L"))
        weights = self.decoder.weights
        if part == "attention":
            return Attention(self, number, weights.attention[number])
        return Mlp(self, weights.mlp[number])

    def empty_hidden(self, rows: int) -> Tensor:
        """An uninitialised residual stream [rows, M]."""
        return self.decoder.weights.embedding.new_empty(rows, self.decoder.config.hidden)


@dataclass(slots=True)
class Embed:
    """Token ids to the residual stream; whole on every rank, no collective."""

    forward: Forward

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """Nothing to prepare."""
        return hidden_TM

    def body(self, _: Tensor, rows: Rows) -> Tensor:
        """The embedding of the rows' tokens [T, M]."""
        return self.forward.decoder.weights.embedding[self.forward.tokens[rows.start : rows.stop]]

    def tail(self, features_TM: Tensor) -> Tensor:
        """No projection."""
        return features_TM

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Starts the residual stream."""
        hidden_TM.copy_(total_TM)


@dataclass(slots=True)
class Attention:
    """One layer's attention, for this rank's heads."""

    forward: Forward
    layer: int
    weights: AttentionWeights

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return rms_norm(hidden_TM, self.weights.norm, self.forward.decoder.config.norm_epsilon)

    def body(self, input_TM: Tensor, rows: Rows) -> Tensor:
        """Projects, turns, stores keys and values, attends: [T, H * D]."""
        heads_TnD = self._project(input_TM, rows)
        decoder, forward = self.forward.decoder, self.forward
        queries = len(decoder.share.heads)
        query_HTD = heads_TnD[:, :queries].transpose(0, 1)
        kv = heads_TnD[:, queries:]
        outputs = []
        for segment, part in forward.batch.within(rows):
            here = slice(part.start - rows.start, part.stop - rows.start)
            start = segment.end - (self._stop_of(part) - part.start)
            forward.slabs.write(segment.sequence, self.layer, start, kv[here])
            outputs.append(self._attend(query_HTD[:, here], segment.sequence, start))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _project(self, input_TM: Tensor, rows: Rows) -> Tensor:
        """This rank's query, key and value heads, in this order, turned by position: [T, H + 2G, D]."""
        decoder = self.forward.decoder
        share, config = decoder.share, decoder.config
        if not share.heads:
            return input_TM.new_empty(input_TM.shape[0], 0, config.head_dim)
        heads = torch.unflatten(self.weights.qkv(input_TM), 1, (-1, config.head_dim))
        turned = heads[:, : len(share.heads) + len(share.kv_heads)]
        if self.weights.qk_norm is not None:
            unit = torch.ones_like(self.weights.qk_norm[0])
            turned.copy_(rms_norm(turned, unit, config.norm_epsilon).mul_(self.weights.qk_norm))
        rotate(turned, self.forward.angles[rows.start : rows.stop], decoder.exact_rows)
        return heads

    def _stop_of(self, part: Rows) -> int:
        return next(span.stop for span in self.forward.batch.spans if span.contains(part))

    def _attend(self, query_HnD: Tensor, slot: int, start: int) -> Tensor:
        decoder = self.forward.decoder
        keys, values = self.forward.slabs.read(slot, self.layer)
        window = decoder.flags.windows[self.layer]
        pieces = [
            attend(query_HnD[run.query], keys[run.key], values[run.key], start, window, decoder.exact_rows)
            for run in decoder.share.runs
        ]
        if not pieces:
            return query_HnD.new_empty(query_HnD.shape[1], 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def tail(self, features: Tensor) -> Tensor:
        """The output projection: this rank's partial [T, M]."""
        return self.weights.output(features)

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Adds the contribution."""
        hidden_TM.add_(total_TM)


@dataclass(slots=True)
class Mlp:
    """One layer's MLP, for this rank's part of its width."""

    forward: Forward
    weights: MlpWeights

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return rms_norm(hidden_TM, self.weights.norm, self.forward.decoder.config.norm_epsilon)

    def body(self, input_TM: Tensor, _: Rows) -> Tensor:
        """The gated activation [T, width of this rank]."""
        return swiglu(self.weights.gate_up(input_TM), self.forward.decoder.exact_rows)

    def tail(self, features: Tensor) -> Tensor:
        """The down projection: this rank's partial [T, M]."""
        return self.weights.down(features)

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Adds the contribution."""
        hidden_TM.add_(total_TM)


@dataclass(slots=True)
class Head:
    """The output head, for this rank's part of the vocabulary, on the sampled rows only."""

    forward: Forward

    def enter(self, hidden_TM: Tensor) -> Tensor:
        """Nothing: the norm waits until `body` has picked the rows."""
        return hidden_TM

    def body(self, input_TM: Tensor, rows: Rows) -> Tensor:
        """The last norm of those rows that are sampled: [sampled rows, M]."""
        decoder, sampled = self.forward.decoder, self.forward.batch.sampled_rows
        picked = [row - rows.start for row in sampled if rows.start <= row < rows.stop]
        return rms_norm(input_TM[picked], decoder.weights.norm, decoder.config.norm_epsilon)

    def tail(self, features: Tensor) -> Tensor:
        """Logits of this rank's vocabulary [sampled rows, vocabulary of this rank], float32."""
        return self.forward.decoder.weights.head(features).float()

    def absorb(self, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """The end: nothing follows."""


StageFunctions = Embed | Attention | Mlp | Head
