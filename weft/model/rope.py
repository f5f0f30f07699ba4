"""Rotary angles, from transformers' own formulas (modeling_rope_utils), for every scaling that weft knows.

Knows one model's configuration and positions; knows nothing of weights.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from weft.config import ModelConfig, huggingface_config


class Rope:
    """Complex angles of positions, computed on first use and kept.

    The `dynamic` scaling stretches with the sequence. transformers turns a whole prompt by its length and each token
    after it by the length up to there; so does this, however the tokens come in batches: `prompt` is an argument,
    which the others ignore.
    """

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        self._config = config
        self._parameters: dict[str, Any] = config.fields.get("rope_parameters") or {}
        self._kind: str = self._parameters.get("rope_type", "default")
        self._trained = config.stretches_beyond or 0
        self._width = config.head_dim
        self._limit = config.max_length
        self._device = device
        self._fixed = self._table(*self._frequencies(None), self._limit) if not self._trained else None
        self._stretched = lru_cache(maxsize=8)(self._for_length)

    def angles(self, start: int, end: int, prompt: int) -> Tensor:
        """cos + i sin, times the scaling's attention factor: complex [end - start, D/2].

        `prompt`: tokens of the sequence's prompt.
        """
        if self._fixed is not None:
            return self._fixed[start:end]
        alike = max(prompt, self._trained)  # as many positions are turned by one table
        parts = [self._stretched(alike)[start : min(end, alike)]] if start < alike else []
        parts += [self._for_length(at + 1, at) for at in range(max(start, alike), end)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _for_length(self, length: int, start: int = 0) -> Tensor:
        """Positions `start` to `length` of a sequence of that length."""
        return self._table(*self._frequencies(length), length, start)

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        if self._kind == "default":  # nothing to look up: spares workers transformers' start-up time
            exponents = torch.arange(0, self._width, 2, dtype=torch.float32) / self._width
            return 1.0 / self._parameters["rope_theta"] ** exponents, 1.0
        frequencies, factor = self._formula(self._huggingface, torch.device("cpu"), seq_len=length)
        return frequencies, float(factor)

    @cached_property
    def _formula(self) -> Any:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[self._kind]

    @cached_property
    def _huggingface(self) -> Any:
        return huggingface_config({**self._config.fields, "model_type": self._config.model_type})

    def _table(self, frequencies: Tensor, factor: float, length: int, start: int = 0) -> Tensor:
        turns = torch.outer(torch.arange(start, length, dtype=torch.float32), frequencies)
        return torch.complex(turns.cos() * factor, turns.sin() * factor).to(self._device)
