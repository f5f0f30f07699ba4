"""Rotary angles, from transformers' own formulas (modeling_rope_utils), for every scaling that weft knows.

Knows one model's configuration and positions; knows nothing of weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weft.config import ModelConfig, huggingface_config


class Rope:
    """Complex angles of positions, computed on first use and kept.

    The `dynamic` scaling stretches with the sequence: its frequencies depend on how long the sequence is by the
    end of the forward pass, so `length` is an argument; the others ignore it.
    """

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        self._config = config
        self._parameters: dict[str, Any] = config.fields.get("rope_parameters") or {}
        self._kind: str = self._parameters.get("rope_type", "default")
        self._trained = int(config.fields["max_position_embeddings"])
        self._width = config.head_dim
        self._limit = config.max_length
        self._device = device
        self._fixed = self._table(*self._frequencies(None), self._limit) if self._kind != "dynamic" else None
        self._stretched = lru_cache(maxsize=8)(self._for_length)

    def angles(self, start: int, end: int, length: int) -> Tensor:
        """cos + i sin, times the scaling's attention factor: complex [end - start, D/2]."""
        table = self._fixed if self._fixed is not None else self._stretched(max(length, self._trained))
        return table[start:end]

    def _for_length(self, length: int) -> Tensor:
        return self._table(*self._frequencies(length), length)

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        if self._kind == "default":  # nothing to look up: spares workers transformers' start-up time
            exponents = torch.arange(0, self._width, 2, dtype=torch.float32) / self._width
            return 1.0 / self._parameters["rope_theta"] ** exponents, 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        hf = huggingface_config({**self._config.fields, "model_type": self._config.model_type})
        frequencies, factor = ROPE_INIT_FUNCTIONS[self._kind](hf, torch.device("cpu"), seq_len=length)
        return frequencies, float(factor)

    def _table(self, frequencies: Tensor, factor: float, length: int) -> Tensor:
        turns = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        return torch.complex(turns.cos() * factor, turns.sin() * factor).to(self._device)
