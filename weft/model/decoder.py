"""A rank's decoder: every stage as four functions, and what of them concerns one batch.

    enter(forward, extent, hidden) -> input     row-wise: the norm
    body(forward, extent, input) -> features    up to the input of the stage's last projection
    tail(forward, extent, features) -> partial  row-wise: that projection; the sum over ranks is the contribution
    absorb(forward, extent, hidden, total)      row-wise: adds the contribution to the residual stream

The caller may run them for any rows, in any order that `program.check` allows; what travels between a body and its
tails is theirs alone. Stages hold weights and constants; what belongs to one batch comes in as a `Forward`. Knows
nothing of lanes, programs or other ranks.

Shapes: T rows of the call, L of them that leave, M model width, H this rank's query heads, G its key/value heads,
D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from weft.cache.slabs import Slabs
from weft.config import ModelConfig
from weft.model.attention import attend
from weft.model.blueprint import Blueprint
from weft.model.kernels import Linear, rotate, swiglu, unit_rows
from weft.model.rope import Rope
from weft.model.shares import HeadRun, Share
from weft.model.weights import StageWeights, Weights
from weft.program.batch import Batch, Rows
from weft.program.strategy import GRANULE


class Extent(NamedTuple):
    """What a step is about: `rows` of the batch, and which rows leave the stage; these are other ones where the batch's
    wanted rows, counted from 0, go on alone."""

    rows: Rows
    leaves: Rows


class StageFunctions(Protocol):
    """One stage of one rank."""

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """The residual stream's rows made the stage's input."""
        ...

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> Any:
        """Everything up to the last projection; what its tails take."""
        ...

    def tail(self, forward: Forward, extent: Extent, features: Any) -> Tensor:
        """This rank's partial [L, M], for all or some rows of a body."""
        ...

    def absorb(self, forward: Forward, extent: Extent, hidden_LM: Tensor, total_LM: Tensor) -> None:
        """Adds the contribution to the residual stream, in place."""
        ...


class Decoder:
    """A rank's weights with all that is needed to apply them: `stages` by part and layer, as programs name them."""

    def __init__(
        self, config: ModelConfig, blueprint: Blueprint, share: Share, weights: Weights, rope: Rope,
        exact_rows: bool = False,
    ) -> None:  # fmt: skip
        self.width, self.embedding, self.rope = blueprint.hidden, weights.embedding, rope
        epsilon, head_epsilon = (
            torch.tensor(math.sqrt(width * config.norm_epsilon), device=self.embedding.device)
            for width in (blueprint.hidden, config.head_dim)
        )
        made = Making(blueprint, share, weights, epsilon, head_epsilon, exact_rows)
        self.stages = {(s.part, s.layer): FUNCTIONS[s.part](made, s.layer) for s in blueprint.outline.stages}

    def begin(self, batch: Batch, tokens: Sequence[int], slabs: Slabs) -> Forward:
        """One forward pass of `tokens` (one id a row of the batch) over the key/value memory in `slabs`."""
        ids = torch.tensor(tokens, device=self.embedding.device)
        spans = [self.rope.angles(s.start, s.end, s.prompt or s.end) for s in batch.segments]
        angles = spans[0] if len(spans) == 1 else torch.cat(spans)
        return Forward(batch, ids, angles[:, None], slabs)

    def empty_hidden(self, rows: int) -> Tensor:
        """An uninitialised residual stream [rows, M]."""
        return self.embedding.new_empty(rows, self.width)


class SequenceRows(NamedTuple):
    """Tokens of one sequence: its slot, the first one's position, how many of them, the last ones, are wanted, and
    whether they are decoded."""

    slot: int
    start: int
    wanted: int
    decoding: bool


@dataclass(slots=True)
class Forward:
    """What the stages need to know of one batch."""

    batch: Batch
    tokens: Tensor  # [all rows]
    angles: Tensor  # [all rows, 1, D/2], complex
    slabs: Slabs
    _pieces: dict[Rows, list[tuple[slice, SequenceRows]]] = field(default_factory=dict)

    def pieces(self, rows: Rows) -> list[tuple[slice, SequenceRows]]:
        """The sequences that have tokens in `rows`, and where in `rows`."""
        if rows not in self._pieces:  # every layer asks for the same few rows
            self._pieces[rows] = [
                (
                    slice(part.start - rows.start, part.stop - rows.start),
                    SequenceRows(
                        segment.sequence, segment.end - (span.stop - part.start), self.batch.wanted(part).length,
                        segment.decoding,
                    ),
                )
                for segment, span, part in self.batch.within(rows)
            ]  # fmt: skip
        return self._pieces[rows]


class RowWise(NamedTuple):
    """Features of which each row is on its own: `values` [L, width], of these rows."""

    leaves: Rows
    values: Tensor

    def of(self, leaves: Rows) -> Tensor:
        """Some of them, or all."""
        if leaves == self.leaves:
            return self.values
        return self.values[leaves.start - self.leaves.start : leaves.stop - self.leaves.start]


class Adds:
    """How a stage's contribution comes to the residual stream, mostly."""

    __slots__ = ()

    def absorb(self, forward: Forward, extent: Extent, hidden_LM: Tensor, total_LM: Tensor) -> None:
        """Adds it."""
        hidden_LM.add_(total_LM)


@dataclass(frozen=True, slots=True)
class Embed:
    """Token ids to the residual stream; whole on every rank, no collective."""

    embedding: Tensor

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """Nothing to prepare."""
        return hidden_TM

    def body(self, forward: Forward, extent: Extent, _: Tensor) -> Tensor:
        """The embedding of the rows' tokens [T, M]."""
        return self.embedding[forward.tokens[extent.rows.start : extent.rows.stop]]

    def tail(self, forward: Forward, extent: Extent, features: Tensor) -> Tensor:
        """No projection."""
        return features

    def absorb(self, forward: Forward, extent: Extent, hidden_TM: Tensor, total_TM: Tensor) -> None:
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
class Attention(Adds):
    """One layer's attention, for this rank's heads."""

    layer: int
    weights: StageWeights
    shape: AttentionShape
    epsilon: Tensor
    exact_rows: bool

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return unit_rows(hidden_TM, self.epsilon, self.exact_rows)

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> RowWise:
        """Projects, turns, stores all rows' keys and values, attends for those rows that leave: [L, H * D]."""
        if not self.shape.runs:  # more ranks than heads
            return RowWise(extent.leaves, input_TM.new_empty(extent.leaves.length, 0))
        heads_TnD = self._project(forward, input_TM, extent.rows)
        pieces = forward.pieces(extent.rows)
        few = extent.leaves.length < extent.rows.length
        if len(pieces) == 1:
            values = self._attend(forward.slabs, heads_TnD, pieces[0][1], few)
        else:
            values = torch.cat([self._attend(forward.slabs, heads_TnD[here], piece, few) for here, piece in pieces])
        return RowWise(extent.leaves, values)

    def _project(self, forward: Forward, input_TM: Tensor, rows: Rows) -> Tensor:
        """This rank's query, key and value heads, in this order, turned by position: [T, H + 2G, D]."""
        shape, scales = self.shape, self.weights.scales
        heads = self.weights.first(input_TM).view(input_TM.shape[0], -1, shape.width)
        turned = heads[:, : shape.queries + shape.groups]
        if scales is not None:
            turned.copy_(unit_rows(turned, shape.epsilon, self.exact_rows).mul_(scales))
        rotate(turned, forward.angles[rows.start : rows.stop], self.exact_rows)
        return heads

    def _attend(self, slabs: Slabs, heads_TnD: Tensor, piece: SequenceRows, few: bool) -> Tensor:
        """Some tokens of one sequence, or a few, the last ones that are wanted: [all or those, H * D]."""
        shape, count = self.shape, heads_TnD.shape[0]
        last = piece.wanted if few else count
        slabs.write(piece.slot, self.layer, piece.start, heads_TnD[:, shape.queries :])
        if not last:
            return heads_TnD.new_empty(0, shape.queries * shape.width)
        start, query_nHD = piece.start, heads_TnD[:, : shape.queries]
        if last < count:  # bits that don't depend on the batch are those of whole blocks
            first = start + count - last
            first = max(start, first // GRANULE * GRANULE) if self.exact_rows else first
            start, query_nHD = first, query_nHD[first - start :]
        query_HnD = query_nHD.transpose(0, 1)
        keys, values = slabs.read(piece.slot, self.layer)
        how = start, shape.window, self.exact_rows, piece.decoding
        if len(shape.runs) == 1:  # mostly; all heads without three views for every token that decodes
            attended = attend(query_HnD, keys, values, *how)
        else:
            each = [attend(query_HnD[run.query], keys[run.key], values[run.key], *how) for run in shape.runs]
            attended = torch.cat(each, dim=1)
        return attended if last == count else attended[attended.shape[0] - last :]

    def tail(self, forward: Forward, extent: Extent, features: RowWise) -> Tensor:
        """The output projection: this rank's partial [L, M]."""
        return self.weights.last(features.of(extent.leaves))


@dataclass(frozen=True, slots=True)
class Mlp(Adds):
    """One layer's MLP, for this rank's part of its width."""

    weights: StageWeights
    epsilon: Tensor
    exact_rows: bool

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return unit_rows(hidden_TM, self.epsilon, self.exact_rows)

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> RowWise:
        """The gated activation [L, width of this rank]."""
        return RowWise(extent.leaves, swiglu(self.weights.first(input_TM), self.exact_rows))

    def tail(self, forward: Forward, extent: Extent, features: RowWise) -> Tensor:
        """The down projection: this rank's partial [L, M]."""
        return self.weights.last(features.of(extent.leaves))


@dataclass(frozen=True, slots=True)
class Head(Adds):
    """The output head, for this rank's part of the vocabulary."""

    projection: Linear
    scale: Tensor
    epsilon: Tensor
    exact_rows: bool

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """The last norm."""
        return unit_rows(hidden_TM, self.epsilon, self.exact_rows).mul_(self.scale)

    def body(self, forward: Forward, extent: Extent, input_LM: Tensor) -> Tensor:
        """Nothing lies between the norm and the projection."""
        return input_LM

    def tail(self, forward: Forward, extent: Extent, features: Tensor) -> Tensor:
        """Logits of this rank's vocabulary [L, vocabulary of this rank], float32."""
        return self.projection(features).float()


class Making(NamedTuple):
    """What stages are made of. `epsilon`, `head_epsilon`: of norms of the whole width, and of a head's."""

    blueprint: Blueprint
    share: Share
    weights: Weights
    epsilon: Tensor
    head_epsilon: Tensor
    exact_rows: bool


def _attention(made: Making, layer: int | None) -> Attention:
    assert layer is not None, "attention is a layer's"
    share, width = made.share, made.blueprint.axis("heads").width
    heads = len(share.heads), len(share.kv_heads), width
    shape = AttentionShape(*heads, share.runs, made.blueprint.windows[layer], made.head_epsilon)
    return Attention(layer, made.weights.stages["attention", layer], shape, made.epsilon, made.exact_rows)


def _mlp(made: Making, layer: int | None) -> Mlp:
    assert layer is not None, "an MLP is a layer's"
    return Mlp(made.weights.stages["mlp", layer], made.epsilon, made.exact_rows)


# How a rank's stages are made, by their part.
FUNCTIONS: dict[str, Callable[[Making, int | None], StageFunctions]] = {
    "embed": lambda made, _: Embed(made.weights.embedding),
    "attention": _attention,
    "mlp": _mlp,
    "head": lambda made, _: Head(made.weights.head, made.weights.scale, made.epsilon, made.exact_rows),
}
