"""A rank's decoder: every stage as four functions.

    enter(forward, extent, hidden) -> input     row-wise: the norm
    body(forward, extent, input) -> features    up to the input of the stage's last projection
    tail(forward, extent, features) -> partial  row-wise: that projection; the sum over ranks is the contribution
    absorb(forward, extent, hidden, total)      row-wise: adds the contribution to the residual stream

    whole(forward, extent, hidden) -> partial   the first three in one, where few rows are faster so; or nothing

The caller may run them for any rows, in any order that `program.check` allows; what travels between a body and its
tails is theirs alone. Stages hold weights and constants; what belongs to one batch comes in as a `Forward`. Knows
nothing of lanes, programs or other ranks. Shapes: see forward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.cache.slabs import Slabs
from weft.model.at_once import AtOnce, at_once
from weft.model.blueprint import Blueprint, Norm, StageParts
from weft.model.branches import BRANCHES, BranchFunctions, Making, Parallel, Projection
from weft.model.elementwise import UnitRows, capped
from weft.model.forward import Extent, Forward
from weft.model.kernels.linear import Linear
from weft.model.kernels.looked_up import LookedUp
from weft.model.rope import Rope
from weft.model.shares import Share
from weft.model.weights import Gain, StageWeights, Weights
from weft.program.batch import Batch


class StageFunctions(Protocol):
    """One stage of one rank."""

    @property
    def adds(self) -> bool:
        """The sum over ranks is added to the residual stream as it is."""
        ...

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

    def whole(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor | None:
        """What `tail` gives of what `body` gives of what `enter` gives, with the same bits; None, with nothing done, if
        that isn't faster."""
        ...


class _InSteps:
    """A stage that is always gone through step by step."""

    __slots__ = ()

    def whole(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor | None:
        """Nothing."""
        return None


class Decoder:
    """A rank's weights with all that is needed to apply them: `stages`, those that it has, by part and layer, as
    programs name them. `logit_factor`: by which the output head's input is multiplied beyond what the last norm gives.
    """

    def __init__(
        self, blueprint: Blueprint, share: Share, weights: Weights, ropes: Sequence[Rope], exact_rows: bool = False
    ) -> None:
        self.width, self.ropes, self.logit_factor = blueprint.hidden, ropes, blueprint.norm.factor
        self.device, self.dtype = weights.device, weights.dtype
        making = _StageMaker(blueprint, share, self.device, exact_rows)
        before, after = blueprint.outline.before[0], blueprint.outline.after[-1]
        self.stages: dict[tuple[str, int | None], StageFunctions] = {}
        if weights.embedding is not None:
            self.stages[before.part, None] = Embed(weights.embedding, self._rounded(blueprint.embedding_factor))
        for (part, layer), held in weights.stages.items():
            parts = next(each for each in blueprint.layer if each.stage.part == part)
            self.stages[part, layer] = making.stage(parts, layer, held)
        if weights.head is not None and weights.gain is not None:
            norm = making.norm(blueprint.norm)
            self.stages[after.part, None] = Head(weights.head, norm, weights.gain, blueprint.softcap)

    def _rounded(self, factor: float) -> float:
        """To what is computed in, as Gemma was trained."""
        return float(torch.tensor(factor, dtype=self.dtype))

    def begin(self, batch: Batch, tokens: Sequence[int], slabs: Slabs) -> Forward:
        """One forward pass of `tokens` (one id a row of the batch) over the key/value memory in `slabs`."""
        ids = torch.tensor(tokens, device=self.device)
        angles = tuple(
            _joined([rope.angles(s.start, s.end, s.prompt or s.end) for s in batch.segments])[:, None]
            for rope in self.ropes
        )
        return Forward(batch, ids, angles, self._query_factors(batch), slabs)

    def _query_factors(self, batch: Batch) -> Tensor | None:
        """By the first rope, which is the only one where there are any."""
        found = [self.ropes[0].query_factors(s.start, s.end) for s in batch.segments] if self.ropes else []
        some = [factors for factors in found if factors is not None]
        return _joined(some).to(self.dtype)[:, None, None] if some else None

    def empty_hidden(self, rows: int) -> Tensor:
        """An uninitialised residual stream [rows, M]."""
        return torch.empty(rows, self.width, dtype=self.dtype, device=self.device)


def _joined(spans: list[Tensor]) -> Tensor:
    return spans[0] if len(spans) == 1 else torch.cat(spans)


@dataclass(frozen=True, slots=True)
class Embed(_InSteps):
    """Token ids to the residual stream; whole on every rank, no collective."""

    embedding: LookedUp
    factor: float
    adds: bool = True

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """Nothing to prepare."""
        return hidden_TM

    def body(self, forward: Forward, extent: Extent, _: Tensor) -> Tensor:
        """The embedding of the rows' tokens [T, M]."""
        rows = self.embedding(forward.tokens[extent.rows.start : extent.rows.stop])
        return rows if self.factor == 1.0 else rows.mul_(self.factor)

    def tail(self, forward: Forward, extent: Extent, features: Tensor) -> Tensor:
        """No projection."""
        return features

    def absorb(self, forward: Forward, extent: Extent, hidden_TM: Tensor, total_TM: Tensor) -> None:
        """Starts the residual stream."""
        hidden_TM.copy_(total_TM)


@dataclass(frozen=True, slots=True)
class _Layered:
    """A norm, if any, and a branch."""

    norm: UnitRows | None
    branch: BranchFunctions

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """The norm before the projections."""
        return hidden_TM if self.norm is None else self.norm(hidden_TM)

    def body(self, forward: Forward, extent: Extent, input_TM: Tensor) -> Any:
        """The branch's."""
        return self.branch.body(forward, extent, input_TM)

    def tail(self, forward: Forward, extent: Extent, features: Any) -> Tensor:
        """The branch's."""
        return self.branch.tail(forward, extent, features)


@dataclass(frozen=True, slots=True)
class LayerStage(_Layered):
    """A contribution, or the norm of what all ranks' partials come to."""

    post: tuple[UnitRows, Gain] | None
    at_once: AtOnce | None

    def whole(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor | None:
        """See `StageFunctions`."""
        return None if self.at_once is None else self.at_once(forward, extent, hidden_TM)

    @property
    def adds(self) -> bool:
        """See `StageFunctions`."""
        return self.post is None

    def absorb(self, forward: Forward, extent: Extent, hidden_LM: Tensor, total_LM: Tensor) -> None:
        """Adds it."""
        if self.post is None:
            hidden_LM.add_(total_LM)
        else:
            unit, gain = self.post
            hidden_LM.add_(gain.of(unit(total_LM)))


@dataclass(frozen=True, slots=True)
class ProjectionStage(_InSteps, _Layered):
    """What the next stage needs of all ranks before it can attend; nothing of it comes to the residual stream."""

    heads: Projection
    adds: bool = False

    def absorb(self, forward: Forward, extent: Extent, hidden_LM: Tensor, total_L2: Tensor) -> None:
        """Takes the norms of queries and keys."""
        self.heads.normed(forward, extent.leaves, total_L2)


@dataclass(frozen=True, slots=True)
class Head(_InSteps):
    """The output head, for this rank's part of the vocabulary."""

    projection: Linear
    norm: UnitRows
    gain: Gain
    softcap: float | None
    adds: bool = True

    def enter(self, forward: Forward, extent: Extent, hidden_TM: Tensor) -> Tensor:
        """The last norm."""
        return self.gain.of(self.norm(hidden_TM))

    def body(self, forward: Forward, extent: Extent, input_LM: Tensor) -> Tensor:
        """Nothing lies between the norm and the projection."""
        return input_LM

    def tail(self, forward: Forward, extent: Extent, features: Tensor) -> Tensor:
        """Logits of this rank's vocabulary [L, vocabulary of this rank], float32."""
        logits = self.projection(features).float()
        return logits if self.softcap is None else capped(logits, self.softcap)

    def absorb(self, forward: Forward, extent: Extent, hidden_LM: Tensor, total_LM: Tensor) -> None:
        """Never called: logits are gathered, not summed."""
        raise AssertionError("logits don't come to the residual stream")


class _StageMaker:
    """Makes a layer's stages."""

    def __init__(self, blueprint: Blueprint, share: Share, device: torch.device, exact_rows: bool) -> None:
        self._hidden, self._epsilon, self._device = blueprint.hidden, blueprint.epsilon, device
        self._exact_rows = exact_rows
        heads = blueprint.axis("heads").width
        self._making = Making(blueprint, share, exact_rows, UnitRows(heads, blueprint.epsilon, device, exact_rows))

    def norm(self, norm: Norm) -> UnitRows:
        return UnitRows(self._hidden, self._epsilon, self._device, self._exact_rows, norm.centred)

    def stage(self, parts: StageParts, layer: int, held: StageWeights) -> StageFunctions:
        branches = [
            BRANCHES[type(branch)](self._making, branch, layer, weights)
            for branch, weights in zip(parts.branches, held.branches, strict=True)
        ]
        before = parts.branches[0].norm
        norm = self.norm(before) if before is not None else None
        if parts.stage.aside:
            assert isinstance(branches[0], Projection), "what is no contribution is what norms of heads need"
            return ProjectionStage(norm, branches[0], branches[0])
        post = None if parts.post is None or held.post is None else (self.norm(parts.post), held.post)
        branch = branches[0] if len(branches) == 1 else Parallel(branches[0], tuple(branches[1:]))
        return LayerStage(norm, branch, post, at_once(norm, branch, self._hidden))
