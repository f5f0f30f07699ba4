"""Configurations and families: what is known, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from tests.tiny import MODELS, SMALL, Checkpoints
from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.families import FAMILIES, flags_of


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    raw = getattr(transformers, f"{family}Config")(**{**SMALL, **changes}).to_dict()
    return raw | {"architectures": [f"{family}ForCausalLM"]}


def test_every_family_has_a_tiny_model() -> None:
    assert {f"{family}ForCausalLM" for family, _ in MODELS.values()} == {f.architecture for f in FAMILIES.values()}


def test_dimensions_and_flags(checkpoints: Checkpoints) -> None:
    config = ModelConfig.from_directory(checkpoints.directory("qwen2-window"))
    assert (config.hidden, config.heads, config.kv_heads, config.head_dim) == (48, 6, 2, 8)
    assert flags_of(config).qkv_bias and not flags_of(config).output_bias
    assert flags_of(config).windows == (None, 40)
    assert ModelConfig.from_directory(checkpoints.directory("qwen3")).head_dim == 32


@pytest.mark.parametrize(
    ("name", "length"),
    [("llama", 1024), ("llama-linear", 2048), ("llama-dynamic", 1024), ("llama-yarn", 1024), ("llama-llama3", 1024)],
)
def test_context_counts_rope_scaling_in(checkpoints: Checkpoints, name: str, length: int) -> None:
    assert ModelConfig.from_directory(checkpoints.directory(name)).max_length == length


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (config_of("Gemma2"), "Gemma2ForCausalLM .gemma2. is not known; known are LlamaForCausalLM, Mistral"),
        (config_of("Llama") | {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "own.Own"}}, "OwnFor"),
        ({"model_type": "t5"}, "the architecture t5"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        (config_of("Llama", hidden_act="gelu"), "activation 'gelu' is not known"),
        (config_of("Llama") | {"quantization_config": {"quant_method": "awq"}}, "quantized .awq."),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(raw: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        flags_of(ModelConfig.from_dict(raw))
