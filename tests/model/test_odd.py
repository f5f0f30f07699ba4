"""Checkpoints that are odd but legal: whatever transformers loads, weft loads, with the same answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import Checkpoints, prompt_of
from weft import LLM, SamplingParams

PROMPT, TOKENS = prompt_of(40), 8
Config, Tensors = dict[str, Any], dict[str, torch.Tensor]
HEAD = "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def bare(tensors: Tensors) -> Tensors:
    """As a model without a head is saved."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != HEAD}


def as_type(dtype: torch.dtype, part: str = "") -> Callable[[Path, Config, Tensors], Tensors]:
    def change(_: Path, config: Config, tensors: Tensors) -> Tensors:
        config["dtype"] = "float32"
        return {name: tensor.to(dtype) if part in name else tensor for name, tensor in tensors.items()}

    return change


def legacy_rope(_: Path, config: Config, tensors: Tensors) -> Tensors:
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": rope["rope_type"], "factor": rope["factor"]}}
    return tensors


def fields(**given: Any) -> Callable[[Path, Config, Tensors], Tensors]:
    """Sets fields of config.json; ... leaves one out."""

    def change(_: Path, config: Config, tensors: Tensors) -> Tensors:
        config |= given
        for name in [name for name, value in given.items() if value is ...]:
            del config[name]
        return tensors

    return change


def own_head(_: Path, __: Config, tensors: Tensors) -> Tensors:
    torch.manual_seed(3)
    return tensors | {HEAD: torch.randn_like(tensors["model.embed_tokens.weight"])}


def index_of_others(directory: Path, _: Config, tensors: Tensors) -> Tensors:
    (directory / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")})
    )
    return tensors


def unreadable_proposals(directory: Path, _: Config, tensors: Tensors) -> Tensors:
    (directory / "generation_config.json").write_bytes(b'{"eos_token_id": "\xe9"')
    return tensors


ODD: dict[str, tuple[str, Callable[[Path, Config, Tensors], Tensors]]] = {
    "saved without a head": ("qwen3", lambda d, c, t: fields(architectures=["Qwen3Model"])(d, c, bare(t))),
    "names without a prefix": (
        "llama",
        lambda d, c, t: {name.removeprefix("model."): each for name, each in t.items()},
    ),
    "an architecture of another spelling": ("llama", fields(architectures=["LLaMAForCausalLM"])),
    "no architecture": ("llama", fields(architectures=...)),
    "legacy linear": ("llama-linear", legacy_rope),
    "legacy dynamic": ("llama-dynamic", legacy_rope),
    "no rope at all": ("llama", fields(rope_parameters=...)),
    "null dimensions": ("llama-one-group", fields(head_dim=None, num_key_value_heads=None)),
    "float64": ("llama", as_type(torch.float64)),
    "float16": ("llama", as_type(torch.float16)),
    "mixed types": ("llama", as_type(torch.bfloat16, "mlp")),
    "a head of its own though tied": ("qwen3", own_head),
    "swish": ("llama", fields(hidden_act="swish")),
    "fewer layers than it has": ("llama", fields(num_hidden_layers=1)),
    "an index of other files": ("llama", index_of_others),
    "proposals that can't be read": ("llama", unreadable_proposals),
}


@pytest.mark.parametrize("name", ODD)
def test_what_transformers_loads(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    base, change = ODD[name]
    directory = Path(shutil.copytree(checkpoints.directory(base), tmp_path / "odd"))
    config = json.loads((directory / "config.json").read_text("utf-8"))
    tensors = change(directory, config, load_file(directory / SINGLE))
    (directory / "config.json").write_text(json.dumps(config))
    save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, directory / SINGLE, {"format": "pt"})
    with LLM(directory, num_threads=1, overlap="serial") as llm:
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        [output] = llm.generate({"prompt_token_ids": list(PROMPT)}, params)
        assert output.outputs[0].token_ids == checkpoints.greedy(directory, PROMPT, TOKENS)
        assert any("can't be read" in line for line in llm.engine.notices) == (name == "proposals that can't be read")
