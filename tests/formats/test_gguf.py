"""GGUF models: the tensors that are in the files, and the logits that transformers computes from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from tests.formats.gguf_files import HALVES, WRITTEN, bytes_only, held, plain, write
from tests.processes import weft
from tests.ranks import Ranks
from tests.tiny import SMALL, random_model
from weft.errors import InputError
from weft.model.configuration import configured
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.opening import open_model

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
        "initializer_range": 0.08, "vocab_size": 258}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * n for n in range(16)],
        "long_factor": [2.0 + n for n in range(16)]}  # fmt: skip
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.25, "attention_multiplier": 0.125,
           "logits_scaling": 4.0}  # fmt: skip


def by_kind(**full: Any) -> dict[str, Any]:
    """Ropes of layers that see everything, and of those that slide."""
    return {"rope_parameters": {"full_attention": full, "sliding_attention": PLAIN}}


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", {}),
    "llama-tied-biased": ("Llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-3": ("Llama", "llama", {"rope_parameters": LLAMA3}),
    "llama-odd": ("Llama", "llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 96}),
    "mistral": ("Mistral", "llama", {"sliding_window": None}),
    "mistral-window": ("Mistral", "llama", {"sliding_window": 40}),
    "qwen2": ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 64}),
    "gemma2": ("Gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40}),
    "gemma2-27b": ("Gemma2", "gemma2", {
        "head_dim": 16, "query_pre_attn_scalar": 32, "sliding_window": 40, "num_hidden_layers": 46,
        "initializer_range": 0.03,
    }),
    "gemma3": ("Gemma3", "gemma3", {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40, "num_hidden_layers": 6,
        **by_kind(rope_type="linear", rope_theta=1e6, factor=8.0),
    }),
    "phi3": ("Phi3", "phi3", {
        "sliding_window": 50, "tie_word_embeddings": True, "rope_parameters": PLAIN | {"partial_rotary_factor": 0.75},
    }),
    "phi3-long": ("Phi3", "phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}),
    "glm": ("Glm", "chatglm", {"head_dim": 32}),
    "glm4": ("Glm4", "glm4", {"head_dim": 32}),
    "olmo2": ("Olmo2", "olmo2", {}),
    "olmo3": ("Olmo3", "olmo2", {
        "num_hidden_layers": 4, "sliding_window": 40, **by_kind(**YARN, factor=4.0, attention_factor=1.25),
    }),
    "granite": ("Granite", "granite", FACTORS | {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", "smollm3", {"num_hidden_layers": 4}),
    "nemotron": ("Nemotron", "nemotron", {}),
    "ministral3": ("Ministral3", "mistral3", {"head_dim": 32, "rope_parameters": YARN | {
        "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }}),
    "mistral3": ("Mistral", "mistral3", {"sliding_window": None}),
    "olmo3-plain": ("Olmo3", "olmo2", {"num_hidden_layers": 4, "sliding_window": 40, **by_kind(**YARN, factor=4.0)}),
    "cohere2": ("Cohere2", "cohere2", {"num_hidden_layers": 4, "sliding_window": 40}),
    "gpt_neox": ("GPTNeoX", "gptneox", {}),
    "gpt_neox-serial": ("GPTNeoX", "gptneox", {"use_parallel_residual": False}),
}  # fmt: skip
PROMPT = tuple(torch.randint(0, 258, (90,), generator=torch.Generator().manual_seed(4)).tolist())


@cache
def tiny(name: str) -> Any:
    """transformers' own model."""
    family, _, changes = FAMILIES[name]
    return random_model(family, SMALL | WIDE | changes)


def written(path: Path, name: str, choice: Any = "F32", **options: Any) -> Path:
    """The model as a file, with a tokenizer."""
    model, arch = tiny(name), FAMILIES[name][1]

    def more(writer: gguf.GGUFWriter) -> None:
        bytes_only(writer)
        if getattr(model.config, "sliding_window", None):
            writer.add_sliding_window(model.config.sliding_window)
        if name == "llama-3":
            writer.add_tensor("rope_freqs.weight", factors(model).numpy(), raw_dtype=Type.F32)
        said(writer, model.config)

    return write(path, model, arch, choice, more, **options)


def said(writer: gguf.GGUFWriter, config: Any) -> None:
    """What convert_hf_to_gguf.py says of some architectures besides."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    scaling(writer, config, rope)
    own: dict[str, Callable[[], Any]] = {
        "gemma2": lambda: (
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping),
            writer.add_final_logit_softcapping(config.final_logit_softcapping),
        ),
        "gemma3_text": lambda: writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"]),
        "olmo3": lambda: writer.add_sliding_window_pattern([k == "sliding_attention" for k in config.layer_types]),
        "granite": lambda: (
            writer.add_attention_scale(config.attention_multiplier),
            writer.add_embedding_scale(config.embedding_multiplier),
            writer.add_residual_scale(config.residual_multiplier), writer.add_logit_scale(config.logits_scaling),
        ),
        "ministral3": lambda: (
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"]),
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"]),
        ),
        "cohere2": lambda: writer.add_logit_scale(config.logit_scale),
        "gpt_neox": lambda: writer.add_parallel_residual(config.use_parallel_residual),
    }  # fmt: skip
    own.get(config.model_type, lambda: None)()


def scaling(writer: gguf.GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    """Of rotary positions."""
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn" and rope.get("attention_factor") is not None:
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        for length in ("long", "short"):
            values = torch.tensor(rope[f"{length}_factor"]).numpy()
            writer.add_tensor(f"rope_factors_{length}.weight", values, raw_dtype=Type.F32)


def factors(model: Any) -> torch.Tensor:
    """What convert_hf_to_gguf.py stores of Llama 3's scaling."""
    rope, width = model.config.rope_parameters, model.config.hidden_size // model.config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return frequencies / model.model.rotary_emb.inv_freq


def dequantised(path: Path, name: str) -> Any:
    """transformers' model with the file's numbers."""
    model = type(tiny(name))(tiny(name).config).eval()
    tensors = held(path, tiny(name), FAMILIES[name][1])
    left = model.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def demand_tensors(path: Path, name: str) -> None:
    """That all are what the package reads, whole and in parts that end anywhere."""
    config = model_config(path)
    checkpoint = open_model(path, config)
    tensors = held(path, tiny(name), FAMILIES[name][1])
    assert set(tensors) <= set(blueprint_of(config).tensors) and not checkpoint.unexpected(blueprint_of(config).tensors)
    for tensor, values in tensors.items():
        assert checkpoint.shape(tensor) == list(values.shape), tensor
        assert torch.equal(checkpoint.read(tensor).numbers(torch.float32), values), tensor
        count = values.shape[0]
        for rows in (range(count // 3, count - 1), range(0, 0), range(count - 1, count)):
            part = checkpoint.read(tensor, rows=rows).numbers(torch.float32)
            assert torch.equal(part, values[rows.start : rows.stop]), (tensor, rows)
        for columns in (range(17, 111), range(33, 33), range(0, 1)) if values.dim() == 2 else ():
            part = checkpoint.read(tensor, columns=columns).numbers(torch.float32)
            assert torch.equal(part, values[:, columns.start : columns.stop]), (tensor, columns)


def demand_logits(path: Path, name: str, shares: tuple[float, ...]) -> None:
    with torch.no_grad():
        expected = dequantised(path, name)(torch.tensor([PROMPT])).logits[0, -1]
    ranks = Ranks(path, shares)
    try:
        found = ranks.logits([PROMPT], "serial" if len(shares) == 1 else "iso:2")[0]
    finally:
        ranks.close()
    assert float((found - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


@pytest.mark.parametrize("kind", [*WRITTEN, *HALVES])
def test_every_type(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"tiny.{kind}.gguf", "llama", kind)
    demand_tensors(path, "llama")
    if kind not in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"):  # random ones of these say nothing
        demand_logits(path, "llama", (1.0,))


def mixed(name: str, shape: tuple[int, ...]) -> str:
    """As Q4_K_M is."""
    kind = "Q6_K" if "down" in name or "v_proj" in name else "Q8_0" if "embed" in name else "Q4_K"
    return plain(name, shape, kind)


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("shares", [(1.0,), (1.0, 1.0), (3.0, 1.0, 2.0)])
def test_families(name: str, shares: tuple[float, ...], tmp_path: Path) -> None:
    """Ranks' parts end within blocks."""
    kinds = {"llama": mixed, "qwen2": "Q5_0", "qwen3": mixed}.get(name, "Q8_0")
    path = written(tmp_path / "tiny.gguf", name, kinds)
    demand_tensors(path, name)
    demand_logits(path, name, shares)


def test_the_configuration_is_what_transformers_has(tmp_path: Path) -> None:
    for name in FAMILIES:
        found, config = model_config(written(tmp_path / f"{name}.gguf", name)), tiny(name).config
        expected = "llama" if name == "mistral" else config.model_type
        assert found.model_type == expected and found.tied_embeddings == config.tie_word_embeddings
        assert found.layers == config.num_hidden_layers
        assert (found.hidden, found.intermediate) == (config.hidden_size, config.intermediate_size)
        groups = config.num_attention_heads if expected == "gpt_neox" else config.num_key_value_heads
        assert (found.heads, found.kv_heads) == (config.num_attention_heads, groups)
        assert found.vocabulary == config.vocab_size and found.max_length == config.max_position_embeddings
        saved = json.loads(config.to_json_string(use_diff=False))
        theirs = blueprint_of(configured(saved | {"model_type": found.model_type}))
        assert blueprint_of(found).windows == theirs.windows and blueprint_of(found).turned == theirs.turned
        assert blueprint_of(found).layer == theirs.layer and blueprint_of(found).norm == theirs.norm


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_rope_scalings(scaling: str, tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(256)

    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 256} if scaling == "yarn" else {}
    model = tiny("llama")
    path = write(tmp_path / "tiny.gguf", model, "llama", "F32", more)
    assert model_config(path).fields["rope_parameters"] == rope
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "rope_parameters": rope})
    other = transformers.LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = other(torch.tensor([PROMPT])).logits[0, -1]
    ranks = Ranks(path, (1.0,))
    found = ranks.logits([PROMPT], "serial")[0]
    ranks.close()
    assert float((found - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


def test_rope_scalings_without_a_type_are_linear(tmp_path: Path) -> None:
    """As in llama.cpp; and with Llama 3's factors beside them they are refused."""
    for key, value, rope in (
        ("rope.scaling.factor", 4.0, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ("rope.scale_linear", 2.0, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        ("rope.scaling.factor", 1.0, {"rope_type": "default", "rope_theta": 10000.0}),
    ):
        path = write(tmp_path / "a.gguf", tiny("llama"), "llama", "F32",
                     lambda w, key=key, value=value: w.add_float32(f"llama.{key}", value))  # fmt: skip
        assert model_config(path).fields["rope_parameters"] == rope

    def both(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_tensor("rope_freqs.weight", factors(tiny("llama-3")).numpy(), raw_dtype=Type.F32)

    path = write(tmp_path / "a.gguf", tiny("llama-3"), "llama", "F32", both)
    with pytest.raises(InputError, match=r"has both rope_freqs.weight and a rope scaling, linear"):
        model_config(path)


def test_split_files(tmp_path: Path) -> None:
    """Named and numbered as gguf-split has them; any of them may be given."""
    written(tmp_path / "tiny.gguf", "llama", "Q8_0", split_max_tensors=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2 and parts[0].name.startswith("tiny-00001-of-")
    whole = written(tmp_path / "whole.gguf", "llama", "Q8_0")
    expected = held(whole, tiny("llama"), "llama")
    for given in (parts[0], parts[-1]):
        checkpoint = open_model(given, model_config(given))
        assert all(torch.equal(checkpoint.read(n).numbers(torch.float32), v) for n, v in expected.items())
        assert model_config(given).layers == 2
    Ranks(parts[1], (1.0, 1.0)).close()
    parts[1].unlink()
    with pytest.raises(InputError, match=rf"{parts[1].name} is missing, and {parts[0].name} is a part of the same"):
        model_config(parts[0])


def test_parts_that_were_renamed(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf", "llama", "Q8_0", split_max_tensors=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(InputError, match=rf"is one of {len(parts)} files, by what it says, and named as one of 1"):
        model_config(alone)
    parts[1].rename(parts[0])
    parts[2].rename(parts[1])
    alone.rename(parts[2])
    with pytest.raises(InputError, match="is one of|says that it is not part|split.count"):
        model_config(parts[0])


def test_from_the_file_to_an_answer(tmp_path: Path) -> None:
    """Tokenizer, chat template and end tokens are in it too."""
    path = written(tmp_path / "tiny.Q4_1.gguf", "llama", "Q4_1")
    alone, split = (
        weft("generate", str(path), "some text", "--tp", ranks, "--threads", "1", "--max-tokens", "6",
             "--temperature", "0", "--overlap", "serial", "--json").stdout
        for ranks in ("1", "2")
    )  # fmt: skip
    ids = [json.loads(said)["token_ids"] for said in (alone, split)]
    assert len(ids[0]) == 6 and ids[0] == ids[1]


def refused(path: Path, more: Any, name: str = "llama", arch: str = "llama") -> str:
    """Why a file with something more in it isn't run."""
    write(path, tiny(name), arch, "F32", more)
    with pytest.raises(InputError) as told:
        config = model_config(path)
        missing = open_model(path, config).unexpected(blueprint_of(config).tensors)
        raise InputError(f"unexpected {missing}") if missing else AssertionError
    assert ("\n" not in str(told.value) and str(path) in str(told.value)) or "unexpected" in str(told.value)
    return str(told.value)


def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    assert "has experts" in refused(path, lambda w: w.add_expert_count(8))
    assert "the rope scaling 'longrope' is not known" in refused(
        path, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    )
    assert "has a sliding window of 64" in refused(path, lambda w: w.add_sliding_window(64), "qwen2", "qwen2")
    assert "does not say its factor" in refused(path, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    assert "has logit_scale" in refused(path, lambda w: w.add_logit_scale(0.5))
    assert "has attention.scale" in refused(path, lambda w: w.add_float32("llama.attention.scale", 0.1))
    many = "has 300 tokens, and embeddings for 258"
    assert many in refused(path, lambda w: w.add_token_list([str(n) for n in range(300)]))
    extra = torch.zeros(256).numpy()
    assert "blk.0.attn_q.bias" in refused(path, lambda w: w.add_tensor("blk.0.attn_q.bias", extra))
    assert "blk.0.ffn_gate_inp.weight" in refused(path, lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", extra))


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="the architecture 'mamba' is not known in GGUF; known are llama, qwen2"):
        model_config(tmp_path / "x.gguf")


def test_memory_while_loading_is_the_shard_and_a_tenth(tmp_path: Path) -> None:
    """A file of 8 bits becomes four times as many bytes, and not more meanwhile."""
    changes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 258}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **WIDE, **changes}))
    path = write(tmp_path / "large.gguf", model, "llama", "Q8_0", bytes_only)
    from weft.opening import open_engine

    open_engine(path, overlap="serial", max_length=64, threads=1, weights="float32").close()  # tries kernels
    engine = open_engine(path, overlap="serial", max_length=64, threads=1, weights="float32")
    try:
        [loaded] = engine.workers.started.loaded
    finally:
        engine.close()
    assert loaded.weights > 200e6 and loaded.peak < 1.1 * loaded.weights
