"""What every object in a request's body has in common: fields that are not known are errors, but for those that ask for
nothing. Knows JSON; knows nothing of what is asked for.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

# Fields that weft doesn't have, with values that ask for nothing: clients send them all the same.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "annotations": ([],), "best_of": (1,), "suffix": ("",),
    "modalities": (["text"],), "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,),
    "bad_words": ([],), "allowed_token_ids": ([],), "spaces_between_special_tokens": (True,), "detokenize": (True,),
    "documents": ([],), "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
    "add_special_tokens": (True,), "top_logprobs": (0,), "echo": (False,), "verbosity": ("medium",),
    "web_search_options": ({},), "vllm_xargs": ({},), "refusal": ("",), "audio": ({},),
    "typical_p": (1,), "mirostat": (0,), "cache_prompt": (True,), "n_probs": (0,), "dry_multiplier": (0,),
    "xtc_probability": (0,), "dynatemp_range": (0,), "n_keep": (0,), "samplers": ([],), "tfs_z": (1,),
    "penalize_newline": (True,), "low_vram": (False,), "min_keep": (0,), "post_sampling_probs": (False,),
}  # fmt: skip


class Strict(BaseModel):
    """Null is as good as absent, as in OpenAI's API, and so is what asks for nothing. Other fields that are not known
    are errors; texts must be Unicode."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        asked = {name: value for name, value in given.items() if value is not None}
        for name in [name for name in asked if name not in fields]:
            if not any(_alike(asked[name], value) for value in NEUTRAL.get(name, ())):
                # The first one alone: of many, each would cost an error of its own. Its name may hold anything.
                shortened = repr(name[:100])[1:-1]
                raise PydanticCustomError("unknown_field", "is not known here; leave it out", {"field": shortened})
            del asked[name]
        return asked

    @field_validator("*", mode="before")
    @classmethod
    def _unicode(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            demand_unicode(value)
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in wanted and ("int" in wanted or "float" in wanted):
            raise ValueError("true and false are no numbers")
        return value


def _alike(given: Any, neutral: Any) -> bool:
    """Equal, and both of them or neither a truth value: 1 and 1.0 are the same number in JSON, and true is none."""
    return bool(given == neutral) and isinstance(given, bool) == isinstance(neutral, bool)


def demand_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character; send whole characters") from None


def whole_characters(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with a mark for each half of a surrogate pair: models write such halves, as escapes, and clients send
    back what they were given."""
    text = json.dumps(given, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        made: dict[str, Any] = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return made
    return given


def no_constant(name: str) -> Any:
    """For `json.loads`, which reads NaN and infinities though JSON has none."""
    raise ValueError("a number in it is not finite")
