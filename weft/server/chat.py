"""What requests of conversations may say: messages, tools, how they are to be rendered. Knows JSON; knows nothing of
templates.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from weft.batching.params import shown
from weft.errors import InputError
from weft.server.schema import MOST_LOGPROBS, Count, Sampling, Token
from weft.server.strict import Strict, whole_characters
from weft.server.wanted import schema_text

MOST_TOOLS, MOST_CALLS, MOST_OPTIONS = 128, 256, 64
MOST_TOOLS_CHARACTERS = 262144  # of all schemas of arguments together
NO_SCHEMAS = {"const", "enum", "default", "examples", "properties", "required"}  # no schemas, or not directly
SAYS_OF_OTHERS = {
    "additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "anyOf", "oneOf", "if",
    "not", "$ref", "dependentSchemas",
}  # fmt: skip
ROLES = {"developer": "system", "function": "tool"}  # newer and older names, which templates don't know

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Id = Annotated[str, StringConstraints(max_length=256)]


class Part(Strict):
    """A part of a message: text is what there is here."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") not in ("text", None):
            raise ValueError(f"of type {shown(given['type'])} is not read here; send text")
        return given


class Function(Strict):
    """What may be called."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments are held to their schema in any case

    def schema_of_arguments(self) -> dict[str, Any]:
        """A JSON schema of an object that has nothing which is not named, unless it says so. Raises `InputError`."""
        schema = {"type": "object"} | (self.parameters or {"properties": {}})
        if schema["type"] != "object":
            raise InputError(f"tool {self.name}: its parameters are no object; give a JSON schema of type object")
        try:
            text = schema_text(schema)
        except InputError as error:
            raise InputError(f"tool {self.name}: {error}") from None
        closed: dict[str, Any] = schema if '"allOf"' in text else _closed(schema)
        return closed


def _closed(schema: Any) -> Any:
    """Objects have the properties that are named, and no others, unless something is said of those: functions take no
    more arguments than they declare. Not where parts of an object are combined (allOf), each of which names some."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: each if name in NO_SCHEMAS else _closed(each) for name, each in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: _closed(each) for name, each in schema["properties"].items()}
        if not SAYS_OF_OTHERS & schema.keys():
            made["additionalProperties"] = False
    return made


class Tool(Strict):
    """OpenAI's."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """One by its name."""

    name: Name


class ToolChoice(Strict):
    """One tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class FunctionCall(Strict):
    """What was called. `arguments`: a JSON object as text."""

    name: Name
    arguments: str

    def given(self) -> dict[str, Any]:
        """The arguments. Raises `InputError`."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InputError(f"the arguments of a call of {self.name} are no JSON object")
        return whole_characters(arguments)


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: Id | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # as streams have it


class Message(Strict):
    """One message of a conversation."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = None
    tool_call_id: Id | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # newer clients' name for the same

    def plain(self) -> dict[str, Any]:
        """As chat templates take it. Raises `InputError`."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        message: dict[str, Any] = {"role": ROLES.get(self.role, self.role), "content": text}
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id or f"call_{number}", "type": "function",
                 "function": {"name": call.function.name, "arguments": call.function.given()}}
                for number, call in enumerate(self.tool_calls)
            ]  # fmt: skip
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if thought := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thought
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class Rendering(Strict):
    """How messages are rendered."""

    messages: Messages
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _options(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict) or len(value) > MOST_OPTIONS:
            raise ValueError(f"give an object of at most {MOST_OPTIONS} variables of the chat template")
        if taken := sorted(TAKEN & value.keys()):
            raise ValueError(f"{taken[0]} is no variable of a chat template; leave it out")
        return value

    def functions(self) -> dict[str, Function]:
        """By name. Raises `InputError`."""
        found = [tool.function for tool in self.tools or ()]
        if len(named := {function.name: function for function in found}) < len(found):
            raise InputError("two tools have the same name; give each its own")
        return named


# Parameters of transformers' own, which are not the template's.
TAKEN = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "tokenizer_kwargs", "return_assistant_tokens_mask",
}  # fmt: skip


class ChatRequest(Sampling, Rendering):
    """`POST /v1/chat/completions`."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=16)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    include_reasoning: Literal[True] | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]
