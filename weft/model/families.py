"""The families that weft runs: one row each, and what each consists of. No torch; knows configurations only.

A flag is True, False, or the name of the field of `config.json` that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.blueprint import Axis, Blueprint, Matrix, StageParts
from weft.program.stages import Kind, Stage

Flag = bool | str


@dataclass(frozen=True)
class Flags:
    """A family's row with every flag looked up in one model's configuration."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windowed: bool


def decoder(config: ModelConfig, flags: Flags) -> Blueprint:
    """A pre-norm decoder with rotary positions and a gated MLP."""
    hidden = config.hidden
    heads = Axis("heads", config.heads, config.head_dim, unit=config.heads // config.kv_heads)
    kv_heads = Axis("kv_heads", config.kv_heads, config.head_dim, of="heads")
    width, vocabulary = Axis("width", config.intermediate, unit=16), Axis("vocabulary", config.vocabulary, unit=16)
    scales = (("self_attn.q_norm", heads), ("self_attn.k_norm", kv_heads))
    attention = StageParts(
        Stage("attention", Kind.REDUCE, ordered=True), "input_layernorm",
        (
            Matrix("self_attn.q_proj", heads, hidden, flags.qkv_bias, paired=True),
            Matrix("self_attn.k_proj", kv_heads, hidden, flags.qkv_bias, paired=True),
            Matrix("self_attn.v_proj", kv_heads, hidden, flags.qkv_bias),
        ),
        Matrix("self_attn.o_proj", hidden, heads, flags.output_bias),
        scales if flags.qk_norm else (), remembers=kv_heads, traffic=2.0,
    )  # fmt: skip
    mlp = StageParts(
        Stage("mlp", Kind.REDUCE), "post_attention_layernorm",
        tuple(Matrix(f"mlp.{part}_proj", width, hidden, flags.mlp_bias) for part in ("gate", "up")),
        Matrix("mlp.down_proj", hidden, width, flags.mlp_bias), traffic=1.5,
    )  # fmt: skip
    return Blueprint(
        hidden, (heads, kv_heads, width, vocabulary), (StageParts(Stage("embed", None)),), (attention, mlp),
        (StageParts(Stage("head", Kind.GATHER), "model.norm"),), config.layers,
        Matrix("model.embed_tokens", config.vocabulary, hidden), Matrix("lm_head", vocabulary, hidden),
        config.tied_embeddings, _windows(config) if flags.windowed else (None,) * config.layers,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What sets one family apart from a plain pre-norm Llama. `declare`: all that it consists of."""

    architecture: str
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: Flag = False
    windowed: Flag = False  # attention to the last `sliding_window` positions only
    declare: Callable[[ModelConfig, Flags], Blueprint] = decoder


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": Family("MistralForCausalLM", windowed=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, windowed="use_sliding_window"),
    "qwen3": Family(
        "Qwen3ForCausalLM", qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True,
        windowed="use_sliding_window",
    ),
}  # fmt: skip

SILU = ("silu", "swish")  # two names for one thing
ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "factors")


def blueprint_of(config: ModelConfig) -> Blueprint:
    """What the model consists of. Raises `InputError`, saying what is known, for anything weft can't run."""
    family = FAMILIES.get(config.model_type)
    # As in transformers the type counts, not what of it was saved, as long as the checkpoint has no code of its own.
    if family is None or (config.fields.get("auto_map") and config.architecture not in ("", family.architecture)):
        given = config.architecture or config.model_type
        names = ", ".join(row.architecture for row in FAMILIES.values())
        raise InputError(f"the architecture {given} ({config.model_type}) is not known; known are {names}")
    if config.activation not in SILU:
        raise InputError(f"the activation {config.activation!r} is not known; known is silu")
    rope = (config.fields.get("rope_parameters") or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise InputError(f"the rope scaling {rope!r} is not known; known are {', '.join(ROPES)}")

    def on(flag: Flag) -> bool:
        return bool(config.fields.get(flag)) if isinstance(flag, str) else flag

    row = (family.qkv_bias, family.output_bias, family.mlp_bias, family.qk_norm, family.windowed)
    return family.declare(config, Flags(*map(on, row)))


def _windows(config: ModelConfig) -> tuple[int | None, ...]:
    window = config.fields.get("sliding_window")
    kinds = config.fields.get("layer_types") or ["sliding_attention"] * config.layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
