"""What an unknown model's configuration is closest to, and what of it no known family has. Knows fields; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from weft.model.family import ACTIVATIONS, KINDS, Family

# What a field with any other value than these tells of, and weft hasn't.
ABSENT: tuple[Any, ...] = (None, False, 0, 0.0, [], {}, 1)
MISSING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("experts",
     ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")),
    ("latent attention (MLA)", ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")),
    ("state-space or linear-attention layers",
     ("mamba_d_state", "ssm_state_size", "state_size", "mamba_expand", "linear_num_value_heads", "linear_key_head_dim",
      "time_step_rank", "conv_kernel", "conv_L_cache", "lru_width", "attn_layer_period", "hybrid_override_pattern",
      "wkv_head_size")),
    ("an encoder", ("is_encoder_decoder", "encoder_layers", "num_encoder_layers", "encoder", "num_decoder_layers")),
    ("ALiBi", ("alibi", "use_alibi")),
    ("attention in chunks", ("attention_chunk_size",)),
    ("clamped queries, keys and values", ("clip_qkv",)),
    ("a part besides text", ("vision_config", "audio_config", "speech_config")),
    ("layers that share keys and values", ("num_kv_shared_layers", "cla_share_factor")),
    ("embeddings of each layer", ("hidden_size_per_layer_input",)),
    ("attention that sees what follows", ("use_bidirectional_attention",)),
)  # fmt: skip
LAYER_NORMS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
LEARNED = ("n_positions", "n_ctx", "relative_attention_num_buckets")
ROTARY = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_dim", "partial_rotary_factor")
SOME = 4  # names that are told


def closest(fields: Mapping[str, Any], families: Mapping[str, Family], tensors: Iterable[str] = ()) -> str:
    """The known architecture that says most of what this one says, in its configuration or, where they are at hand, by
    the names of a layer's tensors; and where this one differs."""
    inner = fields.get("text_config")
    flat = {**inner, **fields} if isinstance(inner, dict) else dict(fields)
    for name, family in families.items():
        if fields.get("model_type") in family.formerly:
            return f"it is {family.architecture} ({name}) in a form with code of its own; give the form without"
    layer = layer_of(tensors)
    if not layer and not {"num_attention_heads", "n_head", "num_heads"} & set(flat):
        return "its configuration says too little to tell which known one is closest"
    names = {each: layer_names(family) for each, family in families.items()}
    name = max(names, key=lambda each: (len(layer & names[each]), _alike(flat, each, families[each])))
    told = f"closest by its {'tensors' if layer else 'configuration'} is {families[name].architecture} ({name})"
    differs = [*missing(flat), *_other_norm(flat, families[name])]
    if layer and (more := layer - names[name]):
        differs.append(f"tensors that that one has no use for ({some_of(more)})")
    if layer and (less := _needed(families[name]) - layer):
        differs.append(f"tensors that that one wants and that aren't there ({some_of(less)})")
    if differs:
        return f"{told}, from which it differs by {', '.join(differs)}"
    return f"{told}{', with tensors of the same names' if layer else ''}; nothing tells where it differs"


def _other_norm(fields: Mapping[str, Any], family: Family) -> list[str]:
    return ["LayerNorm"] if {*LAYER_NORMS} & set(fields) and not family.norm.centred else []


def layer_of(tensors: Iterable[str]) -> set[str]:
    """Of the first layer, what follows the layer's own prefix, without .weight and .bias."""
    parts = (re.fullmatch(r"\D*\.0\.(.+)\.(?:weight|bias)", name) for name in tensors)
    return {re.sub(r"\.\d+\.", ".*.", part[1]) for part in parts if part is not None}


def layer_names(family: Family) -> set[str]:
    """All that a layer may have."""
    names = family.names
    found = {names.before_attention, names.queries, names.keys, names.values, names.output, names.after_attention,
             names.before_mlp, names.gate, names.up, names.down, names.after_mlp}  # fmt: skip
    return (found | ({names.query_norm, names.key_norm} if family.qk_norm else set())) - {""}


def _needed(family: Family) -> set[str]:
    """All but what a flag of the configuration may leave out."""
    names = family.names
    return layer_names(family) - ({names.query_norm, names.key_norm} if isinstance(family.qk_norm, str) else set())


def some_of(names: Collection[str]) -> str:
    """The first few, for people."""
    some = sorted(names)
    return ", ".join(some[:SOME]) + (f" and {len(some) - SOME} more" if len(some) > SOME else "")


def missing(fields: Mapping[str, Any]) -> list[str]:
    """What the fields tell of that no known family has, or that one has not, with the fields."""
    found = []
    for what, names in MISSING:
        there = [name for name in names if fields.get(name) not in ABSENT]
        found += [f"{what} ({', '.join(there)})"] if there else []
    kinds = fields.get("layer_types")
    others = sorted({str(kind) for kind in kinds if kind not in KINDS}) if isinstance(kinds, list) else []
    found += [f"layers of another kind ({', '.join(others)})"] if others else []
    learned = [name for name in LEARNED if name in fields] if not {*ROTARY} & set(fields) else []
    found += [f"learned positions ({', '.join(learned)})"] if learned else []
    activation = fields.get("hidden_act") or fields.get("hidden_activation")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        found.append(f"the activation {activation}")
    return found


def _alike(fields: Mapping[str, Any], name: str, family: Family) -> tuple[float, int]:
    """How much a family's own fields say here, and how much of its name."""
    own = {*family.fields.values(), *family.defaults, *family.derived, *family.neutral, *filter(None, family.softcaps)}
    flags = (family.qkv_bias, family.output_bias, family.mlp_bias, family.qk_norm, family.parallel, family.windowed)
    own |= {flag for flag in flags if isinstance(flag, str)}
    own |= {"partial_rotary_factor"} if family.partial else set()
    there = sum(field in fields for field in own)
    stem = str(fields.get("model_type", "")).lower().replace("_", "").replace("-", "")
    known = name.replace("_", "")
    common = next((n for n in range(min(len(stem), len(known)), 0, -1) if stem[:n] == known[:n]), 0)
    return (3.0 * (common >= 4) * common + 2 * there - len(own), common)
