"""OpenAI's responses: what a request may say, as a conversation, and the form of the answer, whole and as events.

Knows this protocol and chats; knows nothing of HTTP.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, StringConstraints

from weft.server.answers import AnswerForm, Heard, Json, Usage
from weft.server.chat import MOST_TOOLS, ChatRequest, Name
from weft.server.manner import RESPONSES
from weft.server.schema import Count
from weft.server.strict import Strict
from weft.server.ticket import Piece, Prefill
from weft.speech.listener import Called, Given, Part, Said, Thought

MOST_ITEMS = 4096


class InputText(Strict):
    """Text of a message."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = ""
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A message, of whoever."""

    type: Literal["message"] = "message"
    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[InputText], Field(fail_fast=True)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def message(self) -> Json:
        """As chats have it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class CallItem(Strict):
    """An earlier call."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None


class OutputItem(Strict):
    """What one gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningText(Strict):
    """Of a thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    """An earlier thought."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: str | None = None


Item = InputMessage | CallItem | OutputItem | ReasoningItem
Items = Annotated[list[Item], Field(max_length=MOST_ITEMS, fail_fast=True)]


class FunctionTool(Strict):
    """What may be called."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class FunctionChoice(Strict):
    """One tool that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Strict):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """Of what is said."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Strict):
    """Of what is thought."""

    effort: Annotated[str, StringConstraints(max_length=16)] | None = None
    summary: str | None = None  # there is none beside the thoughts themselves
    generate_summary: str | None = None
    context: str | None = None


class ResponsesRequest(Strict):
    """`POST /v1/responses`."""

    model: str | None = None
    input: str | Items
    instructions: str | None = None
    previous_response_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    store: bool = True
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None  # thoughts come as they are
    user: str | None = None
    top_logprobs: Literal[0] | None = None
    service_tier: str | None = None
    background: Literal[False] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None

    def chat(self) -> ChatRequest:
        """The same as a chat."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += _messages(self.before())
        messages += [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _messages(self.input)
        tools = [tool.model_dump(include={"name", "description", "parameters", "strict"}) for tool in self.tools or ()]
        asked: Json = {
            "model": self.model, "messages": messages, "stream": self.stream, "temperature": self.temperature,
            "top_p": self.top_p, "max_tokens": self.max_output_tokens, "parallel_tool_calls": self.parallel_tool_calls,
            "tools": [{"type": "function", "function": tool} for tool in tools],
            "tool_choice": self.tool_choice, "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }  # fmt: skip
        if isinstance(self.tool_choice, FunctionChoice):
            asked["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        form = self.text.format if self.text else None
        if form is not None:
            schema = {"name": form.name, "schema": form.schema_ or {}} if form.type == "json_schema" else None
            asked["response_format"] = {"type": form.type, "json_schema": schema}
        return ChatRequest(**asked)

    def before(self) -> Sequence[Item]:
        """What was said before."""
        return ()

    def about(self) -> Json:
        """What a response says again of its request."""
        given = self.model_dump(mode="json", by_alias=True, include={
            "instructions", "previous_response_id", "store", "temperature", "top_p", "max_output_tokens", "metadata",
            "truncation", "user", "service_tier", "top_logprobs",
        })  # fmt: skip
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, FunctionChoice) else self.tool_choice
        return given | {
            "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in self.tools or ()],
            "tool_choice": choice or "auto", "parallel_tool_calls": self.parallel_tool_calls is not False,
            "metadata": self.metadata or {}, "truncation": self.truncation or "disabled",
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "text": {"format": _format(self.text)},
        }  # fmt: skip


class ContinuedRequest(ResponsesRequest):
    """One that goes on from a response: `past` are its items, which the server has kept and puts there."""

    past: Items

    def before(self) -> Sequence[Item]:
        """Them."""
        return self.past


CONTINUED = "/v1/responses, continued"  # in place of a path: nobody can ask for it


def _format(text: TextOptions | None) -> Json:
    if text is None or text.format is None:
        return {"type": "text"}
    return text.format.model_dump(by_alias=True, exclude_none=True)


def _messages(items: Sequence[Item]) -> list[Json]:
    """Items as messages: thoughts and calls are the assistant's, and belong to its next or last one."""
    made: list[Json] = []

    def answer() -> Json:
        if not (made and made[-1]["role"] == "assistant"):
            made.append({"role": "assistant", "content": ""})
        return made[-1]

    for item in items:
        match item:
            case InputMessage(role="assistant"):
                answer()["content"] += item.message()["content"]
            case InputMessage():
                made.append(item.message())
            case ReasoningItem():
                text = "".join(part.text for part in item.content or item.summary)
                answer()["reasoning_content"] = answer().get("reasoning_content", "") + text
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                answer()["tool_calls"] = [*answer().get("tool_calls", ()), call]
            case OutputItem():
                output = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
                made.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return made


class ResponseForm(AnswerForm):
    """A response, whole or as events."""

    prefix, manner = "resp", RESPONSES

    def __post_init__(self) -> None:
        self.id = f"resp_{secrets.token_hex(24)}"
        self._heard, self._items = Heard(self.hearing), list[Json]()
        self._number = 0  # of events
        self._last: Piece | None = None

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """See `AnswerForm`."""
        [self._last] = pieces
        self.chunks(self._last, None)
        return msgspec.json.encode(self._finished(usage))

    def openings(self, count: int, usage: Usage) -> list[Json]:
        """See `AnswerForm`."""
        begun = self._response("in_progress", None)
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def chunks(self, piece: Piece, usage: Usage | None) -> list[Json]:
        """See `AnswerForm`."""
        events = list(self._grown(self._heard.parts(piece, last=piece.finish_reason is not None)))
        if piece.finish_reason is not None:
            self._last = piece
            events += self._closed()
        return events

    def closings(self, usage: Usage, asked: bool) -> list[Json]:
        """See `AnswerForm`."""
        response = self._finished(usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def progress(self, prefill: Prefill) -> list[Json]:
        """See `AnswerForm`."""
        return []

    def _event(self, kind: str, **fields: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _grown(self, parts: Sequence[Part]) -> Iterator[Json]:
        """Items, as they grow."""
        for part in parts:
            kind = {Said: "message", Thought: "reasoning"}.get(type(part), "function_call")
            if isinstance(part, Called) or not self._open or self._open["type"] != kind:
                yield from self._closed()
                yield from self._begun(part)
            match part:
                case Given(text):
                    self._open["arguments"] += text
                    yield self._event("response.function_call_arguments.delta", **self._where(), delta=text)
                case Said(text) | Thought(text):
                    self._open["content"][0]["text"] += text
                    more: Json = {"logprobs": []} if isinstance(part, Said) else {}
                    place = self._where() | {"content_index": 0}
                    yield self._event(f"response.{self._named}.delta", **place, delta=text, **more)

    def _begun(self, part: Part) -> Iterator[Json]:
        item: Json = {"id": f"msg_{secrets.token_hex(24)}", "type": "message", "status": "in_progress",
                      "role": "assistant", "content": []}  # fmt: skip
        if isinstance(part, Called):
            item = {"id": f"fc_{secrets.token_hex(24)}", "type": "function_call", "status": "in_progress",
                    "call_id": self._heard.call_id(), "name": part.name, "arguments": ""}  # fmt: skip
        elif isinstance(part, Thought):
            item = {"id": f"rs_{secrets.token_hex(24)}", "type": "reasoning", "summary": [], "content": [],
                    "status": "in_progress"}  # fmt: skip
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copy(item))
        if "content" in item:
            said: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(said if isinstance(part, Said) else {"type": "reasoning_text", "text": ""})
            place = self._where() | {"content_index": 0}
            yield self._event("response.content_part.added", **place, part=dict(item["content"][0]))

    def _closed(self) -> Iterator[Json]:
        """The open item ends."""
        if not (item := self._open):
            return
        cut = self._last is not None and self._last.finish_reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            item["arguments"] = item["arguments"] or "{}"
            done = self._where() | {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done)
        else:
            place, text = self._where() | {"content_index": 0}, item["content"][0]["text"]
            more: Json = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"response.{self._named}.done", **place, text=text, **more)
            yield self._event("response.content_part.done", **place, part=dict(item["content"][0]))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item))

    @property
    def _open(self) -> Json:
        """The item that grows; none."""
        return self._items[-1] if self._items and self._items[-1]["status"] == "in_progress" else {}

    @property
    def _named(self) -> str:
        return "output_text" if self._items[-1]["type"] == "message" else "reasoning_text"

    def _where(self) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _finished(self, usage: Usage) -> Json:
        cut = self._last is not None and self._last.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed", usage)
        if self.finished is not None:
            self.finished(response)
        return response

    def _response(self, status: str, usage: Usage | None) -> Json:
        counted = None if usage is None else {
            "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": usage.reused},
            "output_tokens": usage.output, "output_tokens_details": {
                "reasoning_tokens": self._heard.tokens_of_thoughts
            },
            "total_tokens": usage.prompt + usage.output,
        }  # fmt: skip
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "background": False, "model": self.model, "output": [_copy(item) for item in self._items], "usage": counted,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "completed_at": int(time.time()) if usage is not None else None, **self.about,
        }  # fmt: skip


def _copy(item: Json) -> Json:
    """As it is now."""
    copied: Json = json.loads(json.dumps(item))
    return copied
