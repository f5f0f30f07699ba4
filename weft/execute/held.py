"""What a step leaves to later ones: rows, and what stages' bodies made of rows. Knows rows; knows nothing of lanes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.model.decoder import StageFunctions
from weft.program.batch import Rows


class HeldFeatures:
    """Features until their last tail has taken them: the stage, the rows that leave, features, rows left to take."""

    def __init__(self) -> None:
        self._kept: list[tuple[StageFunctions, Rows, Any, list[int]]] = []

    def put(self, stage: StageFunctions, leaves: Rows, features: Any) -> None:
        """What a body made, for so many rows that leave."""
        if leaves.length:
            self._kept.append((stage, leaves, features, [leaves.length]))

    def take(self, stage: StageFunctions, leaves: Rows) -> Any:
        """For these rows of them."""
        for number, (owner, rows, features, left) in enumerate(self._kept):
            if owner is stage and rows.contains(leaves):
                left[0] -= leaves.length
                if not left[0]:
                    del self._kept[number]
                return features
        raise AssertionError("a tail without a body: the program was not checked")


class HeldRows:
    """Rows that a later step takes, whole or in parts; each tensor is let go with its last row."""

    def __init__(self) -> None:
        self._kept: list[tuple[StageFunctions, Rows, Tensor, list[int]]] = []

    def put(self, stage: StageFunctions, rows: Rows, tensor: Tensor) -> None:
        """Rows of a stage."""
        self._kept.append((stage, rows, tensor, [rows.length]))

    def has(self, stage: StageFunctions, rows: Rows) -> bool:
        """Something of these rows is there."""
        return bool(self._kept) and any(owner is stage and there.intersects(rows) for owner, there, _, _ in self._kept)

    def take(self, stage: StageFunctions, rows: Rows) -> Tensor:
        """These rows, from the tensor or the tensors that hold them."""
        if self._kept and self._kept[0][0] is stage and self._kept[0][1] == rows:  # mostly: just these
            return self._kept.pop(0)[2]
        taken, kept, missing = [], [], rows.length
        for entry in self._kept:
            owner, there, tensor, left = entry
            here = rows.clip(there) if owner is stage else Rows(0, 0)
            if here.length:
                left[0] -= here.length
                missing -= here.length
                part = tensor if here == there else tensor[here.start - there.start : here.stop - there.start]
                taken.append((here.start, part))
            if left[0]:
                kept.append(entry)
        self._kept = kept
        assert not missing, "nothing holds all of a step's rows: the program was not checked"
        if len(taken) == 1:
            return taken[0][1]
        return torch.cat([part for _, part in sorted(taken, key=lambda entry: entry[0])])
