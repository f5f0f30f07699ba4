"""OpenAI's responses, as its own client asks for them; what the model says is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.server.running import NAME, Running, running
from tests.server.scripted import Says, scripted, with_template
from tests.speech.writing import written
from weft.server.app import Settings
from weft.server.kept_responses import KeptResponses
from weft.speech.dialect import HERMES

ADD: Any = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS: Any = [{"type": "function", "name": "add", "description": "adds", "parameters": ADD, "strict": True}]
CALLS = [("add", {"a": 2, "b": 3}), ("add", {"a": -1, "b": 0})]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{# <think></think> #}<|assistant|>"
SAID = "<think>\nhm, hm\n</think>\n\nLet me see.\n" + written(HERMES, CALLS)
TEXT = ["response.output_item.added", "response.content_part.added", "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "response.output_item.done"]  # fmt: skip
THOUGHT = [kind.replace("output_text", "reasoning_text") for kind in TEXT]
CALL = ["response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done"]  # fmt: skip


@pytest.fixture(scope="module")
def server(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = with_template(packaged, tmp_path_factory.mktemp("model"), TEMPLATE)
    with running(folder, Settings(NAME, keys=["one", "two"]), max_num_seqs=4) as there:
        yield there
        there.service.check_integrity()


@pytest.fixture
def says(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    return scripted(packaged, monkeypatch)


def client_of(server: Running, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def client(server: Running) -> OpenAI:
    return client_of(server, "one")


def test_whole_and_as_events(client: OpenAI, says: Says) -> None:
    says(SAID)
    whole = client.responses.create(model=NAME, input="What is 2 and 3?", tools=TOOLS, instructions="Be brief.")
    with client.responses.stream(model=NAME, input="What is 2 and 3?", tools=TOOLS, instructions="Be brief.") as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    for answer in (whole, streamed):
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        thought, said, *calls = answer.output
        assert thought.content[0].text == "hm, hm" and said.content[0].text == answer.output_text == "Let me see."  # type: ignore[union-attr,index]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS  # type: ignore[union-attr]
        assert answer.status == "completed" and answer.instructions == "Be brief." and answer.tools[0].name == "add"  # type: ignore[union-attr]
        assert (
            answer.usage is not None
            and answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        )
        thinking = answer.usage.output_tokens_details.reasoning_tokens
        assert 3 < thinking < answer.usage.output_tokens - 20
    kinds = [event.type for event in events]
    once = [kind for kind, after in pairwise([*kinds, ""]) if kind != after]
    begun = ["response.created", "response.in_progress"]
    assert once == [*begun, *THOUGHT, *TEXT, *CALL, *CALL, "response.completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Let me see."


def test_going_on(client: OpenAI, server: Running, says: Says) -> None:
    says(SAID)
    first = client.responses.create(model=NAME, input="What is 2 and 3?", tools=TOOLS)
    says("Five.")
    results: Any = [{"type": "function_call_output", "call_id": item.call_id, "output": "5"}
                    for item in first.output if item.type == "function_call"]  # fmt: skip
    second = client.responses.create(model=NAME, input=results, previous_response_id=first.id, tools=TOOLS)
    assert second.output_text == "Five." and second.previous_response_id == first.id
    # The same as if all of it were sent again.
    items: Any = [{"role": "user", "content": "What is 2 and 3?"}, *(item.model_dump() for item in first.output)]
    again = client.responses.create(model=NAME, input=[*items, *results], tools=TOOLS)
    assert again.usage is not None and second.usage is not None
    assert again.usage.input_tokens == second.usage.input_tokens > first.usage.input_tokens  # type: ignore[union-attr]
    third = client.responses.create(model=NAME, input="Sure?", previous_response_id=second.id, tools=TOOLS)
    assert third.usage is not None and third.usage.input_tokens > second.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == "Five."
    with client_of(server, "two") as other:  # another key's is not there
        for ask in (lambda: other.responses.retrieve(first.id), lambda: other.responses.delete(first.id),
                    lambda: other.responses.create(model=NAME, input="x", previous_response_id=first.id)):  # fmt: skip
            with pytest.raises(openai.NotFoundError, match="is not here: it has expired, or never was this key's"):
                ask()
    client.responses.delete(first.id)
    forgotten = client.responses.create(model=NAME, input="Well?", store=False)
    for name in (first.id, forgotten.id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)


def test_forms_choices_and_ends(client: OpenAI, says: Says) -> None:
    class Sum(BaseModel):
        a: int
        b: int

    says('<think>hm</think>{"a": 1, "b": 2}')
    assert client.responses.parse(model=NAME, input="Give.", text_format=Sum).output_parsed == Sum(a=1, b=2)
    says("<think>hm</think>" + written(HERMES, CALLS[:1]))
    for choice in ("required", {"type": "function", "name": "add"}):
        given: Any = choice
        answer = client.responses.create(model=NAME, input="Give.", tools=TOOLS, tool_choice=given)
        assert [item.type for item in answer.output] == ["reasoning", "function_call"]
    says("one two three four")
    cut = client.responses.create(model=NAME, input="Give.", max_output_tokens=2, reasoning={"effort": "low"})
    assert cut.status == "incomplete" and cut.incomplete_details is not None and cut.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert (
        cut.incomplete_details.reason == "max_output_tokens" and cut.usage is not None and cut.usage.output_tokens == 2
    )


@pytest.mark.parametrize(("given", "said"), [
    ({"input": 5}, "input"), ({"input": "a", "past": []}, "past: is not known"),
    ({"input": [{"type": "input_image"}]}, "input"), ({}, "input: is missing"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0"), ({"input": "a", "background": True}, "background"),
    ({"input": "a", "conversation": "c"}, "conversation: is not known"),
    ({"input": "a", "temperature": 500}, "temperature"),
    ({"input": "a", "previous_response_id": "resp_1"}, "is not here"), ({"input": []}, "messages"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, "no JSON object"),
])  # fmt: skip
def test_what_is_refused(server: Running, given: dict[str, Any], said: str) -> None:
    with server.client(headers={"x-api-key": "two"}) as http:
        answer = http.post("/v1/responses", json=given)
        assert answer.status_code in (400, 404) and said in answer.json()["error"]["message"], answer.text
        assert http.post("/v1/responses", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400


def test_what_is_kept_has_limits() -> None:
    kept = KeptResponses(most=3, size=100, seconds=1e9)
    for number in range(5):
        kept.put(f"r{number}", "me", [b"x" * 10], b"y")
    assert [kept.get(f"r{number}", "me") is not None for number in range(5)] == [False, False, True, True, True]
    assert kept.get("r4", "you") is None and not kept.drop("r4", "you") and kept.drop("r4", "me")
    kept.put("large", "me", [b"x" * 60], b"")  # would have all others go
    assert kept.get("large", "me") is None and kept.get("r3", "me") is not None
    over = KeptResponses(seconds=-1.0)
    over.put("r", "me", [], b"y")
    assert over.get("r", "me") is None
