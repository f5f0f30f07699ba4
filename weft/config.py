"""Configurations: what a checkpoint is, and how the engine was asked to run it. Frozen; no other room is known.

`ModelConfig` comes from what a `config.json` says: from that alone where it says everything, else through
transformers' configuration classes, so that every default is theirs. `EngineConfig` holds what the user chose.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import InputError
from weft.links import NO_LINK, Link
from weft.wires import allowed


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions that every family has, and the configuration they came from.

    `fields` is the configuration as transformers normalises it (a plain dict): family-specific flags are looked up
    there.
    """

    model_type: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    activation: str
    tied_embeddings: bool
    max_length: int
    fields: dict[str, Any] = field(compare=False, repr=False)

    @property
    def stretches_beyond(self) -> int | None:
        """Tokens of a prompt beyond which its rotary angles depend on its length; None if they never do."""
        rope = self.fields.get("rope_parameters") or {}
        return int(self.fields["max_position_embeddings"]) if rope.get("rope_type") == "dynamic" else None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """From a parsed config.json, or what says the same. Whether weft knows the family is for `model.families` to
        say. Raises `InputError` for one that is inconsistent."""
        fields = complete_fields(raw) or huggingface_fields(raw)
        if fields is None:  # unknown to transformers too: families.py gives the error, with the list of known ones
            return cls(str(raw["model_type"]), _architecture(raw), 0, 0, 0, 0, 0, 0, 0, 0.0, "", False, 0, raw)
        for name in WHOLE:  # no layers at all is odd, and legal
            most = MOST.get(name, LARGEST)
            if fields[name] is not None and not (name != "num_hidden_layers") <= fields[name] <= most:
                told = f"{name} {fields[name]}; it must be above 0, and at most {most}"
                raise InputError(f"the configuration is inconsistent: {told}")
        _demand_rope(fields)
        _demand_heads(fields)
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        return cls(
            model_type=str(raw["model_type"]), architecture=_architecture(raw), layers=fields["num_hidden_layers"],
            hidden=hidden, intermediate=fields["intermediate_size"], heads=heads,
            kv_heads=fields["num_key_value_heads"] or heads, head_dim=_head_dim(fields),
            vocabulary=fields["vocab_size"], norm_epsilon=fields["rms_norm_eps"], activation=fields["hidden_act"],
            tied_embeddings=bool(fields["tie_word_embeddings"]), max_length=_max_length(fields), fields=fields,
        )  # fmt: skip


WHOLE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "vocab_size", "max_position_embeddings")  # fmt: skip
# More than anybody has: what is asked for by mistake, or in malice, is not tried.
MOST, LARGEST = {"num_hidden_layers": 10_000, "max_position_embeddings": 1 << 30}, 1 << 24
NEEDED = (*WHOLE, "rms_norm_eps", "hidden_act")
# Of these families, what a file may leave out and what that means in transformers; a test compares them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "eos_token_id": 2},
    "mistral": {"tie_word_embeddings": False, "eos_token_id": 2},
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": False, "eos_token_id": None},
    "qwen3": {
        "attention_bias": False, "use_sliding_window": False, "tie_word_embeddings": False, "eos_token_id": None,
        "head_dim": 128,
    },
}  # fmt: skip
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (), "factors": ("factors",), "linear": ("factor",), "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip


def complete_fields(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What the file says by itself, in the form that transformers gives it; None if it leaves anything to transformers,
    its complaints included: importing that takes longer than all else here."""
    rope, family = _complete_rope(raw), raw.get("model_type")
    if family not in DEFAULTS or rope is None:
        return None
    fields = DEFAULTS[str(family)] | raw | {"rope_parameters": rope}
    kinds: dict[str, type] = dict.fromkeys(WHOLE, int) | {"rms_norm_eps": float, "hidden_act": str}
    kinds |= {name: type(value) for name, value in DEFAULTS[str(family)].items() if isinstance(value, bool)}
    plain = all(type(fields.get(name)) is kind for name, kind in kinds.items()) and all(fields[n] > 0 for n in WHOLE)
    return fields if plain and _plain_heads(fields) and _plain_windows(fields) and _plain_ends(fields) else None


def _head_dim(fields: dict[str, Any]) -> int:
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])


def _plain_heads(fields: dict[str, Any]) -> bool:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if "head_dim" not in fields:
        return bool(hidden % (2 * heads) == 0)
    return type(fields["head_dim"]) is int and fields["head_dim"] > 0 and fields["head_dim"] % 2 == 0


def _plain_windows(fields: dict[str, Any]) -> bool:
    """Whether it says of every layer how far a token sees, or needn't."""
    if fields["model_type"] == "llama" or fields.get("use_sliding_window") is False:
        return True
    kinds = fields.get("layer_types")
    each = isinstance(kinds, list) and len(kinds) == fields["num_hidden_layers"] and all(
        kind in ("full_attention", "sliding_attention") for kind in kinds
    )  # fmt: skip
    window = fields.get("sliding_window", "missing")
    plain = window is None or (type(window) is int and window > 0)
    return bool(plain and (each or (kinds is None and fields["model_type"] == "mistral")))


def _plain_ends(fields: dict[str, Any]) -> bool:
    ends = fields["eos_token_id"]
    return ends is None or all(type(token) is int for token in (ends if isinstance(ends, list) else [ends]))


def _complete_rope(raw: dict[str, Any]) -> dict[str, Any] | None:
    """As `rope_parameters`, from the new form or from the old one; None for what only transformers can say."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if new and (old or "rope_theta" in raw):
        return None  # which of them counts
    written = new or old or {}
    if not isinstance(written, dict) or "partial_rotary_factor" in {**raw, **written}:
        return None
    given = {"rope_theta": raw.get("rope_theta"), **written}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        return None
    numbers = {name: value for name, value in given.items() if name not in ("type", "rope_type", "truncate")}
    each = [*(value for name, value in numbers.items() if name != "factors"), *_listed(numbers.get("factors"))]
    if not all(map(_above_zero, each)) or not {"rope_theta", *ROPE_NEEDS[kind]} <= {*numbers}:
        return None
    return given | {"rope_type": kind}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _above_zero(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def huggingface_fields(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The same through transformers; None for a type without one weft could use. Raises `InputError`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if raw["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        hf = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # transformers raises many kinds for an inconsistent configuration
        raise InputError(f"the configuration is inconsistent: {_reason(error)}") from None
    if not all(hasattr(hf, name) for name in NEEDED):
        return None
    return hf.to_dict() | {name: getattr(hf, name) for name in (*NEEDED, "tie_word_embeddings")}


def _demand_rope(fields: dict[str, Any]) -> None:
    """Raises `InputError` for numbers that no rotary formula can take: transformers only warns of some."""
    rope = fields.get("rope_parameters") or {}
    needed = ROPE_NEEDS.get(str(rope.get("rope_type")))
    if fields["model_type"] not in DEFAULTS or needed is None:
        return  # whether that is known is not for here
    if rope["rope_type"] == "factors" and len(_listed(rope.get("factors"))) != _head_dim(fields) // 2:
        raise InputError(f"the configuration is inconsistent: rope factors for heads of {_head_dim(fields)} numbers")
    for name, value in rope.items():
        if name in ("type", "rope_type", "truncate", "factors") or value is None:
            continue
        if not (_above_zero(value) if name in ("rope_theta", *needed) else type(value) in (int, float)):
            raise InputError(f"the configuration is inconsistent: rope_parameters.{name} is {value!r}")


def _demand_heads(fields: dict[str, Any]) -> None:
    """Raises `InputError` for heads that can't be: key/value heads serve equally many, rotary turns pairs."""
    heads, width = fields["num_attention_heads"], _head_dim(fields)
    groups = fields["num_key_value_heads"] or heads
    if heads % groups or width < 2 or width % 2:
        told = f"{heads} heads of {width} over {groups} key/value heads"
        raise InputError(f"the configuration is inconsistent: {told}; those must divide the heads, 2 their width")


def _reason(error: Exception) -> str:
    """In one line; of a missing field only its name is said."""
    name = f"{type(error).__name__} " if isinstance(error, KeyError) else ""
    return name + " ".join(str(error).split())[:300]


def _architecture(raw: dict[str, Any]) -> str:
    listed = raw.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def _max_length(fields: dict[str, Any]) -> int:
    """Positions that the model was made for; rope scalings that stretch the trained length are counted in.

    `linear` and `dynamic` state the trained length in max_position_embeddings, `llama3` the stretched one, and
    `yarn` either, with the trained one beside it when it is the stretched one.
    """
    length = int(fields["max_position_embeddings"])
    rope = fields.get("rope_parameters") or {}
    stretch = float(rope.get("factor") or 1.0)
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(length * stretch)
    if rope.get("rope_type") == "yarn":
        return max(length, int(stretch * int(rope.get("original_max_position_embeddings") or length)))
    return length


TRANSPORTS = ("auto", "shm", "tcp", "tls", "gloo")
DTYPES = ("float32", "bfloat16")
WEIGHTS = ("auto", *DTYPES, "int8", "int4")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Every value is what the user gave or what "auto" came to; nothing changes later.

    Lengths are in tokens. `prefixes`: sequences that are over and kept for others that begin alike. `token_interval`:
    seconds between tokens that prompts should leave to whoever is answered meanwhile; None: throughput is all that
    counts. `shares`: relative sizes of the ranks' parts, one number a rank. `cores`: those that the
    ranks are pinned to, `threads` each in turn; None leaves it to the system. `transport`: of messages between ranks;
    auto is shared memory on one machine and TCP between machines, encrypted there but for `plain_data`; tls is TCP,
    encrypted anywhere. `link`: over which they seem to travel.
    `check_content`: other machines' weights are compared whole, not by their headers alone. `dtype`: what is computed
    in; `weights`: what they are stored in.
    """

    ranks: int = 1
    shares: tuple[float, ...] = (1.0,)
    overlap: str = "auto"
    wire: str = "exact"
    transport: str = "auto"
    link: Link = NO_LINK
    plain_data: bool = False
    check_content: bool = False
    reproducible: bool = False
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    weights: str = "float32"
    max_length: int = 2048
    max_sequences: int = 16
    max_batch_tokens: int = 8192
    prefixes: int = 16
    token_interval: float | None = None
    cores: tuple[int, ...] | None = None

    @property
    def slots(self) -> int:
        """Sequences that key/value memory has an address for."""
        return self.max_sequences + self.prefixes

    @classmethod
    def resolve(
        cls, model: ModelConfig, *, ranks: int = 1, shares: tuple[float, ...] | None = None, overlap: str = "auto",
        wire: str = "exact", transport: str = "auto", link: Link = NO_LINK, plain_data: bool = False,
        check_content: bool = False, reproducible: bool = False, threads: int | None = None, device: str = "cpu",
        dtype: str = "float32", weights: str = "auto", max_length: int | None = None, max_sequences: int = 16,
        max_batch_tokens: int = 8192,
        prefixes: int = 16, token_interval: float | None = None, cores: tuple[int, ...] | None = None,
    ) -> EngineConfig:  # fmt: skip
        """Fills in what was left open; raises `InputError` for values that are not allowed."""
        positive(ranks, "--tp")
        shares = shares or (1.0,) * ranks
        if len(shares) != ranks:
            raise InputError(f"--shares gives {len(shares)} numbers for {ranks} ranks; give one a rank, as in 2,1")
        if not all(0 < share < float("inf") for share in shares):
            raise InputError(f"--shares {','.join(map(str, shares))}: every share must be a number above 0")
        allowed(wire)
        demand_way(transport, link, plain_data)
        one_of(dtype, "--dtype", DTYPES)
        weights = stored_as(weights, dtype)
        positive(max_sequences, "max_num_seqs")
        positive(max_batch_tokens, "max_num_batched_tokens")
        positive(threads, "num_threads")
        if token_interval is not None and not 0 < token_interval < float("inf"):
            raise InputError(f"the time between tokens, {token_interval} s, must be above 0")
        positive(max_length, "max_model_len")
        if max_length is not None and max_length > model.max_length:
            raise InputError(f"max_model_len {max_length} is more than the model's context of {model.max_length}")
        threads = threads or max(1, available_cores() // ranks)
        if cores is not None and len(cores) < ranks * threads:
            raise InputError(f"{ranks} ranks of {threads} threads need {ranks * threads} cores, not {len(cores)}")
        return cls(
            ranks, shares, overlap, wire, transport, link, plain_data, check_content, reproducible, threads, device,
            dtype, weights, max_length or model.max_length, max_sequences, max_batch_tokens, prefixes,
            token_interval, cores,
        )  # fmt: skip


def positive(value: int | None, name: str) -> None:
    """Raises `InputError` unless `value` is None or a whole number from 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{name} {value!r} is not allowed; give a whole number from 1")


def stored_as(weights: str, dtype: str) -> str:
    """What weights are kept in: so far, what is computed in. Raises `InputError`."""
    one_of(weights, "--weights", WEIGHTS)
    if weights not in ("auto", dtype):
        other = f", or give --dtype {weights}" if weights in DTYPES else ""
        raise InputError(f"--weights {weights} with --dtype {dtype}: weights are kept in what is computed in, so far, "
                         f"whatever the checkpoint has; leave out --weights{other}")  # fmt: skip
    return dtype


def demand_way(transport: str, link: Link, plain_data: bool = False) -> None:
    """Raises `InputError` for messages that can't travel so."""
    one_of(transport, "--transport", TRANSPORTS)
    if link.shaped and transport == "shm":
        raise InputError(f"--link {link}: ranks are as on several machines there; leave out --transport shm")
    if link.paced and transport not in ("auto", "tcp", "tls"):
        raise InputError(f"--link {link} is kept by weft's own transport over TCP; leave out --transport {transport}")
    if plain_data and transport == "tls":
        raise InputError("--plain-data leaves plain what --transport tls encrypts; give one of them")


def one_of(value: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raises `InputError` that lists what is allowed."""
    if value not in allowed:
        raise InputError(f"{name} {value!r} is not known; allowed: {', '.join(allowed)}")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's own name, where the system tells it."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
