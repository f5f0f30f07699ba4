"""Ollama's chats and completions: what requests may say, in OpenAI's terms, and the form of answers.

Knows both protocols; knows nothing of HTTP.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field

from weft.server.answers import AnswerForm, Heard, Json, Usage, whole_object
from weft.server.chat import MOST_TOOLS, ChatRequest, Name, Tool
from weft.server.manner import OLLAMA
from weft.server.refused import unknown_model
from weft.server.schema import MOST_STOPS, CompletionRequest, Stop
from weft.server.strict import Strict
from weft.server.ticket import Piece, Prefill
from weft.speech.listener import Called, Given, Part, Said, Thought

LATEST = ":latest"  # what its clients write behind a model's name


def _no_pictures(given: Any) -> Any:
    if given:
        raise ValueError("pictures are not read here; send text")
    return given


NoPictures = Annotated[list[str], BeforeValidator(_no_pictures)]


class CalledFunction(Strict):
    """A call's, with arguments as an object."""

    name: Name
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = None
    description: str | None = None


class PastCall(Strict):
    """An earlier call."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class OllamaMessage(Strict):
    """A message."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str = ""
    thinking: str | None = None
    tool_calls: Annotated[list[PastCall], Field(max_length=256, fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: NoPictures | None = None

    def message(self) -> Json:
        """In OpenAI's terms."""
        calls = [
            {"id": call.id or f"call_{number}", "type": "function", "function": {
                "name": call.function.name, "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
            }} for number, call in enumerate(self.tool_calls or ())
        ]  # fmt: skip
        return {"role": self.role, "content": self.content, "reasoning_content": self.thinking,
                "tool_calls": calls or None, "tool_call_id": self.tool_call_id, "name": self.tool_name}  # fmt: skip


class Options(Strict):
    """Of sampling. What says how to load a model asks nothing of one that is loaded."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: Annotated[int, Field(ge=-2, lt=1 << 31)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    numa: bool | None = None

    def fields(self) -> Json:
        """In OpenAI's terms."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
        found = {name: getattr(self, name) for name in names}
        few = self.num_predict if self.num_predict is not None and self.num_predict > 0 else None
        return found | {"repetition_penalty": self.repeat_penalty, "max_tokens": few}


class OllamaSampling(Strict):
    """What chats and completions have in common."""

    model: str | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: Options | None = None
    stream: bool = True
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: str | float | None = None
    truncate: bool | None = None
    shift: bool | None = None

    def common(self) -> Json:
        """In OpenAI's terms."""
        model = self.model.removesuffix(LATEST) if self.model else None
        asked: Json = {"model": model, "stream": self.stream, **(self.options.fields() if self.options else {})}
        if self.format:
            schema = {"type": "object"} if self.format == "json" else self.format
            asked["guided_json"] = schema
        return asked


class OllamaChat(OllamaSampling):
    """`POST /api/chat`."""

    messages: Annotated[list[OllamaMessage], Field(max_length=4096, fail_fast=True)] = Field(default_factory=list)
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None

    @property
    def only_loads(self) -> bool:
        """Nothing is asked, as of a model that is to be loaded."""
        return not self.messages

    def loaded(self, name: str) -> Json:
        """It is."""
        return _loaded(name) | {"message": {"role": "assistant", "content": ""}}

    def chat(self) -> ChatRequest:
        """The same in OpenAI's terms."""
        asked = self.common() | {
            "messages": [message.message() for message in self.messages],
            "tools": [tool.model_dump(exclude_none=True) for tool in self.tools or ()],
        }
        return ChatRequest(**asked | _thinking(self.think))


class OllamaGenerate(OllamaSampling):
    """`POST /api/generate`."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    images: NoPictures | None = None
    context: Annotated[list[int], Field(max_length=0)] | None = None

    @property
    def only_loads(self) -> bool:
        """Nothing is asked, as of a model that is to be loaded."""
        return not self.prompt

    def loaded(self, name: str) -> Json:
        """It is."""
        return _loaded(name) | {"response": ""}

    def chat(self) -> ChatRequest | CompletionRequest:
        """A conversation of one message, or with `raw` a prompt."""
        if self.raw:
            raw: Json = {"max_tokens": None} | self.common() | {"prompt": self.prompt}
            return CompletionRequest(**raw)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        asked = self.common() | {"messages": [*messages, {"role": "user", "content": self.prompt}]}
        return ChatRequest(**asked | _thinking(self.think))


class OllamaShow(Strict):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None  # its older name
    verbose: bool = False
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None

    def answer(self, name: str, length: int, template: str) -> Json:
        """What the one that is served is. Raises `Refused`."""
        asked = (self.model or self.name or "").removesuffix(LATEST)
        if asked != name:
            raise unknown_model(asked, name)
        information = {"general.architecture": "weft", "weft.context_length": length}
        return {"modelfile": "", "parameters": "", "template": template, "details": DETAILS, "model_info": information,
                "capabilities": ["completion", "tools"] if template else ["completion"]}  # fmt: skip


DETAILS = {"format": "weft", "family": "", "families": None, "parameter_size": "", "quantization_level": ""}


def _loaded(name: str) -> Json:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return {"model": name, "created_at": now, "done": True, "done_reason": "load"}


def _thinking(think: bool | str | None) -> Json:
    if think is None:
        return {}
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"chat_template_kwargs": {"enable_thinking": bool(think)}, **effort}


class OllamaForm(AnswerForm):
    """Lines of JSON; calls come whole."""

    manner = OLLAMA

    def __post_init__(self) -> None:
        super().__post_init__()
        self._heard = Heard(self.hearing)
        self._begun = time.monotonic_ns()
        self._last: Piece | None = None
        self._call: Json | None = None  # the one whose arguments are coming

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """See `AnswerForm`."""
        [piece] = pieces
        message: Json = {"content": ""}
        for part in self._parts(piece):
            for name, value in part.items():
                message[name] = message[name] + value if name in message else value
        self._last = piece
        return msgspec.json.encode(self._said(message) | self._ended(piece) | self._told(usage))

    def chunks(self, piece: Piece, usage: Usage | None) -> list[Json]:
        """See `AnswerForm`."""
        if piece.finish_reason is not None:
            self._last = piece
        return [self._said({"content": ""} | part) | {"done": False} for part in self._parts(piece)]

    def closings(self, usage: Usage, asked: bool) -> list[Json]:
        """See `AnswerForm`."""
        assert self._last is not None, "a stream ends with its last piece"
        return [self._said({"content": ""}) | self._ended(self._last) | self._told(usage)]

    def progress(self, prefill: Prefill) -> list[Json]:
        """See `AnswerForm`."""
        return []

    def _parts(self, piece: Piece) -> list[Json]:
        """What a message gets more."""
        last = piece.finish_reason is not None
        found = [self._part(part) for part in self._heard.parts(piece, last)]
        found += [self._whole_call()] if last and self._call is not None else []
        return [part for part in found if part]

    def _part(self, part: Part) -> Json:
        match part:
            case Said(text):
                return (self._whole_call() if self._call is not None else {}) | {"content": text}
            case Thought(text):
                return {"thinking": text}
            case Given(text):
                assert self._call is not None, "arguments are a call's"
                self._call["arguments"] += text
                return {}
            case Called(name):
                before = self._whole_call() if self._call is not None else {}
                self._call = {"name": name, "arguments": ""}
                return before

    def _whole_call(self) -> Json:
        call, self._call = self._call, None
        assert call is not None
        if (arguments := whole_object(call["arguments"])) is None:
            return {}
        return {"tool_calls": [{"function": {"name": call["name"], "arguments": arguments}}]}

    def _said(self, message: Json) -> Json:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self.model, "created_at": now, "message": {"role": "assistant", **message}}

    def _ended(self, piece: Piece) -> Json:
        return {"done": True, "done_reason": "length" if piece.finish_reason == "length" else "stop"}

    def _told(self, usage: Usage) -> Json:
        """Nanoseconds and tokens."""
        whole, first = time.monotonic_ns() - self._begun, round(usage.first * 1e9)
        return {"total_duration": max(whole, first), "load_duration": 0, "prompt_eval_count": usage.prompt,
                "prompt_eval_duration": first, "eval_count": usage.output,
                "eval_duration": max(0, whole - first)}  # fmt: skip


class GenerateForm(OllamaForm):
    """The same with a text in place of a message."""

    def _said(self, message: Json) -> Json:
        said = super()._said({})
        del said["message"]
        more = {"thinking": message["thinking"]} if "thinking" in message else {}
        return said | {"response": message["content"]} | more
