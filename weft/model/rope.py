"""Rotary angles for every scaling that weft knows: the published formulas, to the bit as transformers computes them.

Knows one model's configuration and positions; knows nothing of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weft.config import ModelConfig
from weft.model.blueprint import Blueprint
from weft.model.family import SCALED_QUERIES

BLOCK = 4096  # positions whose angles are computed at a time
Parameters = dict[str, Any]  # rope_parameters of config.json
Formula = Callable[[Parameters, int, int, int], tuple[Tensor, float]]


def _default(rope: Parameters, width: int, trained: int = 0, length: int = 0) -> tuple[Tensor, float]:
    """Su et al., arXiv 2104.09864: a frequency for each two of `width` numbers, and a factor for cos and sin."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / rope["rope_theta"] ** exponents, 1.0


def _linear(rope: Parameters, width: int, trained: int, length: int) -> tuple[Tensor, float]:
    """Positions are divided by a factor: arXiv 2306.15595."""
    frequencies, _ = _default(rope, width)
    return frequencies / rope["factor"], 1.0


def _dynamic(rope: Parameters, width: int, trained: int, length: int) -> tuple[Tensor, float]:
    """The base grows with a sequence that is longer than the trained length ("NTK-aware")."""
    factor, longest = rope["factor"], max(length, trained)
    stretched = rope["rope_theta"] * ((factor * longest / trained) - (factor - 1)) ** (width / (width - 2))
    return _default({"rope_theta": stretched}, width)


def _yarn(rope: Parameters, width: int, trained: int, length: int) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071: fast frequencies stay, slow ones are divided, a ramp lies between."""
    theta, original = rope["rope_theta"], rope["original_max_position_embeddings"]
    factor = rope["factor"] if rope["factor"] is not None else trained / original
    powers = theta ** (torch.arange(0, width, 2).to(torch.float32) / width)

    def turning(turns: float) -> float:
        """The dimension that turns so often within the original length."""
        return (width * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = turning(rope.get("beta_fast") or 32), turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / ((high if high != low else high + 0.001) - low)
    kept = 1 - torch.clamp(ramp, 0, 1)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, _yarn_scale(rope, factor)


def _yarn_scale(rope: Parameters, factor: float) -> float:
    """Of cos and sin, which is the attention's temperature."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weights = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(weights[0]) / scale(weights[1]) if weights[0] and weights[1] else scale(1)


def _llama3(rope: Parameters, width: int, trained: int, length: int) -> tuple[Tensor, float]:
    """Llama 3.1: wavelengths beyond the original context are divided, with a smooth passage."""
    frequencies, _ = _default(rope, width)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    waves = 2 * math.pi / frequencies
    scaled = torch.where(waves > original / low, frequencies / factor, frequencies)
    smooth = (original / waves - low) / (high - low)
    between = ~(waves < original / high) * ~(waves > original / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled), 1.0


def _factors(rope: Parameters, width: int, trained: int, length: int) -> tuple[Tensor, float]:
    """Each frequency has a number of its own by which it is divided: what GGUF has of Llama 3's scaling."""
    frequencies, _ = _default(rope, width)
    return frequencies / torch.tensor(rope["factors"], dtype=torch.float32), 1.0


def _longrope(rope: Parameters, width: int, trained: int, length: int) -> tuple[Tensor, float]:
    """LongRoPE, arXiv 2402.13753: each frequency is divided by a number of its own, by another one in sequences that
    are longer than the original ones."""
    original = rope["original_max_position_embeddings"]
    factors = torch.tensor(rope["long_factor" if length > original else "short_factor"], dtype=torch.float32)
    powers = rope["rope_theta"] ** (torch.arange(0, width, 2).to(torch.float32) / width)
    stretch = rope["factor"] if rope.get("factor") is not None else trained / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return 1.0 / (factors * powers), float(scale)


FORMULAS: dict[str, Formula] = {
    "factors": _factors, "default": _default, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3,
    "longrope": _longrope,
}  # fmt: skip


class Rope:
    """Complex angles of positions, computed on first use and kept.

    The `dynamic` and `longrope` scalings stretch with the sequence. transformers turns a whole prompt by its length and
    each token after it by the length up to there; so does this, however the tokens come in batches: `prompt` is an
    argument, which the others ignore. `width`: how many numbers of a head turn; an odd one is rounded up.
    """

    def __init__(self, config: ModelConfig, parameters: Parameters, width: int, device: str = "cpu") -> None:
        self._parameters = parameters
        self._kind: str = self._parameters.get("rope_type", "default")
        self._trained = config.stretches_beyond or 0
        self._two_forms = config.turns_anew
        self._positions = int(config.fields["max_position_embeddings"])
        self._width = width
        self._device = device
        # Of so many positions each: of the only form, or of that for short sequences; of that for longer ones.
        self._blocks: tuple[list[Tensor], list[Tensor]] = [], []
        self._stretched = lru_cache(maxsize=8)(self._for_length)

    def angles(self, start: int, end: int, prompt: int) -> Tensor:
        """cos + i sin, times the scaling's attention factor: complex [end - start, D/2] for D numbers that turn.

        `prompt`: tokens of the sequence's prompt.
        """
        if not self._trained or self._two_forms:
            short = self._trained if self._trained >= prompt else 0  # so many positions are of the short form
            parts = [self._from_blocks(max(a, 0), b, long) for a, b, long in
                     ((start, min(end, short), False), (max(start, short), end, True)) if a < b]  # fmt: skip
        else:
            alike = max(prompt, self._trained)  # as many positions are turned by one table
            parts = [self._stretched(alike)[start : min(end, alike)]] if start < alike else []
            parts += [self._for_length(at + 1, at) for at in range(max(start, alike), end)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _from_blocks(self, start: int, end: int, long: bool) -> Tensor:
        """Always the same blocks are computed, so that a position has the same bits whenever it comes first."""
        blocks = self._blocks[long]
        length = self._trained + long if self._two_forms else None
        for at in range(len(blocks) * BLOCK, end, BLOCK):
            blocks.append(self._table(*self._frequencies(length), at + BLOCK, at))
        parts = [blocks[at // BLOCK][max(start - at, 0) : end - at] for at in range(start // BLOCK * BLOCK, end, BLOCK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def query_factors(self, start: int, end: int) -> Tensor | None:
        """What queries are multiplied by at these positions, if they are: Llama 4's scaling, as Ministral has it."""
        beta = self._parameters.get(SCALED_QUERIES)
        if beta is None:
            return None
        steps = torch.arange(start, end) / self._parameters["original_max_position_embeddings"]
        factors: Tensor = 1 + beta * torch.log(1 + torch.floor(steps))
        return factors.to(self._device)

    def _for_length(self, length: int, start: int = 0) -> Tensor:
        """Positions `start` to `length` of a sequence of that length."""
        return self._table(*self._frequencies(length), length, start)

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        return FORMULAS[self._kind](self._parameters, self._width, self._positions, length or self._positions)

    def _table(self, frequencies: Tensor, factor: float, length: int, start: int = 0) -> Tensor:
        turns = torch.outer(torch.arange(start, length, dtype=torch.float32), frequencies)
        return torch.complex(turns.cos() * factor, turns.sin() * factor).to(self._device)


def ropes_for(config: ModelConfig, blueprint: Blueprint, device: str = "cpu") -> list[Rope]:
    """A model's, in the blueprint's order."""
    return [Rope(config, each, blueprint.rotary, device) for each in blueprint.ropes]
