"""The families that weft runs: a row each, by model type. No torch; knows configurations only.

docs/families.md is made from these rows, and says how one is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.blueprint import Blueprint
from weft.model.closest import closest
from weft.model.family import ACTIVATIONS, SLIDING, Family, Names, NormKind, by_kind, field_value, number


def _root_of_hidden(config: ModelConfig) -> float:
    return float(config.hidden**0.5)


def _scalar(config: ModelConfig) -> float:
    return float(number(config, "query_pre_attn_scalar", 0.0) ** -0.5)


def _divided_logits(config: ModelConfig) -> float:
    return 1.0 / number(config, "logits_scaling", 0.0)


def _rope_layers(config: ModelConfig) -> tuple[bool, ...]:
    return tuple(map(bool, config.fields["no_rope_layers"]))[: config.layers]


def _where_it_slides(config: ModelConfig) -> tuple[bool, ...]:
    sliding = config.fields.get("sliding_window") is not None
    return tuple(sliding and kind == SLIDING for kind in config.fields["layer_types"][: config.layers])


LAYERS = ("layer_types",)
ATTENTION, MLP = {"attention_bias": False}, {"mlp_bias": False}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GLM = {"attention_bias": True, "head_dim": 128, **UNTIED}
FUSED = dict.fromkeys(("queries", "keys", "values"), "self_attn.qkv_proj")
GATE_UP = Names(gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
FOUR_NORMS = Names(
    after_attention="post_attention_layernorm", before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)  # fmt: skip
POST_NORMS = replace(FOUR_NORMS, before_attention="", before_mlp="")
# What several have in common.
BIASED = Family("", qkv_bias="attention_bias", output_bias="attention_bias")
GEMMA = replace(
    BIASED, fields={"hidden_act": "hidden_activation"}, names=FOUR_NORMS, norm=NormKind(offset=1.0), windowed=True,
    derived=LAYERS, embedding_factor=_root_of_hidden, score_factor=_scalar,
    defaults=ATTENTION | TIED | {
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "eos_token_id": 1,
        "sliding_window": 4096,
    },
    neutral={"use_bidirectional_attention": (None, False)},
)  # fmt: skip
GRANITE = replace(
    BIASED, mlp_bias="mlp_bias", embedding_factor=field_value("embedding_multiplier"),
    score_factor=field_value("attention_multiplier"), contribution_factor=field_value("residual_multiplier"),
    logit_factor=_divided_logits,
    defaults=ATTENTION | MLP | {
        "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    },
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": replace(
        BIASED, architecture="LlamaForCausalLM", mlp_bias="mlp_bias",
        defaults=ATTENTION | MLP | UNTIED | {"eos_token_id": 2},
        notes="Llama 2 and 3, SmolLM 2, DeepSeek's distillations, and whoever says llama",
    ),
    "mistral": Family(
        "MistralForCausalLM", windowed=True, wrapped=("mistral3",), defaults=UNTIED | {"eos_token_id": 2},
        notes="Mistral 7B, Nemo, Small; of 3.1 and later the text part",
    ),
    "ministral": Family(
        "MinistralForCausalLM", windowed=True, derived=LAYERS, defaults=UNTIED | {"eos_token_id": 2},
        notes="Ministral 8B of 2024: windows by layer",
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM", windowed=True, wrapped=("mistral3",), own_ropes=True, scaled_queries=True,
        defaults=UNTIED | {"eos_token_id": 2, "head_dim": 128, "sliding_window": None},
        notes="yarn, and queries scaled by position; the text part",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", qkv_bias=True, windowed="use_sliding_window", derived=LAYERS,
        defaults=UNTIED | {"use_sliding_window": False, "eos_token_id": None}, notes="Qwen 2 and 2.5",
    ),
    "qwen3": replace(
        BIASED, architecture="Qwen3ForCausalLM", qk_norm=True, windowed="use_sliding_window", derived=LAYERS,
        defaults=ATTENTION | UNTIED | {"use_sliding_window": False, "eos_token_id": None, "head_dim": 128},
        notes="norms of query and key heads",
    ),
    "gemma2": replace(
        GEMMA, architecture="Gemma2ForCausalLM", softcaps=("attn_logit_softcapping", "final_logit_softcapping"),
        defaults=GEMMA.defaults | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        notes="norms before and after, gain 1 + w, capped scores and logits, every second layer slides",
    ),
    "gemma3_text": replace(
        GEMMA, architecture="Gemma3ForCausalLM", qk_norm=True, ropes_by_kind=True,
        softcaps=("", "final_logit_softcapping"), defaults=GEMMA.defaults | {"final_logit_softcapping": None},
        wrapped=("gemma3",),
        notes="five layers slide to one that doesn't, each kind with a rope of its own; the text part",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", windowed=True, partial=True, names=replace(GATE_UP, **FUSED),
        defaults=UNTIED | {
            "eos_token_id": 32000, "sliding_window": None, "original_max_position_embeddings": 4096,
        },
        notes="Phi-3, 3.5, 4 and 4-mini: one tensor for queries, keys and values, longrope; slides if its file says so",
    ),
    "glm": Family(
        "GlmForCausalLM", formerly=("chatglm",), qkv_bias="attention_bias", partial=True, interleaved=True,
        names=GATE_UP, defaults=GLM,
        notes="GLM-4 9B of 2024: half of each head turns, in neighbours",
    ),
    "glm4": Family(
        "Glm4ForCausalLM", qkv_bias="attention_bias", partial=True, interleaved=True, defaults=GLM,
        names=replace(GATE_UP, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
        notes="GLM-4 of 2025: norms before and after",
    ),
    "olmo2": replace(
        BIASED, architecture="Olmo2ForCausalLM", names=POST_NORMS, qk_norm=True, across=True,
        defaults=ATTENTION | UNTIED | {"eos_token_id": 50279},
        notes="norms after only; those of queries and keys go over all heads, one more small sum a layer",
    ),
    "olmo3": replace(
        BIASED, architecture="Olmo3ForCausalLM", names=POST_NORMS, qk_norm=True, across=True, windowed=True,
        ropes_by_kind=True, derived=LAYERS,
        defaults=ATTENTION | UNTIED | {"eos_token_id": 50279, "sliding_window": 4096},
        notes="the same, and three layers in four slide",
    ),
    "granite": replace(
        GRANITE, architecture="GraniteForCausalLM", defaults=GRANITE.defaults | UNTIED | {"eos_token_id": 2},
        notes="Granite 3 and 4, dense: multipliers of embeddings, scores, contributions and logits",
    ),
    "granite_swa": replace(
        GRANITE, architecture="GraniteSWAForCausalLM", windowed=True, derived=(*LAYERS, "layer_rope_theta"),
        sinks="self_attn.sinks",
        defaults=GRANITE.defaults | TIED | {"eos_token_id": 100257, "sliding_window": 128},
        notes="windows, a base by layer, attention sinks",
    ),
    "smollm3": replace(
        BIASED, architecture="SmolLM3ForCausalLM", mlp_bias="mlp_bias", windowed=True,
        derived=(*LAYERS, "no_rope_layers"), rotates=_rope_layers,
        defaults=ATTENTION | MLP | TIED | {"eos_token_id": 128001, "sliding_window": None},
        notes="every fourth layer without positions",
    ),
    "nemotron": replace(
        BIASED, architecture="NemotronForCausalLM", mlp_bias="mlp_bias", fields={"rms_norm_eps": "norm_eps"},
        norm=NormKind(centred=True, offset=1.0, biased=True), names=Names(gate=""), partial=True,
        defaults=ATTENTION | MLP | UNTIED | {"eos_token_id": 3},
        notes="Nemotron 3 and Minitron: LayerNorm, squared ReLU, no gate",
    ),
    "cohere2": replace(
        BIASED, architecture="Cohere2ForCausalLM", fields={"rms_norm_eps": "layer_norm_eps"},
        norm=NormKind(centred=True), names=Names(before_mlp="input_layernorm"), parallel=True, windowed=True,
        derived=LAYERS, interleaved=True, rotates=_where_it_slides, logit_factor=field_value("logit_scale"),
        defaults=ATTENTION | TIED | {"eos_token_id": 255001, "sliding_window": 4096, "logit_scale": 0.0625},
        notes="Command R7B and A: parallel blocks; layers that see everything have no positions",
    ),
    "gpt_neox": replace(
        BIASED, architecture="GPTNeoXForCausalLM", mlp_bias=True,
        fields={"rms_norm_eps": "layer_norm_eps", "num_key_value_heads": "num_attention_heads"},
        norm=NormKind(centred=True, biased=True), parallel="use_parallel_residual", partial=True, by_head=True,
        own_ropes=True,
        names=Names(
            "gpt_neox.layers.{}.", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", gate="",
            **dict.fromkeys(("queries", "keys", "values"), "attention.query_key_value"), output="attention.dense",
            up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ),
        aliases=(("lm_head.", "embed_out."),),
        defaults=UNTIED | {"attention_bias": True, "use_parallel_residual": True, "eos_token_id": 2},
        notes="GPT-NeoX, Pythia: parallel blocks",
    ),
}  # fmt: skip
# Model types of which several things are a part, with the families that this part may be of.
WRAPPED: dict[str, tuple[str, ...]] = {
    outer: tuple(name for name, family in FAMILIES.items() if outer in family.wrapped)
    for outer in sorted({outer for family in FAMILIES.values() for outer in family.wrapped})
}
ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "factors", "longrope")
# Fields of any family beside which transformers computes otherwise, where they have other values than these.
NEUTRAL: dict[str, tuple[Any, ...]] = {"is_causal": (True,), "per_layer_config": (None, {})}
STRETCHING = ("dynamic", "longrope")  # with the length of a sequence


def family_of(config: ModelConfig, tensors: Callable[[], Iterable[str]] = tuple) -> Family:
    """Its row. Raises `InputError`, saying which one is closest, for one that weft doesn't have. `tensors`: gives names
    of the model's, where they are at hand."""
    family = FAMILIES.get(config.model_type)
    # As in transformers the type counts, not what of it was saved, as long as the checkpoint has no code of its own.
    if family is None or (config.fields.get("auto_map") and config.architecture not in ("", family.architecture)):
        given = config.architecture or config.model_type
        told = closest(config.fields, FAMILIES, tensors())
        known = ", ".join(FAMILIES)
        raise InputError(f"the architecture {given} ({config.model_type}) is not known; {told}; known are {known}")
    return family


def blueprint_of(config: ModelConfig) -> Blueprint:
    """What the model consists of. Raises `InputError`, saying what is known, for anything weft can't run."""
    family = family_of(config)
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"the activation {config.activation!r} is not known; known are {known}")
    for name, values in (NEUTRAL | dict(family.neutral)).items():
        if name in config.fields and (value := config.fields[name]) not in values:
            raise InputError(f"{family.architecture} with {name} {value!r} computes what weft doesn't: it can't be run")
    blueprint = family.declare(config, family)
    for rope in blueprint.ropes:
        kind = rope.get("rope_type", "default")
        if kind not in ROPES or (kind in STRETCHING and by_kind(config.fields.get("rope_parameters") or {})):
            raise InputError(f"the rope scaling {kind!r} is not known; known are {', '.join(ROPES)}")
    return blueprint
