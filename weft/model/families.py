"""The families that weft runs: one row each. No torch; knows configurations only.

A flag is True, False, or the name of the field of `config.json` that says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.config import ModelConfig
from weft.errors import InputError

Flag = bool | str


@dataclass(frozen=True)
class Family:
    """What sets one family apart from a plain pre-norm Llama."""

    architecture: str
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: Flag = False
    windowed: Flag = False  # attention to the last `sliding_window` positions only


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
ROPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Flags:
    """A family's row with every flag looked up in one model's configuration.

    `windows`: for each layer, how many positions a token attends to (its own included), or None for all.
    """

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]


def flags_of(config: ModelConfig) -> Flags:
    """Looks up the model's family. Raises `InputError`, saying what is known, for anything weft can't run."""
    family = FAMILIES.get(config.model_type)
    # As in transformers the type counts, not what of it was saved, as long as the checkpoint has no code of its own.
    if family is None or (config.fields.get("auto_map") and config.architecture not in ("", family.architecture)):
        given = config.architecture or config.model_type
        known = ", ".join(row.architecture for row in FAMILIES.values())
        raise InputError(f"the architecture {given} ({config.model_type}) is not known; known are {known}")
    if config.activation not in SILU:
        raise InputError(f"the activation {config.activation!r} is not known; known is silu")
    if config.fields.get("quantization_config"):
        method = config.fields["quantization_config"].get("quant_method", "unknown")
        raise InputError(f"the checkpoint is quantized ({method}); use one in float32, bfloat16 or float16")
    rope = (config.fields.get("rope_parameters") or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise InputError(f"the rope scaling {rope!r} is not known; known are {', '.join(ROPES)}")

    def on(flag: Flag) -> bool:
        return bool(config.fields.get(flag)) if isinstance(flag, str) else flag

    return Flags(
        on(family.qkv_bias), on(family.output_bias), on(family.mlp_bias), on(family.qk_norm),
        _windows(config) if on(family.windowed) else (None,) * config.layers,
    )  # fmt: skip


def _windows(config: ModelConfig) -> tuple[int | None, ...]:
    window = config.fields.get("sliding_window")
    kinds = config.fields.get("layer_types") or ["sliding_attention"] * config.layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
