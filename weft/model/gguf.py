"""How the families are stored in GGUF: a row each, and what of their configurations is said otherwise there, or only
known to whoever runs them. No torch.

Sources: llama.cpp's converter (what is written) and loaders (what is taken for granted).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from weft.errors import InputError
from weft.formats.gguf.architectures import FACTORS, LAYER_NAMES, Architecture, Keys, architecture_of, sliding
from weft.formats.gguf.files import GgufFiles
from weft.model.closest import layer_names, some_of
from weft.model.families import FAMILIES
from weft.model.family import KINDS

PAIRS = ("attn_q", "attn_k")
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
LAYER_NORM = "attention.layer_norm_epsilon"
ATTENTION_BIAS, MLP_BIAS = ("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_down.bias")
QUERY_BIAS = ("attention_bias", "blk.0.attn_q.bias")
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
GATE_UP = {"mlp.gate_up_proj": "ffn_up"}


def _windowed(keys: Keys) -> bool:
    return keys.whole(WINDOW, 0) > 0


def _window(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": keys.whole(WINDOW)}


def _gemma2(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """Of scores, what they are divided by is told from the number of layers: the 27B's differs."""
    layers, heads = given["num_hidden_layers"], given["num_attention_heads"]
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {
        "query_pre_attn_scalar": given["hidden_size"] // heads if layers == 46 else given["head_dim"],
        **{name: keys.get(name, float, usual) or None for name, usual in caps.items()},
        **sliding(keys, layers, 2),
    }


def _gemma3(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """Likewise; and sliding layers turn by a base of their own, unscaled."""
    layers, heads = given["num_hidden_layers"], given["num_attention_heads"]
    near = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", float, 10000.0)}
    return {
        "query_pre_attn_scalar": given["hidden_size"] // heads if layers == 62 else given["head_dim"],
        "final_logit_softcapping": keys.get("final_logit_softcapping", float, 0.0) or None,
        "rope_parameters": {"full_attention": given["rope_parameters"], "sliding_attention": near},
        **sliding(keys, layers, 6),
    }


def _phi3(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    window = {"sliding_window": keys.whole(WINDOW, 0) or None}
    if LONG not in given and SHORT not in given:
        return window
    if LONG not in given or SHORT not in given:
        raise InputError(f"{keys.header.path} has one of {LONG} and {SHORT}, and not the other; download it again")
    original = keys.whole("rope.scaling.original_context_length", given["max_position_embeddings"])
    rope = given["rope_parameters"] | {
        "rope_type": "longrope", "short_factor": given[SHORT], "long_factor": given[LONG],
        "original_max_position_embeddings": original,
        "attention_factor": keys.get("rope.scaling.attn_factor", float, 1.0),
    }  # fmt: skip
    return window | {"rope_parameters": rope, "original_max_position_embeddings": original}


def _olmo3(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """Sliding layers turn unscaled."""
    rope = given["rope_parameters"]
    near = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    ropes = {"full_attention": rope, "sliding_attention": near}
    return {"rope_parameters": ropes, **sliding(keys, given["num_hidden_layers"], 4)}


def _granite(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """Factors of 0 are none."""
    if keys.there("rope.scaling.finetuned") is False:
        raise InputError(f"{keys.header.path} has no rotary positions, which weft can't run in GGUF's granite")
    return {
        "attention_multiplier": keys.get("attention.scale", float, 0.0) or given["head_dim"] ** -0.5,
        "embedding_multiplier": keys.get("embedding_scale", float, 0.0) or 1.0,
        "residual_multiplier": keys.get("residual_scale", float, 0.0) or 1.0,
        "logits_scaling": keys.number("logit_scale"),
    }


def _smollm3(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    layers = range(given["num_hidden_layers"])
    return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers], "layer_types": [KINDS[0]] * len(layers)}


def _ministral3(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """Makers of files that don't say how attention's temperature goes with yarn meant that it doesn't."""
    rope = dict(given["rope_parameters"])
    beta = keys.get("attention.temperature_scale", float, 0.0)
    if beta:
        original = keys.whole("rope.scaling.original_context_length", given["max_position_embeddings"])
        rope |= {"llama_4_scaling_beta": beta, "original_max_position_embeddings": original}
    if rope["rope_type"] == "yarn":
        rope |= {"mscale": 1.0, "mscale_all_dim": keys.get("rope.scaling.yarn_log_multiplier", float, 1.0)}
    return {"rope_parameters": rope, "sliding_window": None}


def _nemotron(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """Half of each head turns; where heads are not as wide as hidden_size has it, converters count by that all the
    same."""
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    if given["head_dim"] == hidden // heads or keys.whole("rope.dimension_count", 0) != hidden // 2 // heads:
        return {}
    return {"rope_parameters": given["rope_parameters"] | {"partial_rotary_factor": 0.5}}


def _cohere2(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    return {"logit_scale": keys.number("logit_scale"), **sliding(keys, given["num_hidden_layers"], 4)}


def _gpt_neox(keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    parallel = keys.get("use_parallel_residual", bool)
    if parallel is None:
        raise InputError(f"{keys.header.path} does not say gptneox.use_parallel_residual; download another file")
    return {"use_parallel_residual": parallel, "attention_bias": True}


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "mistral", _windowed, interleaved=PAIRS, reads=(WINDOW,), fields=_window),
    Architecture("llama", "llama", interleaved=PAIRS, biased=(ATTENTION_BIAS, MLP_BIAS)),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3", biased=(ATTENTION_BIAS,)),
    Architecture(
        "gemma2", "gemma2", activation="gelu_pytorch_tanh", more_by_one=True, names=FOUR_NORMS, fields=_gemma2,
        reads=(WINDOW, PATTERN, "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    Architecture(
        "gemma3", "gemma3_text", activation="gelu_pytorch_tanh", more_by_one=True, names=FOUR_NORMS, fields=_gemma3,
        reads=(WINDOW, PATTERN, "final_logit_softcapping"),
    ),
    Architecture(
        "phi3", "phi3", partial=True, names={"self_attn.qkv_proj": "attn_qkv"} | GATE_UP, fields=_phi3,
        reads=(WINDOW, "rope.scaling.attn_factor"), lists=(FACTORS, LONG, SHORT),
    ),
    Architecture("chatglm", "glm", partial=True, names=GATE_UP, biased=(QUERY_BIAS,)),
    Architecture(
        "glm4", "glm4", partial=True, biased=(QUERY_BIAS,),
        names=GATE_UP | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    ),
    Architecture("olmo2", "olmo3", _windowed, names=FOUR_NORMS, reads=(WINDOW, PATTERN), fields=_olmo3),
    Architecture("olmo2", "olmo2", names=FOUR_NORMS),
    Architecture(
        "granite", "granite", interleaved=PAIRS, biased=(ATTENTION_BIAS, MLP_BIAS), fields=_granite,
        reads=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
    ),
    Architecture("smollm3", "smollm3", interleaved=PAIRS, biased=(ATTENTION_BIAS, MLP_BIAS), fields=_smollm3),
    Architecture(
        "nemotron", "nemotron", epsilon=LAYER_NORM, activation="relu2", more_by_one=True, partial=True,
        biased=(ATTENTION_BIAS, MLP_BIAS), fields=_nemotron,
    ),
    Architecture(
        "mistral3", "ministral3", lambda keys: bool(keys.there("attention.temperature_scale")), interleaved=PAIRS,
        fields=_ministral3, reads=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
    ),
    Architecture("mistral3", "mistral", interleaved=PAIRS, fields=lambda keys, given: {"sliding_window": None}),
    Architecture(
        "cohere2", "cohere2", epsilon=LAYER_NORM, reads=(WINDOW, PATTERN, "logit_scale"), fields=_cohere2,
    ),
    Architecture(
        "gptneox", "gpt_neox", epsilon=LAYER_NORM, activation="gelu", partial=True, by_head=("attn_qkv",),
        layer="gpt_neox.layers.", fields=_gpt_neox, reads=("use_parallel_residual",),
        ends={"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "lm_head": "output"},
        names={
            "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
    ),
)  # fmt: skip


def gguf_fields(path: Path) -> dict[str, Any]:
    """What a file says, as a config.json of its family would. Raises `InputError`."""
    files = GgufFiles(path)
    row = architecture_of(files.header, ARCHITECTURES, lambda: _closest([*files.tensors]))
    fields = files.configuration(row)
    return {FAMILIES[row.family].fields.get(name, name): value for name, value in fields.items()}


def _closest(tensors: Collection[str]) -> str:
    """The architecture that has most of the tensors of a layer, and where they differ."""
    layer = {name.removeprefix("blk.0.").rpartition(".")[0] for name in tensors if name.startswith("blk.0.")}
    own = [_parts(row) for row in ARCHITECTURES]
    best = [(len(layer & each), -len(each)) for each in own]
    at = best.index(max(best))
    if not layer & own[at]:
        return ""
    alike = dict.fromkeys(row.name for row, each in zip(ARCHITECTURES, own, strict=True) if each == own[at])
    kinds = (("has no use for", layer - own[at]), ("wants and that aren't there", own[at] - layer))
    differs = ", ".join(f"tensors that that one {what} ({some_of(names)})" for what, names in kinds if names)
    told = f"; closest by its tensors is {' or '.join(alike)}"
    return f"{told}, from which it differs by {differs}" if differs else f"{told}; nothing tells where it differs"


def _parts(row: Architecture) -> set[str]:
    """What the tensors of a layer are called."""
    return {row.names.get(name) or LAYER_NAMES.get(name, name) for name in layer_names(FAMILIES[row.family])}
