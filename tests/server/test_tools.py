"""Tools, thoughts and forms of answers, as OpenAI's own client asks for them; what the model says is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.server.running import NAME, Running, running
from tests.server.scripted import Says, scripted, with_template
from tests.speech.writing import harmony, written
from weft.speech.dialect import CALLS, HERMES

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "of a city", "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
TIME = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, TIME]
ASKED: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
CALLED = [("weather", {"city": "Oslo"}), ("now", {})]
TEMPLATES = {
    "words": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>",
    "hermes": """{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>
{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>
{%- endif %}{{- m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}
{{- c.function.arguments.city }}</tool_call>{% endfor %}
{% endfor %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}""",
    "thinking": "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}<think>\n",
    "harmony": "{% for m in messages %}{{ m.content }}{% endfor %}{# <|channel|><|message|> #}<|start|>assistant",
    "mistral": "{# [TOOL_CALLS] #}{% for m in messages %}{% if m.tool_call_id %}{{ m.tool_call_id | length }}"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.id | length }}{% endfor %}{% endfor %}",
}


@pytest.fixture(scope="module", params=list(TEMPLATES))
def served(
    request: pytest.FixtureRequest, packaged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The packaged model with a family's template."""
    folder = with_template(packaged, tmp_path_factory.mktemp(request.param), TEMPLATES[request.param])
    with running(folder, max_num_seqs=4) as there:
        there.family = request.param  # type: ignore[attr-defined]
        yield there
        there.service.check_integrity()


@pytest.fixture
def client(served: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def says(served: Running, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """What the model says next."""
    return scripted(packaged, monkeypatch)


def calling(family: str, thought: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What a model of a family says to call."""
    if family == "harmony":
        return harmony(thought, calls[:1])
    before = {"thinking": f"{thought}\n</think>\n\n"}.get(family, "")
    return before + written(CALLS["mistral-list"] if family == "mistral" else HERMES, calls)


def test_calls_and_streams_of_them(served: Running, client: OpenAI, says: Says) -> None:
    family = served.family  # type: ignore[attr-defined]
    calls = CALLED[:1] if family == "harmony" else CALLED
    says(calling(family, "so be it", calls))
    for choice in ("auto", "required"):
        answer = client.chat.completions.create(model=NAME, messages=ASKED, tools=TOOLS, tool_choice=choice)
        [only] = answer.choices
        assert only.finish_reason == "tool_calls" and only.message.content is None
        assert [(c.function.name, json.loads(c.function.arguments)) for c in only.message.tool_calls or ()] == calls
        thought = getattr(only.message, "reasoning_content", None)
        assert thought == ("so be it" if family in ("harmony", "thinking") else None)
        with client.chat.completions.stream(model=NAME, messages=ASKED, tools=TOOLS, tool_choice=choice) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert [(c.function.name, json.loads(c.function.arguments)) for c in final.message.tool_calls or ()] == calls
    ids = [call.id for call in only.message.tool_calls or ()]
    assert len(set(ids)) == len(ids) and (family != "mistral" or {*map(len, ids)} == {9})


def test_text_and_no_calls(served: Running, client: OpenAI, says: Says) -> None:
    said = "It rains, {as} ever."
    family = served.family  # type: ignore[attr-defined]
    says(
        {"harmony": harmony("", (), said).removesuffix("<|return|>"), "thinking": "hm</think>" + said}.get(family, said)
    )
    for tools in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}):
        answer = client.chat.completions.create(model=NAME, messages=ASKED, **tools)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == said and answer.choices[0].finish_reason == "stop"
        assert not answer.choices[0].message.tool_calls
        stream = client.chat.completions.create(model=NAME, messages=ASKED, stream=True, **tools)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said


def test_one_by_name_and_one_alone(served: Running, client: OpenAI, says: Says) -> None:
    family = served.family  # type: ignore[attr-defined]
    says(calling(family, "", CALLED[1:]) if family != "thinking" else calling(family, "t", CALLED[1:]))
    choice: Any = {"type": "function", "function": {"name": "now"}}
    answer = client.chat.completions.create(
        model=NAME, messages=ASKED, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
    )
    [call] = answer.choices[0].message.tool_calls or ()
    assert call.function.name == "now" and call.function.arguments == "{}"
    choice["function"]["name"] = "other"
    with pytest.raises(openai.BadRequestError, match="names other, which is no tool here; there are weather, now"):
        client.chat.completions.create(model=NAME, messages=ASKED, tools=TOOLS, tool_choice=choice)


def test_what_was_called_and_what_it_gave(served: Running, client: OpenAI, says: Says) -> None:
    says("<|channel|>final<|message|>Rain." if served.family == "harmony" else "x</think>Rain.")  # type: ignore[attr-defined]
    call = {
        "id": "call_0123456789",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    messages: Any = [
        *ASKED, {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": [{"type": "text", "text": "wet"}]},
    ]  # fmt: skip
    answer = client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS)
    assert (answer.choices[0].message.content or "").endswith("Rain.")
    call["function"]["arguments"] = "[1]"  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="the arguments of a call of weather are no JSON object"):
        client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS)


def test_forms_of_answers(served: Running, client: OpenAI, says: Says) -> None:
    class Person(BaseModel):
        name: str
        age: int

    family, text = served.family, '{"name": "Ann", "age": 31}'  # type: ignore[attr-defined]
    before = {"harmony": "<|channel|>final<|message|>", "thinking": "hm</think>\n"}.get(family, "")
    says(before + text)
    answer = client.chat.completions.parse(model=NAME, messages=ASKED, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=31)
    ways: list[dict[str, Any]] = [
        {"guided_json": Person.model_json_schema()}, {"guided_json": json.dumps(Person.model_json_schema())},
        {"structured_outputs": {"json": Person.model_json_schema()}}, {"structured_outputs": {"json_object": True}},
        {"guided_regex": r"\{.*/?\}"}, {"guided_choice": ["a", text]},
    ]  # fmt: skip
    for way in ways:
        whole = client.chat.completions.create(model=NAME, messages=ASKED, extra_body=way)
        assert whole.choices[0].message.content == text, way
    both = ways[0] | {"guided_choice": ["a"]}
    with pytest.raises(openai.BadRequestError, match="several forms of the answer are asked for"):
        client.chat.completions.create(model=NAME, messages=ASKED, extra_body=both)


@pytest.mark.parametrize("served", ["thinking", "hermes"], indirect=True)
def test_a_thought_has_an_end(served: Running, client: OpenAI) -> None:
    """By a budget of tokens, whatever the model would go on with."""
    asked: Any = {"model": NAME, "messages": ASKED, "max_tokens": 40, "temperature": 0.0}
    if served.family == "hermes":  # type: ignore[attr-defined]
        answer = client.chat.completions.create(**asked, extra_body={"thinking_token_budget": 5})
        assert answer.choices[0].message.content and not getattr(answer.choices[0].message, "reasoning_content", None)
        return
    endless = client.chat.completions.create(**asked).choices[0].message
    assert not endless.content and endless.reasoning_content  # type: ignore[attr-defined]
    for form in ({}, {"guided_choice": ["yes", "no"]}):
        body = {"thinking_token_budget": 7, **form}
        message = client.chat.completions.create(**asked, extra_body=body).choices[0].message
        assert not form or message.content in ("yes", "no")
        assert endless.reasoning_content.startswith(message.reasoning_content)  # type: ignore[attr-defined]


@pytest.mark.parametrize("served", ["hermes"], indirect=True)
@pytest.mark.parametrize(("given", "said"), [
    ({"tools": [WEATHER, WEATHER]}, "two tools have the same name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "are no object"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties": {
        "x": {"type": "string", "pattern": "(a"}}}}}]}, "can't be followed"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "is not read here"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"), ({"tool_choice": "required"}, "wants tools"),
    ({"tool_choice": "sometimes"}, "tool_choice"), ({"tools": [WEATHER] * 200}, "at most 128"),
    ({"chat_template_kwargs": {"tokenize": False}}, "tokenize is no variable of a chat template"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, ""), ({"reasoning_effort": "low"}, ""),
    ({"reasoning_effort": "none", "parallel_tool_calls": False}, ""), ({"continue_final_message": True}, "is none"),
    ({"add_generation_prompt": False}, "continue_final_message true"),
    ({"guided_regex": "("}, "grammar can't be followed"),
    ({"guided_grammar": 'start: "yes"'}, "can't stand beside tools or thoughts"),
])  # fmt: skip
def test_what_else_is_asked_for(served: Running, given: dict[str, Any], said: str) -> None:
    with served.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": ASKED, "max_tokens": 2, **given})
        assert answer.status_code == (400 if said else 200), answer.text
        assert not said or said in answer.json()["error"]["message"]
        assert "llguidance" not in answer.text and "TEXT" not in answer.text, "what is ours shows"


@pytest.mark.parametrize("served", ["hermes"], indirect=True)
def test_the_last_message_is_continued(served: Running, client: OpenAI, says: Says) -> None:
    says(" goes on")
    messages: Any = [*ASKED, {"role": "assistant", "content": "It"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(model=NAME, messages=messages, extra_body=body)
    assert (answer.choices[0].message.content or "").strip() == "goes on"
