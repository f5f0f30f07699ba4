"""A rank's part of what contributes to the residual stream: attention and MLPs, and both beside each other.

    body(forward, extent, input) -> features    up to the input of the last projection
    tail(forward, extent, features) -> partial  row-wise: that projection; the sum over ranks is the contribution

Knows weights and one batch; knows nothing of norms before and after, of lanes, programs or other ranks. Shapes: see
forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from weft.cache.slabs import Slabs
from weft.model.attention import Scoring, attend, attend_each
from weft.model.blueprint import AttentionBranch, Blueprint, Branch, MlpBranch, ProjectionBranch
from weft.model.elementwise import UnitRows, activation, compiled_gate, rotate
from weft.model.forward import Extent, Forward, RowWise, SequenceRows
from weft.model.kernels.linear import Linear
from weft.model.shares import HeadRun, Share
from weft.model.weights import BranchWeights
from weft.program.batch import Rows
from weft.program.strategy import GRANULE


class BranchFunctions(Protocol):
    """One branch of one rank."""

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> Any:
        """Everything up to the last projection; what its tails take."""
        ...

    def tail(self, forward: Forward, extent: Extent, features: Any) -> Tensor:
        """This rank's partial [L, M], for all or some rows of a body."""
        ...


class Making(NamedTuple):
    """What branches are made of. `unit`: of norms of heads."""

    blueprint: Blueprint
    share: Share
    exact_rows: bool
    unit: UnitRows


@dataclass(frozen=True, slots=True)
class HeadsShape:
    """This rank's heads: H, G, D, and which of them share keys. `owned`: of its key/value heads, those that no rank
    before it has too."""

    queries: int
    groups: int
    width: int
    runs: tuple[HeadRun, ...]
    owned: slice


@dataclass(frozen=True, slots=True)
class Projection:
    """Queries, keys and values for this rank's heads, whose norms go over all heads of all ranks: what they need of
    each rank is the partial, [L, 2] sums of squares."""

    weights: BranchWeights
    shape: HeadsShape
    widths: Tensor  # numbers of all queries, of all keys
    epsilon: float

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> RowWise:
        """Leaves the heads to the stage that attends; their sums of squares, in float32."""
        assert self.weights.first is not None
        heads_TnD = self.weights.first(input_TM).view(input_TM.shape[0], -1, self.shape.width)
        forward.leave(heads_TnD, extent.rows)
        queries, keys = heads_TnD[:, : self.shape.queries], heads_TnD[:, self.shape.queries :][:, self.shape.owned]
        lengths = [torch.linalg.vector_norm(each.flatten(1).float(), dim=1) for each in (queries, keys)]
        return RowWise(extent.leaves, torch.stack(lengths, dim=1).square_())

    def tail(self, forward: Forward, extent: Extent, features: RowWise) -> Tensor:
        """The sums themselves."""
        return features.of(extent.leaves).contiguous()

    def normed(self, forward: Forward, rows: Rows, squares_T2: Tensor) -> None:
        """Takes the norms of what was left, now that the sums over all ranks are known; rounds once."""
        scales, counts = self.weights.scales, (self.shape.queries, self.shape.groups)
        assert scales is not None
        factors = squares_T2.div(self.widths).add_(self.epsilon).sqrt_().reciprocal_()
        turned = forward.left(rows)[:, : sum(counts)]
        each = torch.repeat_interleave(factors, torch.tensor(counts, device=factors.device), dim=1)[..., None]
        turned.copy_((turned * each).mul_(scales))


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention, for this rank's heads. `layer`: of this rank's, from 0. `turn`: which of the model's
    ropes; `rotary`: how many numbers of a head it turns. `unit`: of norms of heads."""

    layer: int
    weights: BranchWeights
    shape: HeadsShape
    scorings: tuple[Scoring, ...]  # one a run
    turn: int | None
    rotary: int
    unit: UnitRows
    exact_rows: bool

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> RowWise:
        """Projects, turns, stores all rows' keys and values, attends for those rows that leave: [L, H * D]."""
        if not self.shape.runs:  # more ranks than heads
            return RowWise(extent.leaves, input_TM.new_empty(extent.leaves.length, 0))
        heads_TnD = self._project(forward, input_TM, extent.rows)
        few = extent.leaves.length < extent.rows.length
        if places := forward.places(extent.rows):
            places.write(self.layer, heads_TnD)
        else:
            for here, piece in forward.pieces(extent.rows):
                forward.slabs.write(piece.slot, self.layer, piece.start, heads_TnD[here, self.shape.queries :])
        at_once = places is not None and len(self.shape.runs) == 1
        pieces = forward.stretches(extent.rows, self.exact_rows, few) if at_once else forward.pieces(extent.rows)
        values = [
            self._attend(forward.slabs, heads_TnD[here], piece, few) if piece is not None
            else self._attend_each(forward, heads_TnD, extent.rows, here)
            for here, piece in pieces
        ]  # fmt: skip
        return RowWise(extent.leaves, values[0] if len(values) == 1 else torch.cat(values))

    def _attend_each(self, forward: Forward, heads_TnD: Tensor, rows: Rows, here: slice) -> Tensor:
        """Single tokens of some sequences: [those, H * D]."""
        places = forward.places(Rows(rows.start + here.start, rows.start + here.stop))
        assert places is not None, "they are all at once where places are known"
        return attend_each(heads_TnD[here], places, self.layer, self.scorings[0])

    def _project(self, forward: Forward, input_TM: Tensor, rows: Rows) -> Tensor:
        """This rank's query, key and value heads, in this order, turned by position: [T, H + 2G, D]."""
        shape, weights = self.shape, self.weights
        if weights.first is None:
            heads = forward.left(rows)
        else:
            heads = weights.first(input_TM).view(input_TM.shape[0], -1, shape.width)
        turned = heads[:, : shape.queries + shape.groups]
        if weights.scales is not None:
            turned.copy_(self.unit(turned).mul_(weights.scales))
        if self.turn is not None:
            part = turned if self.rotary == shape.width else turned[..., : self.rotary]
            rotate(part, forward.turned(self.turn, rows), self.exact_rows)
            if forward.query_factors is not None:
                heads[:, : shape.queries].mul_(forward.query_factors[rows.start : rows.stop])
        return heads

    def _attend(self, slabs: Slabs, heads_TnD: Tensor, piece: SequenceRows, few: bool) -> Tensor:
        """Some tokens of one sequence, or a few, the last ones that are wanted: [all or those, H * D]."""
        shape, count = self.shape, heads_TnD.shape[0]
        last = piece.wanted if few else count
        if not last:
            return heads_TnD.new_empty(0, shape.queries * shape.width)
        start, query_nHD = piece.start, heads_TnD[:, : shape.queries]
        if last < count:  # bits that don't depend on the batch are those of whole blocks
            first = start + count - last
            first = max(start, first // GRANULE * GRANULE) if self.exact_rows else first
            start, query_nHD = first, query_nHD[first - start :]
        query_HnD = query_nHD.transpose(0, 1)
        kept = slabs.read(piece.slot, self.layer)
        if len(shape.runs) == 1:  # mostly; all heads without three views for every token that decodes
            attended = attend(query_HnD, kept, start, self.scorings[0], self.exact_rows, piece.decoding)
        else:
            each = []
            for run, scoring in zip(shape.runs, self.scorings, strict=True):
                own = query_HnD[run.query], kept.heads(run.key)
                each.append(attend(*own, start, scoring, self.exact_rows, piece.decoding))
            attended = torch.cat(each, dim=1)
        return attended if last == count else attended[attended.shape[0] - last :]

    def tail(self, forward: Forward, extent: Extent, features: RowWise) -> Tensor:
        """The output projection: this rank's partial [L, M]."""
        return _last(self.weights)(features.of(extent.leaves))


@dataclass(frozen=True, slots=True)
class Mlp:
    """One layer's MLP, for this rank's part of its width."""

    weights: BranchWeights
    act: Callable[[Tensor], Tensor]
    cubic: int | None = None  # of the compiled gate, if it is one

    def body(self, forward: Forward, extent: Extent, input_LM: Tensor) -> RowWise:
        """The activation [L, width of this rank]."""
        assert self.weights.first is not None
        return RowWise(extent.leaves, self.act(self.weights.first(input_LM)))

    def tail(self, forward: Forward, extent: Extent, features: RowWise) -> Tensor:
        """The down projection: this rank's partial [L, M]."""
        return _last(self.weights)(features.of(extent.leaves))


@dataclass(frozen=True, slots=True)
class Parallel:
    """Branches that read one input, and whose sum is one contribution. The first may remember rows; the others are for
    the rows that leave."""

    first: BranchFunctions
    others: tuple[BranchFunctions, ...]

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> list[Any]:
        """Features of each."""
        features = [self.first.body(forward, extent, input_TM)]
        if extent.leaves.length:
            alike = extent.leaves.length == extent.rows.length
            input_LM = input_TM if alike else forward.pick(input_TM, extent.rows)
            features += [branch.body(forward, extent, input_LM) for branch in self.others]
        return features

    def tail(self, forward: Forward, extent: Extent, features: list[Any]) -> Tensor:
        """This rank's partial [L, M]: one sum over ranks for all of them."""
        partial = self.first.tail(forward, extent, features[0])
        for branch, own in zip(self.others, features[1:], strict=True):
            partial.add_(branch.tail(forward, extent, own))
        return partial


def _last(weights: BranchWeights) -> Linear:
    assert weights.last is not None, "a contribution comes from a last projection"
    return weights.last


def _heads(making: Making) -> HeadsShape:
    share, width = making.share, making.blueprint.axis("heads").width
    before = sum(kv * share.kv_group < share.heads.start for kv in share.kv_heads)
    owned = slice(before, len(share.kv_heads))
    return HeadsShape(len(share.heads), len(share.kv_heads), width, share.runs, owned)


def _projection(making: Making, branch: Branch, layer: int, weights: BranchWeights) -> BranchFunctions:
    assert isinstance(branch, ProjectionBranch)
    widths = torch.tensor([float(axis.numbers) for _, axis in branch.head_norms], device=making.unit.epsilon.device)
    return Projection(weights, _heads(making), widths, making.blueprint.epsilon)


def _attention(making: Making, branch: Branch, layer: int, weights: BranchWeights) -> BranchFunctions:
    assert isinstance(branch, AttentionBranch)
    blueprint, shape = making.blueprint, _heads(making)
    window, sinks = blueprint.windows[layer], weights.sinks
    scorings = tuple(
        Scoring(window, branch.softcap, None if sinks is None else sinks[run.query, None]) for run in shape.runs
    )
    turn, rotary = blueprint.turned[layer], 2 * -(-blueprint.rotary // 2)
    return Attention(
        layer - making.share.layers.start, weights, shape, scorings, turn, rotary, making.unit, making.exact_rows
    )


def _mlp(making: Making, branch: Branch, layer: int, weights: BranchWeights) -> BranchFunctions:
    assert isinstance(branch, MlpBranch)
    act = activation(branch.activation, branch.gated, making.exact_rows)
    return Mlp(weights, act, compiled_gate(branch.activation) if branch.gated else None)


# How a rank's branches are made, by what declares them.
BRANCHES: dict[type[Branch], Callable[[Making, Branch, int, BranchWeights], BranchFunctions]] = {
    ProjectionBranch: _projection, AttentionBranch: _attention, MlpBranch: _mlp,
}  # fmt: skip
