"""What requests may say: OpenAI's fields, and those that vLLM's and llama.cpp's clients know beside them.

A field that is not listed is refused, not ignored: who sends it expects something of it. Knows JSON; knows nothing of
the engine but its sampling parameters.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from weft.batching.params import SamplingParams, shown
from weft.server.strict import Strict, demand_unicode
from weft.server.wanted import AnswerShape, Choices, ResponseFormat, Schema, StructuredOutputs, Text, only

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_STOP_TOKENS = 16, 256, 256
MOST_PROMPTS, MOST_COMPLETIONS = 64, 64  # of one request; completions in all
MOST_LOGPROBS = 20
MOST_SCORES = 1 << 18  # log-probabilities of the prompts of one request
MOST_BIASES = 1024
MOST_METADATA = 16
Token = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]  # strict: true is no token
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]  # the first wrong one says it all
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MOST_STOP_CHARACTERS)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]


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
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000, description="lower runs earlier")] = 0
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds until the request ends")] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None  # vLLM's: of the prompt's tokens
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None  # who has the same shares prefixes
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
            demand_unicode(text)
        return value

    def shape(self) -> AnswerShape | None:
        """What form the answer must have. Raises `InputError`."""
        guided = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        found = self.response_format.shape() if self.response_format is not None else None
        shapes = [found] if found is not None else []
        for given in filter(None, (self.structured_outputs, guided)):
            shapes += given.shapes()
        return only(shapes)

    def params(self, defaults: SamplingParams, max_tokens: int | None, **more: Any) -> SamplingParams:
        """The checkpoint's defaults with what was given, and with what follows from it. Raises `InputError`."""
        names = (
            "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        kept = {name: getattr(defaults, name) for name in names if name not in given}
        own = {
            "min_tokens": self.min_tokens, "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
        }  # fmt: skip
        return SamplingParams(**kept, **given, max_tokens=max_tokens, **own | more)


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
                demand_unicode(text)
        return value

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: its text, or its tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
