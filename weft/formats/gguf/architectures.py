"""What GGUF's metadata and tensors are called, against Hugging Face's names; and what was done to which tensors.

An architecture is a row. Knows names; a model's own families are in weft/model. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.errors import InputError
from weft.formats.gguf.header import GgufHeader

LAYER = "model.layers."
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# What changes the computation unless it has one of these values, and isn't computed here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.scale": (0.0,), "attention.causal": (True,), "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,), "attention.temperature_scale": (0.0,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "embedding_scale": (1.0,), "residual_scale": (1.0,), "logit_scale": (1.0,),
    "use_parallel_residual": (False,), "leading_dense_block_count": (0,), "pooling_type": (0,),
    "attention.sliding_window_pattern": (0, 1), "rope.dimension_sections": (0,),
    "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip
FACTORS = "rope_freqs.weight"  # by which rotary frequencies are divided: what is left of Llama 3's scaling


@dataclass(frozen=True)
class Architecture:
    """`family`: the model type in Hugging Face's words. `interleaved`: rows of queries and keys of a head stand in
    pairs, as (0, D/2, 1, D/2 + 1, …), where Hugging Face has halves. `biased`: fields that say that its projections
    have biases, with the tensors of the first layer that tell."""

    family: str
    interleaved: tuple[str, ...] = ()
    biased: tuple[tuple[str, str], ...] = ()


ARCHITECTURES = {
    "llama": Architecture(
        "llama", ("attn_q", "attn_k"),
        (("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_down.bias")),
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", biased=(("attention_bias", "blk.0.attn_output.bias"),)),
}  # fmt: skip


def architecture_of(header: GgufHeader) -> tuple[str, Architecture]:
    """Of a file, with its name there. Raises `InputError` for one that isn't known."""
    name = header.get("general.architecture", str)
    if name is None:
        raise InputError(f"{header.path} names no general.architecture, so it is no model; give another file")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{header.path}: the architecture {name!r} is not known in GGUF; known are {known}")
    return name, ARCHITECTURES[name]


def stored_name(name: str) -> str:
    """What a tensor with a Hugging Face name is called in GGUF; the name itself for one that has none."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    number, _, part = stem.removeprefix(LAYER).partition(".")
    return f"blk.{number}.{LAYER_NAMES[part]}.{kind}" if stem.startswith(LAYER) and part in LAYER_NAMES else name


class _Keys:
    """An architecture's values, which have its name in front."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        self._header, self._name = header, name

    def there(self, key: str) -> Any:
        """A value of any type; None if there is none."""
        return self._header.one(name) if (name := f"{self._name}.{key}") in self._header else None

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        return self._header.get(f"{self._name}.{key}", kind, default)

    def number(self, key: str) -> float:
        """One that must be there."""
        found: float | None = self.get(key, float)
        if found is None:
            raise InputError(f"{self._header.path} does not say {self._name}.{key}; download another file")
        return found

    def whole(self, key: str, default: int | None = None) -> int:
        """A number that must be there, unless there is a default. One for each layer must be the same for all."""
        found, name = self.there(key), f"{self._name}.{key}"
        found = default if found is None else found
        if type(found) is not int:
            what = "does not say" if found is None else f"says {found!r} for"
            raise InputError(f"{self._header.path} {what} {name}, which must be a whole number; download another file")
        return found


def configuration(header: GgufHeader, tensors: dict[str, tuple[int, ...]], factors: list[float]) -> dict[str, Any]:
    """As a config.json would have it. `tensors`: shapes by GGUF's names; `factors`: of `FACTORS`, if it is there.

    Raises `InputError` for what is missing, and for what this architecture can't be run with.
    """
    name, architecture = architecture_of(header)
    facts = _Keys(header, name)
    hidden, heads = facts.whole("embedding_length"), facts.whole("attention.head_count")
    width = facts.whole("attention.key_length", hidden // max(1, heads))
    vocabulary = tensors.get("token_embd.weight", (0,))[0]
    _demand_plain(header, facts, width, vocabulary)
    window = facts.whole("attention.sliding_window", 0)
    if window and architecture.family != "llama":
        raise InputError(f"{header.path} has a sliding window of {window}, which weft can't run in GGUF's {name}")
    family = "mistral" if window else architecture.family
    return {
        "model_type": family,
        "num_hidden_layers": facts.whole("block_count"),
        "hidden_size": hidden,
        "intermediate_size": facts.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": facts.whole("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(header, facts, factors),
        "eos_token_id": _ends(header),
        **({"sliding_window": window} if window else {}),
        **{field: tensor in tensors for field, tensor in architecture.biased},
    }


def heads_of(header: GgufHeader) -> dict[str, int]:
    """Of the tensors that are made of heads."""
    facts = _Keys(header, architecture_of(header)[0])
    heads = facts.whole("attention.head_count")
    found = {"attn_q": heads, "attn_k": facts.whole("attention.head_count_kv", heads)}
    for part, count in found.items():
        if count < 1:
            raise InputError(f"{header.path} says that {part} has {count} heads; download another file")
    return found


def _demand_plain(header: GgufHeader, facts: _Keys, width: int, vocabulary: int) -> None:
    """Raises `InputError` for what would be computed wrongly."""
    wrong = {
        "experts": facts.whole("expert_count", 0) > 0,
        "values of another width than keys": facts.whole("attention.value_length", width) != width,
        "rotary positions in a part of each head": facts.whole("rope.dimension_count", width) != width,
    }
    wrong |= {key: facts.there(key) not in (None, *neutral) for key, neutral in NEUTRAL.items()}
    for what in (what for what, is_so in wrong.items() if is_so):
        raise InputError(f"{header.path} has {what}, which weft can't run in GGUF")
    if header.count("tokenizer.ggml.tokens") > vocabulary:
        told = f"{header.count('tokenizer.ggml.tokens')} tokens, and embeddings for {vocabulary}"
        raise InputError(f"{header.path} has {told}; download another file")


def _rope(header: GgufHeader, facts: _Keys, factors: list[float]) -> dict[str, Any]:
    """As `rope_parameters`."""
    rope = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", float, 10000.0)}
    kind = facts.get("rope.scaling.type", str, "linear")
    factor = facts.get("rope.scaling.factor", float, facts.get("rope.scale_linear", float))  # the second is older
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{header.path}: the rope scaling {kind!r} is not known in GGUF; known are linear and yarn")
    if kind == "yarn" and factor is None:
        raise InputError(f"{header.path} has a rope scaling, yarn, and does not say its factor; take another file")
    scaled = kind == "yarn" or (kind == "linear" and factor not in (None, 0.0, 1.0))
    if factors and scaled:
        raise InputError(f"{header.path} has both {FACTORS} and a rope scaling, {kind}, which weft can't run in GGUF")
    if factors:
        return rope | {"rope_type": "factors", "factors": factors}
    if not scaled:
        return rope
    rope |= {"rope_type": kind, "factor": factor}
    return rope | (_yarn(facts) if kind == "yarn" else {})


def _yarn(facts: _Keys) -> dict[str, Any]:
    """What that kind needs beside its factor."""
    original = facts.whole("rope.scaling.original_context_length", facts.whole("context_length"))
    found = {key: facts.get(f"rope.scaling.yarn_{key}", float) for key in ("beta_fast", "beta_slow")}
    given = {key: value for key, value in found.items() if value is not None}
    return {"original_max_position_embeddings": original} | given


# Tokens that end an answer by their name, whatever their kind, as in llama.cpp: a file names one end, and chats may
# have another.
END_NAMES = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
     "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
     "<end_of_utterance>", "<｜end▁of▁sentence｜>")
)  # fmt: skip


def _ends(header: GgufHeader) -> list[int] | None:
    """Tokens that end an answer."""
    named = [header.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    tokens: list[Any] = header.listed("tokenizer.ggml.tokens") or []
    ends = [*(token for token in named if token is not None),
            *(at for at, token in enumerate(tokens) if token in END_NAMES)]  # fmt: skip
    return list(dict.fromkeys(ends)) or None
