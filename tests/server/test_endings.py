"""Every completion's last piece comes, and what nobody waits for is let go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import Running, running
from weft.server.answers import whole_object
from weft.server.chat import Function
from weft.server.guard import Guard, Message
from weft.server.manner import OPENAI
from weft.server.stream import Event, events, whole


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[Running]:
    with running(packaged, max_num_seqs=3) as there:
        yield there
        there.service.check_integrity()
        assert there.service.running == there.service.waiting == 0


def ends(server: Running, body: dict[str, Any]) -> list[str]:
    """Why each completion ended."""
    with server.client(timeout=30) as http:
        if not body.get("stream"):
            return [choice["finish_reason"] for choice in http.post("/v1/completions", json=body).json()["choices"]]
        lines = [line[6:] for line in http.post("/v1/completions", json=body).text.splitlines() if line[:6] == "data: "]
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        found = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
        return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("stream", [False, True])
def test_some_end_with_their_first_token_beside_others_that_end(server: Running, stream: bool) -> None:
    asked = {"prompt": "def f(x):", "n": 7, "max_tokens": 30, "temperature": 1.5, "stop": ["e", "a", " "]}
    for seed in (3, 17, *range(20, 36)):
        found = ends(server, asked | {"seed": seed, "stream": stream})
        assert len(found) == 7 and set(found) <= {"stop", "length"}, seed


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_those_that_run_and_those_that_wait(server: Running, stream: bool) -> None:
    """A penalty keeps the engine from looking ahead."""
    asked = {"prompt": "def f(x):", "n": 4, "max_tokens": 1500, "frequency_penalty": 0.5, "timeout": 0.5}
    for seed in range(4):
        found = ends(server, asked | {"seed": seed, "stream": stream, "ignore_eos": True})
        assert len(found) == 4 and "timeout" in found, seed


async def _endless() -> AsyncGenerator[Event]:
    while True:
        yield b"data: {}\n\n"
        await asyncio.sleep(0)


def _asked(path: str = "/v1/completions") -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")]}


def _receiver() -> Callable[[], Awaitable[Message]]:
    """A client that has sent all that it has to say."""
    said: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def received() -> Message:
        if said:
            return said.pop()
        await asyncio.sleep(3600)
        raise AssertionError

    return received


def test_who_takes_nothing_is_given_up_with_all_that_belongs_to_it() -> None:
    sent, closed = list[Message](), list[bool]()

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) > 5:
            await asyncio.sleep(3600)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await events(_endless, OPENAI, lambda: closed.append(True))(scope, receive, send)

    async def run() -> None:
        async with asyncio.timeout(5):
            await Guard(app, [], False, 1000, 0.3)(_asked(), _receiver(), send)

    asyncio.run(run())
    assert closed == [True] and len(sent) == 6


@pytest.mark.parametrize("form", ["stream", "whole"])
def test_what_was_never_begun_is_closed_too(form: str) -> None:
    closed = list[bool]()

    async def send(message: Message) -> None:
        raise OSError("gone")

    async def made() -> bytes:
        return b"{}"

    def close() -> None:
        closed.append(True)

    async def run() -> None:
        async with asyncio.timeout(5):
            answer = events(_endless, OPENAI, close) if form == "stream" else whole(made, OPENAI, close)
            await answer(_asked(), _receiver(), send)

    asyncio.run(run())
    assert closed == [True]


def test_arguments_that_are_no_object_end_nothing() -> None:
    for text in ('{"a": ' + "[" * 1200, '{"a": NaN}', '{"a": 1', ""):
        assert whole_object(text) is None
    assert whole_object('{"a": 1.10}') is not None


def post(server: Running, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.client() as http:
        answer = http.post(path, content=content, headers={"content-type": "application/json", **headers})
    return answer.status_code, answer.json()


def test_halves_of_characters(server: Running) -> None:
    """In arguments of calls they are what a model wrote; anywhere else one line says what is wrong."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "b"}]  # fmt: skip
    assert post(server, "/v1/chat/completions", {"messages": said, "max_tokens": 1})[0] == 200
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "\\ud800"}'}
    assert post(server, "/v1/responses", {"input": [item], "max_output_tokens": 1})[0] == 200
    for path, body in (
        ("/v1/responses", {"input": "x", "max_output_tokens": 1, "metadata": {"a": "\ud800"}}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 1, "metadata": {"\ud800": "a"}}),
        ("/v1/chat/completions", {"messages": said[:1], "chat_template_kwargs": {"a": ["\udfff"]}}),
    ):  # fmt: skip
        status, answer = post(server, path, body)
        assert status == 400 and "surrogate pair" in answer["error"]["message"]


def test_a_response_never_forgets_what_it_goes_on_from(server: Running) -> None:
    first = post(server, "/v1/responses", {"input": "one two three four five", "max_output_tokens": 2})[1]
    more = {"input": "six", "max_output_tokens": 2, "previous_response_id": first["id"]}
    for change in ({}, {"store": False}, {"store": 0}, {"store": "false"}, {"metadata": {"a": "b"}}):
        status, answer = post(server, "/v1/responses", more | change)
        assert status == 400 or answer["usage"]["input_tokens"] > first["usage"]["input_tokens"], change
    for content in (json.dumps(more).encode("utf-16"), b"\xef\xbb\xbf" + json.dumps(more).encode(),
                    json.dumps(more)[:-1].encode() + b', "metadata": {"a": NaN}}'):  # fmt: skip
        assert post(server, "/v1/responses", content)[0] == 400


@pytest.mark.parametrize("field", [{"top_logprobs": 2}, {"truncation": "auto"},
                                   {"include": ["message.output_text.logprobs"]}])  # fmt: skip
def test_responses_refuse_what_they_have_not(server: Running, field: dict[str, Any]) -> None:
    status, answer = post(server, "/v1/responses", {"input": "a", "max_output_tokens": 1} | field)
    assert status == 400 and next(iter(field)) in answer["error"]["message"]


def test_ollamas_command_line_finds_the_server(server: Running) -> None:
    with server.client() as http:
        assert http.head("/").status_code == 200


NESTED: Any = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "object", "properties": {
    "b": {"enum": [{"properties": 1}]}, "properties": {"type": "string"}}}}}, "required": ["a"]}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (None, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({}, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
         {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
         {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}),
        ({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]},
         {"type": "object", "properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}),
    ],
)  # fmt: skip
def test_arguments_are_those_that_a_tool_names(given: Any, made: Any) -> None:
    assert Function(name="f", parameters=given).schema_of_arguments() == made


def test_and_so_are_objects_in_them() -> None:
    made = Function(name="f", parameters=NESTED).schema_of_arguments()
    inner = made["properties"]["a"]["items"]
    assert made["additionalProperties"] is inner["additionalProperties"] is False
    assert inner["properties"] == NESTED["properties"]["a"]["items"]["properties"]
