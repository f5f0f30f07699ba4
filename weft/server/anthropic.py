"""Anthropic's messages: what a request may say, as a conversation in OpenAI's terms, and the form of the answer.

Knows both protocols; knows nothing of HTTP.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, StringConstraints

from weft.errors import InputError
from weft.server.answers import AnswerForm, Heard, Json, Usage, whole_object
from weft.server.chat import MOST_TOOLS, ChatRequest, Name
from weft.server.manner import ANTHROPIC
from weft.server.schema import Count, Stop
from weft.server.strict import Strict
from weft.server.ticket import Piece, Prefill
from weft.speech.listener import Called, Given, Part, Said, Thought

STOPPED = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "timeout": "pause_turn"}


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # what a prompt begins with is kept in any case
    citations: list[Any] | None = None


class ThinkingBlock(Strict):
    """What was thought before an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Strict):
    """An earlier call."""

    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolResultBlock(Strict):
    """What one gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class AnthropicMessage(Strict):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]

    def messages(self) -> Iterator[Json]:
        """In OpenAI's terms: results are messages of their own."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        said: Json = {"role": self.role, "content": ""}
        for block in self.content:
            match block:
                case TextBlock():
                    said["content"] += block.text
                case ThinkingBlock():
                    said["reasoning_content"] = said.get("reasoning_content", "") + block.thinking
                case ToolUseBlock():
                    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                    call = {"id": block.id, "type": "function", "function": function}
                    said["tool_calls"] = [*said.get("tool_calls", ()), call]
                case ToolResultBlock():
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
        if len(said) > 2 or said["content"]:
            yield said


class CustomTool(Strict):
    """What may be called."""

    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class Choosing(Strict):
    """Whether a tool is called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """Whether it thinks, and how long it may."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: str | None = None


class OutputFormat(Strict):
    """What the answer must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How much is thought of an answer, and its form."""

    effort: Annotated[str, StringConstraints(max_length=16)] | None = None
    format: OutputFormat | None = None


class MessagesRequest(Strict):
    """`POST /v1/messages`."""

    model: str | None = None
    max_tokens: Count
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: str | list[TextBlock] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choosing | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Annotated[str, StringConstraints(max_length=64)] | None = None

    def chat(self) -> ChatRequest:
        """The same in OpenAI's terms. Raises `InputError`."""
        messages = [{"role": "system", "content": _text(self.system)}] if self.system else []
        messages += [message for each in self.messages for message in each.messages()]
        asked: Json = {
            "model": self.model, "messages": messages, "max_tokens": self.max_tokens, "stream": self.stream,
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "stop": self.stop_sequences,
            "tools": [
                {"type": "function", "function": {
                    "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
                }} for tool in self.tools or ()
            ],
        }  # fmt: skip
        last = messages[-1] if messages else {"role": ""}
        if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
            asked["continue_final_message"] = True  # an answer that is begun is continued
        if self.thinking is not None:
            on = self.thinking.type != "disabled"
            asked["chat_template_kwargs"] = {"enable_thinking": on}
            asked["thinking_token_budget"] = self.thinking.budget_tokens if on else None
        if self.output_config is not None:
            form = self.output_config.format
            asked |= {"reasoning_effort": self.output_config.effort, "guided_json": form.schema_ if form else None}
        return ChatRequest(**asked | self._choice())

    def _choice(self) -> Json:
        if (choice := self.tool_choice) is None:
            return {}
        if choice.type == "tool" and choice.name is None:
            raise InputError("tool_choice of type tool wants the tool's name")
        named = {"type": "function", "function": {"name": choice.name}}
        kinds = {"auto": "auto", "any": "required", "none": "none", "tool": named}
        return {"tool_choice": kinds[choice.type], "parallel_tool_calls": not choice.disable_parallel_tool_use}


class CountRequest(MessagesRequest):
    """`POST /v1/messages/count_tokens`."""

    max_tokens: Count = 1


def _text(content: str | Sequence[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content or ())


class MessageForm(AnswerForm):
    """A message, whole or as events."""

    prefix, manner = "msg", ANTHROPIC

    def __post_init__(self) -> None:
        super().__post_init__()
        self._heard = Heard(self.hearing)
        self._open: str = ""  # the kind of the block that is open
        self._index = -1

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """See `AnswerForm`."""
        [piece] = pieces
        blocks: list[Json] = []
        for part in self._heard.parts(piece, last=True):
            match part:
                case Called():
                    blocks.append(_begun(part) | {"input": ""})
                case Given(text):
                    blocks[-1]["input"] += text
                case Said(text) | Thought(text):
                    kind, field = _kinds(part)
                    if not blocks or blocks[-1]["type"] != kind:
                        blocks.append(_begun(part))
                    blocks[-1][field] += text
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = whole_object(block["input"]) or {}
        return msgspec.json.encode(self._message(blocks, usage) | self._stopped(piece))

    def openings(self, count: int, usage: Usage) -> list[Json]:
        """See `AnswerForm`."""
        return [{"type": "message_start", "message": self._message([], usage)}]

    def chunks(self, piece: Piece, usage: Usage | None) -> list[Json]:
        """See `AnswerForm`."""
        events: list[Json] = []
        for part in self._heard.parts(piece, last=piece.finish_reason is not None):
            kind, field = _kinds(part)
            if isinstance(part, Called) or kind != self._open:
                events += self._closed()
                self._index, self._open = self._index + 1, kind
                events.append({"type": "content_block_start", "index": self._index, "content_block": _begun(part)})
            if not isinstance(part, Called):
                delta = {"type": "input_json_delta" if kind == "tool_use" else f"{field}_delta", field: part.text}
                events.append({"type": "content_block_delta", "index": self._index, "delta": delta})
        if piece.finish_reason is not None:
            self._last = piece
            events += self._closed()
        return events

    def closings(self, usage: Usage, asked: bool) -> list[Json]:
        """See `AnswerForm`."""
        delta = self._stopped(self._last)
        return [{"type": "message_delta", "delta": delta, "usage": _usage(usage)}, {"type": "message_stop"}]

    def progress(self, prefill: Prefill) -> list[Json]:
        """See `AnswerForm`."""
        return [{"type": "ping"}]

    def _message(self, blocks: list[Json], usage: Usage) -> Json:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": blocks,
                "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}  # fmt: skip

    def _stopped(self, piece: Piece) -> Json:
        stop = piece.stop_reason if isinstance(piece.stop_reason, str) else None
        reason = self._heard.reason(piece).get("finish_reason", piece.finish_reason)
        told = "stop_sequence" if stop is not None else STOPPED.get(str(reason), str(reason))
        return {"stop_reason": told, "stop_sequence": stop}

    def _closed(self) -> list[Json]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._index}]


def _kinds(part: Part) -> tuple[str, str]:
    """Of a block, and of the field that grows."""
    if isinstance(part, Said):
        return "text", "text"
    return ("thinking", "thinking") if isinstance(part, Thought) else ("tool_use", "partial_json")


def _begun(part: Part) -> Json:
    """A block without anything in it."""
    match part:
        case Called(name):
            return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}}
        case Thought():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case _:
            return {"type": "text", "text": ""}


def _usage(usage: Usage) -> Json:
    return {"input_tokens": usage.prompt - usage.reused, "output_tokens": usage.output,
            "cache_read_input_tokens": usage.reused, "cache_creation_input_tokens": 0}  # fmt: skip
