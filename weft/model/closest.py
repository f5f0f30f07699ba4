"""What an unknown model's configuration is closest to, and what of it no known family has. Knows fields; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.model.family import ACTIVATIONS, Family

# What a field with any other value than these tells of, and weft hasn't.
ABSENT: tuple[Any, ...] = (None, False, 0, 0.0, [], {}, 1)
MISSING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("experts",
     ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")),
    ("latent attention (MLA)", ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")),
    ("state-space or linear-attention layers",
     ("mamba_d_state", "ssm_state_size", "state_size", "mamba_expand", "linear_num_value_heads", "linear_key_head_dim",
      "time_step_rank", "conv_kernel", "lru_width", "attn_layer_period", "hybrid_override_pattern", "wkv_head_size")),
    ("an encoder", ("is_encoder_decoder", "encoder_layers", "num_encoder_layers", "encoder")),
    ("ALiBi", ("alibi", "use_alibi")),
    ("attention in chunks", ("attention_chunk_size",)),
    ("clamped queries, keys and values", ("clip_qkv",)),
    ("a part besides text", ("vision_config", "audio_config", "speech_config")),
    ("layers that share keys and values", ("num_kv_shared_layers", "cla_share_factor")),
    ("embeddings of each layer", ("hidden_size_per_layer_input",)),
    ("attention that sees what follows", ("use_bidirectional_attention",)),
)  # fmt: skip
LAYERS = ("full_attention", "sliding_attention")


def closest(fields: Mapping[str, Any], families: Mapping[str, Family]) -> str:
    """The known architecture whose configuration says most of what this one says, and what it has beside."""
    inner = fields.get("text_config")
    flat = {**inner, **fields} if isinstance(inner, dict) else dict(fields)
    name = max(families, key=lambda each: _alike(flat, each, families[each]))
    lacking = list(missing(flat))
    told = f"the closest that is, by its configuration, is {families[name].architecture}"
    if lacking:
        return f"{told}, and missing are {', '.join(lacking)}"
    return f"{told}, and nothing tells what would be missing: if it is one under another name, say model_type {name!r}"


def missing(fields: Mapping[str, Any]) -> list[str]:
    """What the fields tell of that no known family has, with the fields."""
    found = []
    for what, names in MISSING:
        there = [name for name in names if fields.get(name) not in ABSENT]
        found += [f"{what} ({', '.join(there)})"] if there else []
    kinds = fields.get("layer_types")
    others = sorted({str(kind) for kind in kinds if kind not in LAYERS}) if isinstance(kinds, list) else []
    found += [f"layers of another kind ({', '.join(others)})"] if others else []
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
    return (3.0 * (common >= 3) * common + 2 * there - len(own), common)
