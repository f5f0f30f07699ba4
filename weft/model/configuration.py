"""From what a `config.json` says to a `ModelConfig`: from that alone where it says everything, else through
transformers' configuration classes, so that every default is theirs.

Knows the rows' words for fields and defaults; whether a model can be run is for `families.blueprint_of` to say.
"""

from __future__ import annotations

from typing import Any

from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.families import FAMILIES, WRAPPED
from weft.model.family import KINDS, SCALED_QUERIES, Family, by_kind
from weft.model.kept_fields import kept_fields

WHOLE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "vocab_size", "max_position_embeddings")  # fmt: skip
# More than anybody has: what is asked for by mistake, or in malice, is not tried.
MOST, LARGEST = {"num_hidden_layers": 10_000, "max_position_embeddings": 1 << 30}, 1 << 24
NEEDED = (*WHOLE, "rms_norm_eps", "hidden_act")
OUTSIDE = ("eos_token_id", "tie_word_embeddings", "quantization_config")  # of a wrapped text part, said around it
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (), "factors": ("factors",), "linear": ("factor",), "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}  # fmt: skip
BASES, ORIGINAL = "layer_rope_theta", "original_max_position_embeddings"
LISTS = ("factors", "short_factor", "long_factor")  # of one number for each two that are turned
WORDS = ("type", "rope_type", "truncate")


def configured(raw: dict[str, Any], keeps: bool = False) -> ModelConfig:
    """From a parsed config.json, or what says the same. Raises `InputError` for one that is inconsistent. `keeps`: what
    transformers makes of it, for the next time.

    Of a family that transformers doesn't know either, only the type is read: `blueprint_of` gives the error.
    """
    raw = text_part(raw)
    fields = complete_fields(raw)
    if fields is None:
        fields = kept_fields(raw, huggingface_fields) if keeps else huggingface_fields(raw)
    if fields is None:
        return ModelConfig(str(raw["model_type"]), _architecture(raw), 0, 0, 0, 0, 0, 0, 0, 0.0, "", False, 0, raw)
    for name in WHOLE:  # no layers at all is odd, and legal
        most = MOST.get(name, LARGEST)
        if fields[name] is not None and not (name != "num_hidden_layers") <= fields[name] <= most:
            raise _inconsistent(f"{name} {fields[name]}; it must be above 0, and at most {most}")
    _demand_lists(fields, FAMILIES[str(raw["model_type"])])
    _demand_ropes(fields, FAMILIES[str(raw["model_type"])])
    _demand_heads(fields)
    heads = fields["num_attention_heads"]
    return ModelConfig(
        model_type=str(raw["model_type"]), architecture=_architecture(raw), layers=fields["num_hidden_layers"],
        hidden=fields["hidden_size"], intermediate=fields["intermediate_size"], heads=heads,
        kv_heads=fields["num_key_value_heads"] or heads, head_dim=_head_dim(fields),
        vocabulary=fields["vocab_size"], norm_epsilon=fields["rms_norm_eps"], activation=fields["hidden_act"],
        tied_embeddings=bool(fields["tie_word_embeddings"]), max_length=_max_length(fields), fields=fields,
    )  # fmt: skip


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Of a model that sees or hears besides, where its text part is a family of its own."""
    part = raw.get("text_config")
    if not isinstance(part, dict) or raw.get("model_type") not in WRAPPED:
        return raw
    known = WRAPPED[str(raw["model_type"])]
    family = part.get("model_type", known[0])
    if family not in known:
        return raw
    around = {name: raw[name] for name in OUTSIDE if raw.get(name) is not None}
    tied = {"tie_word_embeddings": True}  # what the larger models take for granted
    return part | tied | around | {"model_type": family, "architectures": [FAMILIES[family].architecture]}


def _canonical(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """With the usual names for what this family calls otherwise."""
    return fields | {usual: fields[own] for usual, own in family.fields.items() if own in fields}


def complete_fields(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What the file says by itself, in the form that transformers gives it; None if it leaves anything to transformers,
    its complaints included: importing that takes longer than all else here."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None or (rope := _complete_rope(raw, family)) is None:
        return None
    fields = _canonical(family.defaults | raw | {"rope_parameters": rope}, family)
    kinds: dict[str, type] = dict.fromkeys(WHOLE, int) | {"rms_norm_eps": float, "hidden_act": str}
    kinds |= {name: type(value) for name, value in family.defaults.items() if isinstance(value, bool)}
    plain = all(type(fields.get(name)) is kind for name, kind in kinds.items()) and all(fields[n] > 0 for n in WHOLE)
    if not plain or not _plain_heads(fields) or not _plain_windows(fields, family) or not _plain_ends(fields, family):
        return None
    return fields if all(isinstance(fields.get(name), list) for name in family.derived[1:]) else None


def _head_dim(fields: dict[str, Any]) -> int:
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])


def _plain_heads(fields: dict[str, Any]) -> bool:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if "head_dim" not in fields:
        return bool(hidden % (2 * heads) == 0)
    return type(fields["head_dim"]) is int and fields["head_dim"] > 0 and fields["head_dim"] % 2 == 0


def _plain_windows(fields: dict[str, Any], family: Family) -> bool:
    """Whether it says of every layer how far a token sees, or needn't."""
    flag = family.windowed
    if flag is False or (isinstance(flag, str) and fields.get(flag) is False):
        return True
    kinds = fields.get("layer_types")
    each = isinstance(kinds, list) and len(kinds) == fields["num_hidden_layers"] and all(k in KINDS for k in kinds)
    window = fields.get("sliding_window", "missing")
    plain = window is None or (type(window) is int and window > 0)
    return bool(plain and (each or (kinds is None and "layer_types" not in family.derived)))


def _plain_ends(fields: dict[str, Any], family: Family) -> bool:
    ends = fields.get("eos_token_id")
    if ends is None:  # where that is not what is usual, transformers has others
        return "eos_token_id" in family.defaults
    return all(type(token) is int for token in (ends if isinstance(ends, list) else [ends]))


def _complete_rope(raw: dict[str, Any], family: Family) -> dict[str, Any] | None:
    """As `rope_parameters`, from the new form or from the old one; None for what only transformers can say."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if new and (old or "rope_theta" in raw or "partial_rotary_factor" in raw):
        return None  # which of them counts
    if family.own_ropes and not new:
        return None
    if family.ropes_by_kind:
        if not isinstance(new, dict) or set(new) != set(KINDS):
            return None
        parts = {kind: _plain_rope(part, family) for kind, part in new.items()}
        return parts if all(parts.values()) else None
    written = new or old or {}
    if not isinstance(written, dict):
        return None
    outside = {name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if name in raw}
    found = _plain_rope(outside | written, family)
    counts = raw.get(ORIGINAL, family.defaults.get(ORIGINAL))  # more than what is said inside
    return None if found and counts is not None and found.get(ORIGINAL, counts) != counts else found


def _plain_rope(given: Any, family: Family) -> dict[str, Any] | None:
    if not isinstance(given, dict):
        return None
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NEEDS or ("partial_rotary_factor" in given) != family.partial:
        return None
    needed = {"rope_theta", *ROPE_NEEDS[kind], *(("partial_rotary_factor",) if family.partial else ())}
    each = [number for name, value in given.items() if name not in WORDS for number in _listed(value)]
    return given | {"rope_type": kind} if needed <= set(given) and all(map(_above_zero, each)) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _above_zero(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def huggingface_fields(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The same through transformers; None for a type without one weft could use. Raises `InputError`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = FAMILIES.get(str(raw["model_type"]))
    if family is None or raw["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        hf = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # transformers raises many kinds for an inconsistent configuration
        raise _inconsistent(_reason(error)) from None
    named = {name: getattr(hf, name) for name in (*NEEDED, "tie_word_embeddings") if hasattr(hf, name)}
    fields = _canonical(hf.to_dict() | named, family)
    return fields if all(name in fields for name in NEEDED) else None


def _demand_ropes(fields: dict[str, Any], family: Family) -> None:
    """Raises `InputError` for numbers that no rotary formula can take: transformers only warns of some."""
    rope = fields.get("rope_parameters") or {}
    if not by_kind(rope):
        _demand_rope(rope, fields, family)
        return
    if not (kinds := fields.get("layer_types")):
        raise _inconsistent("rope_parameters for kinds of layers, and no layer_types")
    for kind in sorted(set(kinds)):
        if not isinstance(rope.get(kind, ""), dict | None):
            raise _inconsistent(f"layers of the kind {kind!r}, and no rope_parameters for them")
        _demand_rope(rope[kind] or {}, fields, family)


def _demand_lists(fields: dict[str, Any], family: Family) -> None:
    """Raises `InputError` for what is said layer by layer, and not of each."""
    layers = fields["num_hidden_layers"]
    for name in ("layer_types", *family.derived):
        said = fields.get(name)
        if said is not None and not (isinstance(said, list) and len(said) >= layers):
            raise _inconsistent(f"{name} says nothing of some of {layers} layers")
    read = "layer_types" in family.derived or by_kind(fields.get("rope_parameters") or {})
    others = [kind for kind in fields.get("layer_types") or [] if kind not in KINDS] if read else []
    if others:
        raise _inconsistent(f"layer_types has {others[0]!r}; known are {', '.join(KINDS)}")


def _demand_rope(rope: dict[str, Any], fields: dict[str, Any], family: Family) -> None:
    kind = str(rope.get("rope_type"))
    if kind not in ROPE_NEEDS:
        return  # whether that is known is not for here
    needed = [*ROPE_NEEDS[kind], *(() if isinstance(fields.get(BASES), list) else ("rope_theta",))]
    if family.scaled_queries and rope.get(SCALED_QUERIES) is not None:
        needed.append(ORIGINAL)
    part = rope.get("partial_rotary_factor")
    if part is not None and not (_above_zero(part) and part <= 1):
        raise _inconsistent(f"partial_rotary_factor {part!r}; it must be above 0, and at most 1")
    turned = int(_head_dim(fields) * part) if family.partial and part is not None else _head_dim(fields)
    if (kind == "yarn" and turned % 2) or (kind == "dynamic" and turned == 2):
        raise _inconsistent(f"heads of which {turned} numbers are turned, with the rope scaling {kind!r}")
    for name in set(LISTS) & set(needed):
        if not isinstance(rope.get(name), list) or len(rope[name]) != -(-turned // 2):
            raise _inconsistent(f"rope {name.replace('_', ' ')} for heads of which {turned} numbers are turned")
    for name in (*needed, *(set(rope) - {*needed, *WORDS})):
        value, counts = rope.get(name), name in needed
        if value is None and (not counts or (kind, name) == ("yarn", "factor")):
            continue
        if not all(_above_zero(v) if counts else type(v) in (int, float) for v in _listed(value)):
            raise _inconsistent(f"rope_parameters.{name} is {value!r}")


def _demand_heads(fields: dict[str, Any]) -> None:
    """Raises `InputError` for heads that can't be: key/value heads serve equally many, rotary turns pairs."""
    heads, width = fields["num_attention_heads"], _head_dim(fields)
    groups = fields["num_key_value_heads"] or heads
    if heads % groups or width < 2 or width % 2:
        told = f"{heads} heads of {width} over {groups} key/value heads"
        raise _inconsistent(f"{told}; those must divide the heads, 2 their width")


def _inconsistent(told: str) -> InputError:
    return InputError(f"the configuration is inconsistent: {told}")


def _reason(error: Exception) -> str:
    """In one line; of a missing field only its name is said."""
    name = f"{type(error).__name__} " if isinstance(error, KeyError) else ""
    return name + " ".join(str(error).split())[:300]


def _architecture(raw: dict[str, Any]) -> str:
    listed = raw.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def _max_length(fields: dict[str, Any]) -> int:
    """Positions that the model was made for; rope scalings that stretch the trained length are counted in.

    `linear` and `dynamic` state the trained length in max_position_embeddings, `llama3`, `longrope` and those by kind
    of layer the stretched one, and `yarn` either, with the trained one beside it when it is the stretched one.
    """
    length = int(fields["max_position_embeddings"])
    rope = fields.get("rope_parameters") or {}
    stretch = float(rope.get("factor") or 1.0)
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(length * stretch)
    if rope.get("rope_type") == "yarn":
        return max(length, int(stretch * int(rope.get("original_max_position_embeddings") or length)))
    return length
