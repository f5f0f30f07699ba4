"""What is said of an architecture that isn't known: the closest one that is, and what that lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.processes import weft
from tests.tiny import SMALL, Checkpoints
from weft.errors import InputError
from weft.formats.names import MOST_TENSORS, tensor_names
from weft.model.closest import closest
from weft.model.configuration import configured
from weft.model.description import model_config
from weft.model.families import FAMILIES, blueprint_of


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("mixtral", "istral"), ("mixtral", "differs by experts (num_local_experts, num_experts_per_tok)"),
        ("qwen3_moe", "Qwen3ForCausalLM (qwen3), from which it differs by experts"),
        ("granitemoe", "GraniteForCausalLM"), ("deepseek_v3", "latent attention (MLA) (kv_lora_rank"),
        ("jamba", "state-space or linear-attention layers"), ("lfm2", "layers (conv_L_cache)"),
        ("qwen3_next", "layers of another kind (linear_attention)"), ("apertus", "by the activation xielu"),
        ("starcoder2", "by LayerNorm"), ("gpt2", "by learned positions (n_positions"),
        ("cohere", "Cohere2ForCausalLM (cohere2); nothing tells where it differs"),
        ("gemma3n_text", "Gemma3ForCausalLM (gemma3_text), from which it differs by layers that share keys and values"),
        ("llama4_text", "attention in chunks (attention_chunk_size)"), ("t5", "by an encoder"),
        ("mamba", "says too little"),
    ],
)  # fmt: skip
def test_by_the_configuration(kind: str, told: str) -> None:
    assert told in closest(CONFIG_MAPPING[kind]().to_dict(), FAMILIES)


def saved(path: Path, family: str, **sizes: Any) -> Path:
    """A tiny model of a family that weft doesn't have, as transformers saves it."""
    config = getattr(transformers, f"{family}Config")(**SMALL | sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
    return path


ABSENT = "tensors that that one wants and that aren't there"


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("Starcoder2", ("MistralForCausalLM (mistral), from which it differs by LayerNorm, ",
                        "tensors that that one has no use for (mlp.c_fc, mlp.c_proj), ",
                        f"{ABSENT} (mlp.down_proj, mlp.gate_proj, mlp.up_proj)")),
        ("Mixtral", ("experts", "(block_sparse_moe.experts.*.w1, ", f"{ABSENT} (mlp.down_proj, mlp.gate_proj, ")),
        ("SeedOss", ("LlamaForCausalLM (llama), with tensors of the same names; nothing tells where it differs",)),
        ("Exaone4", ("Olmo3ForCausalLM (olmo3)",)),
    ],
)  # fmt: skip
def test_by_the_tensors(family: str, told: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        model_config(saved(tmp_path / "model", family))
    assert all(part in str(error.value) for part in told) and "\n" not in str(error.value), error.value


def test_by_the_tensors_of_several_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(tmp_path / "model", "Starcoder2")
    names = [*transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()]
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    said = weft("doctor", str(path), code=2).stderr
    assert "closest by its tensors" in said and "mlp.c_fc" in said


def test_names_are_read_where_they_are_needed_and_with_limits(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = b"[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert tensor_names(tmp_path) == []
    many = json.dumps({f"model.layers.{n}.x.weight": {} for n in range(MOST_TENSORS + 1)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(many).to_bytes(8, "little") + many)
    assert tensor_names(tmp_path) == []
    monkeypatch.setattr("weft.model.description.tensor_names", lambda path: pytest.fail("the family is known"))
    model_config(checkpoints.directory("llama"))


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0{}"])
def test_files_that_can_not_be_read_are_for_others_to_complain_of(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING["cohere"]().to_dict()))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="closest by its configuration is Cohere2"):
        model_config(tmp_path)


def test_in_gguf(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "starcoder2")
    for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "odd"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros(32, np.float32), raw_dtype=Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError) as told:
        model_config(tmp_path / "a.gguf")
    said = "is chatglm or nemotron, from which it differs by tensors that that one has no use for (odd); known are"
    assert f"'starcoder2' is not known in GGUF; closest by its tensors {said}" in str(told.value)


def test_a_form_with_code_of_its_own() -> None:
    raw = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": {"AutoModel": "x.Y"}}
    with pytest.raises(InputError, match="it is GlmForCausalLM .glm. in a form with code of its own"):
        blueprint_of(configured(raw))
