"""Rotary angles: transformers' numbers to the bit, without transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.tiny import LLAMA3
from weft.model.configuration import configured
from weft.model.families import ROPES, blueprint_of
from weft.model.rope import BLOCK, FORMULAS, ropes_for

YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 2.0}), ("linear", {"factor": 3}),
    ("dynamic", {"factor": 4.0}), ("dynamic", {"factor": 1.5}),
    ("yarn", YARN), ("yarn", YARN | {"beta_fast": 16, "beta_slow": 2}), ("yarn", YARN | {"truncate": False}),
    ("yarn", YARN | {"attention_factor": 1.3}), ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}),
    ("yarn", YARN | {"factor": 1.0}),
    ("llama3", LLAMA3), ("llama3", LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0}),
]  # fmt: skip


def test_every_kind_has_a_formula() -> None:
    assert set(FORMULAS) == set(ROPES)


@pytest.mark.parametrize("theta", [10000.0, 500000, 1000000.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_frequencies_are_those_of_transformers(case: tuple[str, dict[str, Any]], theta: float) -> None:
    kind, more = case
    for width, length in ((8, 0), (64, 5000), (128, 100)):
        config = transformers.LlamaConfig(
            hidden_size=4 * width, num_attention_heads=4, max_position_embeddings=1024,
            rope_parameters={"rope_type": kind, "rope_theta": theta, **more},
        )  # fmt: skip
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length or None)
        ours = configured(config.to_dict())
        positions = ours.fields["max_position_embeddings"]
        got, got_factor = FORMULAS[kind](ours.fields["rope_parameters"], ours.head_dim, positions, length or positions)
        assert torch.equal(got, expected) and got_factor == pytest.approx(factor, abs=0)


def test_angles_are_the_same_whenever_they_come_first() -> None:
    """Token by token, in pieces across blocks, or all at once; only what is asked for takes memory."""
    config = configured(
        transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=1 << 20).to_dict()
    )
    [whole], [pieces], [late] = (ropes_for(config, blueprint_of(config)) for _ in range(3))
    expected = whole.angles(0, 3 * BLOCK, 0)
    frequencies, _ = FORMULAS["default"](config.fields["rope_parameters"], 16, 0, 0)
    turns = torch.outer(torch.arange(3 * BLOCK, dtype=torch.float32), frequencies)
    assert torch.allclose(expected, torch.polar(torch.ones_like(turns), turns), atol=1e-6)
    cuts = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]
    found = [pieces.angles(a, b, 0) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(late.angles(2 * BLOCK + 5, 2 * BLOCK + 6, 0), expected[2 * BLOCK + 5 : 2 * BLOCK + 6])


def test_two_forms_of_longrope() -> None:
    """A sequence's positions are of the longer form once it is longer; what is kept doesn't grow with prompts."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0, 2.0],
            "long_factor": [3.0, 4.0], "original_max_position_embeddings": 64}  # fmt: skip
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 1024}
    config = configured(
        transformers.Phi3Config(**sizes, original_max_position_embeddings=64, rope_parameters=rope).to_dict()
    )
    [made] = ropes_for(config, blueprint_of(config))

    def expected(length: int, start: int, end: int) -> torch.Tensor:
        frequencies, factor = FORMULAS["longrope"](config.fields["rope_parameters"], 4, 1024, length)
        turns = torch.outer(torch.arange(start, end, dtype=torch.float32), frequencies)
        return torch.polar(torch.full_like(turns, factor), turns)

    for start, end, prompt, length in ((0, 64, 64, 64), (0, 65, 65, 65), (63, 64, 10, 64), (64, 65, 10, 65),
                                       (0, 900, 900, 900), (5, 9, 700, 700), (900, 901, 65, 901)):  # fmt: skip
        assert torch.allclose(made.angles(start, end, prompt), expected(length, start, end), atol=1e-6), (start, end)
    both = made.angles(60, 70, 20)
    assert torch.allclose(both, torch.cat([expected(64, 60, 64), expected(65, 64, 70)]), atol=1e-6)
    assert [len(blocks) for blocks in made._blocks] == [1, 1]
