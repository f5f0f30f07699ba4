"""The official clients' own calls on SmolLM2-135M-Instruct, a model that people use; its template knows no tools.

Skipped, with the reason, where the package that holds it can't be had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import ollama
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from tests.server.running import NAME, Running, running
from tests.test_real import model, reference, words  # noqa: F401  # fixtures

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
SCHEMA: Any = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 3, 7]}},
    "required": ["city", "days"], "additionalProperties": False,
}  # fmt: skip
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}]


class Person(BaseModel):
    """What is to be filled in."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:  # noqa: F811
    options: Any = {"tensor_parallel_size": 2, "overlap": "iso:2", "max_model_len": 1024, "weights": "float32"}
    with running(model, max_num_seqs=4, **options) as there:
        yield there
        there.service.check_integrity()


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


def obeys(arguments: Any) -> bool:
    return arguments.keys() == {"city", "days"} and len(arguments["city"]) <= 20 and arguments["days"] in (1, 3, 7)


def test_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": NAME, "messages": ASKED, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked).choices[0]
    assert "Paris" in str(whole.message.content) and whole.finish_reason == "stop"
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


def test_tools_called_answered_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": NAME, "messages": WEATHER, "tools": TOOLS, "temperature": 0, "max_tokens": 80}
    must: Any = {"type": "function", "function": {"name": "weather"}}
    [call] = client.chat.completions.create(**asked, tool_choice=must).choices[0].message.tool_calls or ()
    assert call.function.name == "weather" and obeys(json.loads(call.function.arguments))
    with client.chat.completions.stream(**asked, tool_choice=must) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [each.function.arguments for each in streamed.message.tool_calls or ()] == [call.function.arguments]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain, 4 degrees."}
    went_on = [*WEATHER, {"role": "assistant", "tool_calls": [call.model_dump()]}, result]
    said = client.chat.completions.create(**asked | {"messages": went_on}, tool_choice="none").choices[0].message
    assert said.content and not said.tool_calls
    free = client.chat.completions.create(**asked).choices[0].message
    assert free.content or all(obeys(json.loads(each.function.arguments)) for each in free.tool_calls or ())


def test_structured_outputs(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "Anna is 31 years old."}]
    person = client.chat.completions.parse(
        model=NAME, messages=asked, response_format=Person, temperature=0, max_tokens=60
    )  # fmt: skip
    assert isinstance(person.choices[0].message.parsed, Person)
    again = client.responses.parse(
        model=NAME, input=asked, text_format=Person, temperature=0, max_output_tokens=60
    )  # fmt: skip
    assert again.output_parsed == person.choices[0].message.parsed


def test_responses_with_events(client: openai.OpenAI) -> None:
    with client.responses.stream(model=NAME, input=ASKED, temperature=0, max_output_tokens=40) as stream:
        events = list(stream)
        final = stream.get_final_response()
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == final.output_text and "Paris" in said
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    more = client.responses.create(
        model=NAME, input="And of Italy?", previous_response_id=final.id, temperature=0, max_output_tokens=40
    )  # fmt: skip
    assert more.output_text and more.usage is not None and final.usage is not None
    assert more.usage.input_tokens > final.usage.input_tokens


def test_embeddings(client: openai.OpenAI, reference: Any, words: Any) -> None:  # noqa: F811
    texts = ["A cat sat on the mat.", "Le chat est sur le tapis.", "Stocks fell on Monday."]
    found = [np.array(entry.embedding) for entry in client.embeddings.create(model=NAME, input=texts).data]
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            out = reference(torch.tensor([words(text)["input_ids"]]), output_hidden_states=True)
        mean = out.hidden_states[-1][0].mean(dim=0).numpy()
        assert np.abs(vector - mean / np.linalg.norm(mean)).max() < 1e-4


def test_anthropic(server: Running) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0, timeout=120) as client:
        asked: Any = {"model": NAME, "max_tokens": 40, "messages": ASKED, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = "".join(stream.text_stream)
        assert [block.text for block in whole.content] == [streamed] and "Paris" in streamed  # type: ignore[union-attr]
        tool: Any = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
        must: Any = {"type": "tool", "name": "weather"}
        called = client.messages.create(
            **asked | {"messages": WEATHER, "max_tokens": 80}, tools=[tool], tool_choice=must
        )  # fmt: skip
        assert called.stop_reason == "tool_use" and obeys(called.content[-1].input)  # type: ignore[union-attr]


def test_ollama(server: Running) -> None:
    client = ollama.Client(server.url, timeout=120)
    with closing(client._client):
        options = {"temperature": 0, "num_predict": 40}
        whole = client.chat(NAME, ASKED, options=options)
        streamed = "".join(
            part.message.content or "" for part in client.chat(NAME, ASKED, options=options, stream=True)
        )
        assert whole.message.content == streamed and "Paris" in streamed
        assert len(client.embed(NAME, ["a", "b"]).embeddings) == 2
