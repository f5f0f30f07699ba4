"""What GGUF's metadata and tensors are called, against Hugging Face's names; and what was done to which tensors.

The rows themselves are beside the families' (model/gguf.py). Knows names and keys; knows no family. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "rope.scaling.yarn_log_multiplier": (0.0,),
    "nextn_predict_layers": (0,),
}  # fmt: skip
FACTORS = "rope_freqs.weight"  # by which rotary frequencies are divided: what is left of Llama 3's scaling


@dataclass(frozen=True)
class Architecture:
    """How one family is stored. `name`: in files; `family`: the model type in Hugging Face's words; `when`: whether a
    file of that name is this one. `epsilon`: of all norms; `activation`: as Hugging Face has it. `interleaved`: rows of
    queries and keys of a head stand in pairs, as (0, D/2, 1, D/2 + 1, …), where Hugging Face has halves. `by_head`:
    tensors that have queries, keys and values of all heads where Hugging Face has the three of each head together.
    `more_by_one`: norms' weights are stored with one added. `biased`: fields that say that its projections have biases,
    with the tensors of the first layer that tell. `names`: of tensors, where they are others than usual; `layer` and
    `ends`: likewise. `partial`: a part of each head may turn. `reads`: keys that `fields`, which gives fields of
    config.json, knows of. `lists`: tensors that it makes fields of.
    """

    name: str
    family: str
    when: Callable[[Keys], bool] = lambda keys: True
    epsilon: str = "attention.layer_norm_rms_epsilon"
    activation: str = "silu"
    interleaved: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()
    more_by_one: bool = False
    biased: tuple[tuple[str, str], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    layer: str = LAYER
    ends: Mapping[str, str] = field(default_factory=lambda: NAMES)
    partial: bool = False
    reads: tuple[str, ...] = ()
    fields: Callable[[Keys, dict[str, Any]], dict[str, Any]] = lambda keys, given: {}
    lists: tuple[str, ...] = (FACTORS,)


def architecture_of(
    header: GgufHeader, known: Sequence[Architecture], closest: Callable[[], str] = str
) -> Architecture:  # fmt: skip
    """Of a file. Raises `InputError` for one that isn't known. `closest`: says which one that is."""
    name = header.get("general.architecture", str)
    if name is None:
        raise InputError(f"{header.path} names no general.architecture, so it is no model; give another file")
    keys = Keys(header, name)
    found = next((row for row in known if row.name == name and row.when(keys)), None)
    if found is None:
        names = ", ".join(dict.fromkeys(row.name for row in known))
        told = f"is not known in GGUF{closest()}; known are {names}"
        raise InputError(f"{header.path}: the architecture {name!r} {told}")
    return found


def stored_name(name: str, architecture: Architecture) -> str:
    """What a tensor with a Hugging Face name is called in GGUF; the name itself for one that has none."""
    stem, _, kind = name.rpartition(".")
    if stem in architecture.ends:
        return f"{architecture.ends[stem]}.{kind}"
    number, _, part = stem.removeprefix(architecture.layer).partition(".")
    known = architecture.names.get(part) or LAYER_NAMES.get(part)
    return f"blk.{number}.{known}.{kind}" if stem.startswith(architecture.layer) and known else name


class Keys:
    """An architecture's values, which have its name in front."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        self.header, self._name = header, name

    def there(self, key: str) -> Any:
        """A value of any type; None if there is none."""
        return self.header.one(name) if (name := f"{self._name}.{key}") in self.header else None

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        return self.header.get(f"{self._name}.{key}", kind, default)

    def number(self, key: str) -> float:
        """One that must be there."""
        found: float | None = self.get(key, float)
        if found is None:
            raise InputError(f"{self.header.path} does not say {self._name}.{key}; download another file")
        return found

    def whole(self, key: str, default: int | None = None) -> int:
        """A number that must be there, unless there is a default. One for each layer must be the same for all."""
        found, name = self.there(key), f"{self._name}.{key}"
        found = default if found is None else found
        if type(found) is not int:
            what = "does not say" if found is None else f"says {found!r} for"
            raise InputError(f"{self.header.path} {what} {name}, which must be a whole number; download another file")
        return found


def configuration(
    header: GgufHeader, architecture: Architecture, tensors: dict[str, tuple[int, ...]], lists: dict[str, list[float]]
) -> dict[str, Any]:  # fmt: skip
    """As a config.json would have it, but for what its norms' epsilon and its activation are called there: those are
    rms_norm_eps and hidden_act. `tensors`: shapes by GGUF's names; `lists`: those of the architecture that are there.

    Raises `InputError` for what is missing, and for what this architecture can't be run with.
    """
    keys = Keys(header, architecture.name)
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    width = keys.whole("attention.key_length", hidden // max(1, heads))
    vocabulary = tensors.get("token_embd.weight", (0,))[0]
    turned = keys.whole("rope.dimension_count", width)
    _demand_plain(keys, architecture, width, turned, vocabulary)
    rope = _rope(keys, lists.get(FACTORS, []))
    if architecture.partial:
        rope["partial_rotary_factor"] = part_of(turned, width)
    given = {
        "model_type": architecture.family,
        "num_hidden_layers": keys.whole("block_count"),
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number(architecture.epsilon),
        "hidden_act": architecture.activation,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope,
        "eos_token_id": _ends(header),
        **lists,
        **{field: tensor in tensors for field, tensor in architecture.biased},
    }
    fields = {name: value for name, value in given.items() if name not in lists}
    return fields | architecture.fields(keys, given)


def part_of(turned: int, width: int) -> float:
    """Of a head, as a factor that gives just so many numbers."""
    factor = turned / max(1, width)
    return factor if int(factor * width) == turned else (turned + 0.5) / max(1, width)


def sliding(keys: Keys, layers: int, period: int) -> dict[str, Any]:
    """The window, and which layers have it: all but each `period`th, unless the file says so itself."""
    window, said = keys.whole("attention.sliding_window", 0), keys.there("attention.sliding_window_pattern")
    if isinstance(said, list):
        slides = [bool(each) for each in said[:layers]]
    else:
        period = said if type(said) is int else period
        slides = [bool(window) and (period < 1 or (layer + 1) % period != 0) for layer in range(layers)]
    kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    return {"sliding_window": window or None, "layer_types": kinds}


def heads_of(header: GgufHeader, architecture: Architecture) -> dict[str, int]:
    """Of the tensors that are made of heads."""
    keys = Keys(header, architecture.name)
    heads = keys.whole("attention.head_count")
    found = {"attn_q": heads, "attn_k": keys.whole("attention.head_count_kv", heads), "attn_qkv": heads}
    for part, count in found.items():
        if count < 1:
            raise InputError(f"{header.path} says that {part} has {count} heads; download another file")
    return found


def _demand_plain(keys: Keys, architecture: Architecture, width: int, turned: int, vocabulary: int) -> None:
    """Raises `InputError` for what would be computed wrongly."""
    header = keys.header
    wrong = {
        "experts": keys.whole("expert_count", 0) > 0,
        "values of another width than keys": keys.whole("attention.value_length", width) != width,
        "rotary positions in a part of each head": turned != width and not architecture.partial,
        f"rotary positions for {turned} numbers of heads of {width}": not 0 < turned <= width,
    }
    wrong |= {
        key: keys.there(key) not in (None, *neutral)
        for key, neutral in NEUTRAL.items()
        if key not in architecture.reads
    }
    for what in (what for what, is_so in wrong.items() if is_so):
        raise InputError(f"{header.path} has {what}, which weft can't run in GGUF")
    window = keys.whole("attention.sliding_window", 0)
    if window and "attention.sliding_window" not in architecture.reads:
        raise InputError(
            f"{header.path} has a sliding window of {window}, which weft can't run in GGUF's {architecture.name}"
        )
    if header.count("tokenizer.ggml.tokens") > vocabulary:
        told = f"{header.count('tokenizer.ggml.tokens')} tokens, and embeddings for {vocabulary}"
        raise InputError(f"{header.path} has {told}; download another file")


def _rope(keys: Keys, factors: list[float]) -> dict[str, Any]:
    """As `rope_parameters`."""
    header = keys.header
    rope = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", float, 10000.0)}
    kind = keys.get("rope.scaling.type", str, "linear")
    factor = keys.get("rope.scaling.factor", float, keys.get("rope.scale_linear", float))  # the second is older
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
    return rope | (_yarn(keys) if kind == "yarn" else {})


def _yarn(keys: Keys) -> dict[str, Any]:
    """What that kind needs beside its factor."""
    original = keys.whole("rope.scaling.original_context_length", keys.whole("context_length"))
    named = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attn_factor": "attention_factor"}
    found = {name: keys.get(f"rope.scaling.yarn_{key}", float) for key, name in named.items()}
    given = {name: value for name, value in found.items() if value is not None}
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
