"""What requests may say: OpenAI's fields, and those that vLLM's and llama.cpp's clients know beside them.

A field that is not listed is refused, not ignored: who sends it expects something of it. Knows JSON; knows nothing of
the engine but its sampling parameters.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from weft.batching.params import SamplingParams, shown
from weft.errors import InputError
from weft.grammar import ANY_OBJECT

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_STOP_TOKENS = 16, 256, 256
MOST_PROMPTS, MOST_COMPLETIONS = 64, 64  # of one request; completions in all
MOST_LOGPROBS = 20
MOST_SCORES = 1 << 18  # log-probabilities of the prompts of one request
MOST_SCHEMA_CHARACTERS = 65536
MOST_BIASES = 1024
MOST_METADATA = 16
# Fields that weft doesn't have, with values that ask for nothing: clients send them all the same.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "tool_calls": ([],), "annotations": ([],), "best_of": (1,), "suffix": ("",),
    "modalities": (["text"],), "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,),
    "bad_words": ([],), "allowed_token_ids": ([],), "spaces_between_special_tokens": (True,), "detokenize": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "documents": ([],),
    "chat_template_kwargs": ({},), "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
    "reasoning_effort": ("none",), "add_special_tokens": (True,), "top_logprobs": (0,), "echo": (False,),
    "web_search_options": ({},), "vllm_xargs": ({},), "cache_salt": ("",), "reasoning_content": ("",), "refusal": ("",),
    "typical_p": (1,), "mirostat": (0,), "cache_prompt": (True,),
}  # fmt: skip

Token = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]  # strict: true is no token
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]  # the first wrong one says it all
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MOST_STOP_CHARACTERS)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]


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
            _demand_unicode(value)
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in wanted and ("int" in wanted or "float" in wanted):
            raise ValueError("true and false are no numbers")
        return value


def _alike(given: Any, neutral: Any) -> bool:
    """Equal, and both of them or neither a truth value: 1 and 1.0 are the same number in JSON, and true is none."""
    return bool(given == neutral) and isinstance(given, bool) == isinstance(neutral, bool)


def _demand_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character; send whole characters") from None


class JsonSchema(Strict):
    """The schema of a `json_schema` response format."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def as_schema(self) -> str | None:
        """As JSON text, or None for free text. Raises `InputError`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ANY_OBJECT
        if self.json_schema is None:
            raise InputError("response_format json_schema needs the field json_schema with a schema in it")
        try:
            schema = json.dumps(self.json_schema.schema_, allow_nan=False)
            json.dumps(self.json_schema.schema_, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError("the JSON schema holds half of a surrogate pair, which is no character") from None
        except RecursionError:
            raise InputError("the JSON schema is nested too deeply to be followed; send a flatter one") from None
        except ValueError:
            raise InputError("the JSON schema holds NaN or Infinity, which are no numbers in JSON") from None
        if len(schema) > MOST_SCHEMA_CHARACTERS:
            raise InputError(
                f"the JSON schema has {len(schema)} characters; at most {MOST_SCHEMA_CHARACTERS} are taken"
            )
        return schema


class StreamOptions(Strict):
    """OpenAI's."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with every piece
    include_obfuscation: bool | None = None  # nothing is padded here in any case

    @property
    def asks(self) -> bool:
        """True if something is to be different."""
        return self.include_usage or self.continuous_usage_stats


class Sampling(Strict):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOP_TOKENS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000, description="lower runs earlier")] = 0
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds until the request ends")] | None = None
    return_progress: Annotated[bool, Field(description="stream how far the prompt is")] = False
    # Sent by OpenAI's clients for OpenAI's own accounts; they ask nothing of an answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @field_validator("logit_bias", "metadata", mode="before")
    @classmethod
    def _few(cls, value: Any, info: ValidationInfo) -> Any:
        """Looked at before each of them is: every wrong one would cost an error of its own."""
        most = MOST_BIASES if info.field_name == "logit_bias" else MOST_METADATA
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)} is not allowed; give an object")
        if len(value) > most:
            raise ValueError(f"has {len(value)} entries; at most {most} are taken")
        if info.field_name == "logit_bias":
            SamplingParams(logit_bias=value)  # InputError is a ValueError, and names the entry
        return value

    @field_validator("stop", mode="after")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in value if isinstance(value, list) else ():
            _demand_unicode(text)
        return value

    def params(
        self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None, scored: int | None = None
    ) -> SamplingParams:  # fmt: skip
        """The checkpoint's defaults with what was given. Raises `InputError`."""
        names = (
            "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        kept = {name: getattr(defaults, name) for name in names if name not in given}
        schema = self.response_format.as_schema() if self.response_format is not None else None
        return SamplingParams(
            **kept, **given, max_tokens=max_tokens, min_tokens=self.min_tokens, logprobs=logprobs,
            prompt_logprobs=scored, ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens, json_schema=schema,
        )  # fmt: skip


Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
)


def _ids(value: Any) -> bool:
    """Whether that is a prompt as token ids; if there are such is not said."""
    return isinstance(value, list) and value != [] and all(type(token) is int for token in value)


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _form(cls, value: Any) -> Any:
        """Said of the whole: which member of a union it comes nearest to, nobody knows."""
        several = (
            isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(map(_ids, value)))
        )
        if not (isinstance(value, str) or _ids(value) or several):
            raise ValueError(f"{shown(value)} is no prompt; give a text, token ids, or a list of texts or of such ids")
        return value

    @field_validator("prompt", mode="after")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else ():
            if isinstance(text, str):
                _demand_unicode(text)
        return value

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: its text, or its tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Part(Strict):
    """A part of a message: text is what there is here."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]
