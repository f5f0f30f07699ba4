"""Anthropic's and Ollama's own clients, unchanged; and what no protocol may do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import ollama
import pytest

from tests.server.running import NAME, Running, running
from tests.server.scripted import Says, scripted, with_template
from tests.speech.writing import written
from weft.server.answers import whole_object
from weft.server.app import Settings
from weft.server.guard import OPEN
from weft.speech.dialect import HERMES

ADD: Any = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS: Any = [{"name": "add", "description": "adds", "input_schema": ADD}]
CALLS = [("add", {"a": 2, "b": 3}), ("add", {"a": -1, "b": 0})]
ASKED: Any = [{"role": "user", "content": "What is 2 and 3?"}]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{# <think></think> #}<|assistant|>"
SAID = "<think>\nhm\n</think>\n\nLet me see.\n" + written(HERMES, CALLS)


@pytest.fixture(scope="module")
def server(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = with_template(packaged, tmp_path_factory.mktemp("model"), TEMPLATE)
    with running(folder, max_num_seqs=4) as there:
        yield there
        there.service.check_integrity()


@pytest.fixture
def says(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    return scripted(packaged, monkeypatch)


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def llama(server: Running) -> Iterator[ollama.Client]:
    client = ollama.Client(server.url, timeout=60)
    with closing(client._client):
        yield client


def prompt_of(message: anthropic.types.Message) -> int:
    """Tokens of it, those that were kept too."""
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_messages(claude: anthropic.Anthropic, says: Says) -> None:
    says(SAID)
    whole = claude.messages.create(model=NAME, max_tokens=200, messages=ASKED, tools=TOOLS, system="Be brief.")
    with claude.messages.stream(model=NAME, max_tokens=200, messages=ASKED, tools=TOOLS, system="Be brief.") as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        thought, text, *calls = message.content
        assert thought.thinking == "hm" and text.text == "Let me see."  # type: ignore[union-attr]
        assert [(call.name, call.input) for call in calls] == CALLS  # type: ignore[union-attr]
        assert message.stop_reason == "tool_use" and message.usage.output_tokens > 20
        read = message.usage.cache_read_input_tokens or 0
        assert message.usage.input_tokens + read == whole.usage.input_tokens + (
            whole.usage.cache_read_input_tokens or 0
        )
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    assert len({call.id for call in whole.content if call.type == "tool_use"}) == 2


def test_results_of_calls_and_other_blocks(claude: anthropic.Anthropic, says: Says) -> None:
    says("Five.")
    blocks: Any = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Let me see."},
                   {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2, "b": 3}}]  # fmt: skip
    result: Any = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]}
    messages: Any = [*ASKED, {"role": "assistant", "content": blocks},
                     {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]}]  # fmt: skip
    answer = claude.messages.create(model=NAME, max_tokens=50, messages=messages, tools=TOOLS)
    assert [block.text for block in answer.content if block.type == "text"] == ["Five."]
    assert answer.stop_reason == "end_turn"
    count = claude.messages.count_tokens(model=NAME, messages=messages, tools=TOOLS).input_tokens
    assert count == prompt_of(answer)


def test_choices_stops_and_forms(claude: anthropic.Anthropic, says: Says) -> None:
    says("<think>hm</think>" + written(HERMES, CALLS[:1]))
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "add"}):
        given: Any = choice
        answer = claude.messages.create(model=NAME, max_tokens=99, messages=ASKED, tools=TOOLS, tool_choice=given)
        assert [block.type for block in answer.content] == ["thinking", "tool_use"]
    says("one two three")
    stopped = claude.messages.create(model=NAME, max_tokens=99, messages=ASKED, stop_sequences=[" two"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " two")
    short = claude.messages.create(model=NAME, max_tokens=2, messages=ASKED, thinking={"type": "disabled"})
    assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2
    says('<think>hm</think>{"a": 1, "b": 2}')
    form: Any = {"format": {"type": "json_schema", "schema": ADD}, "effort": "low"}
    held = claude.messages.create(model=NAME, max_tokens=99, messages=ASKED, output_config=form)
    assert json.loads(held.content[-1].text) == {"a": 1, "b": 2}  # type: ignore[union-attr]


def test_an_answer_that_is_begun_is_continued(claude: anthropic.Anthropic, says: Says) -> None:
    says(" more.")
    begun: Any = [*ASKED, {"role": "assistant", "content": "There is"}]
    answer = claude.messages.create(model=NAME, max_tokens=9, messages=begun)
    assert [block.text for block in answer.content if block.type == "text"] == [" more."]
    count = claude.messages.count_tokens(model=NAME, messages=ASKED).input_tokens
    assert prompt_of(answer) > count - 2


def test_errors_as_anthropic_says_them(claude: anthropic.Anthropic, server: Running) -> None:
    with pytest.raises(anthropic.NotFoundError) as error:
        claude.messages.create(model="other", max_tokens=9, messages=ASKED)
    assert error.value.body["type"] == "error" and error.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    picture: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages.0.content.0"):
        claude.messages.create(model=NAME, max_tokens=9, messages=picture)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model=NAME, max_tokens=9, messages=ASKED, extra_body={"temperature": 500})
    with server.client() as http:
        wrong = {"max_tokens": 9, "messages": ASKED, "stream": True, "tool_choice": {"type": "tool"}}
        streamed = http.post("/v1/messages", json=wrong)
        assert streamed.status_code == 400 and streamed.json()["error"]["type"] == "invalid_request_error"


def test_chats_of_ollama(llama: ollama.Client, says: Says) -> None:
    says(SAID)
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]
    whole = llama.chat(NAME, ASKED, tools=tools)
    assert whole.message.content == "Let me see." and whole.message.thinking == "hm" and whole.done_reason == "stop"
    assert [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or ()] == CALLS
    pieces = list(llama.chat(f"{NAME}:latest", ASKED, tools=tools, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == "Let me see."
    assert "".join(piece.message.thinking or "" for piece in pieces) == "hm"
    calls = [call for piece in pieces for call in piece.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]
    assert last.eval_count == whole.eval_count and (last.prompt_eval_duration or 0) > 0 and last.total_duration
    says("Five.")
    past: Any = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {
        "a": 2, "b": 3}}}]}, {"role": "tool", "tool_name": "add", "content": "5"}]  # fmt: skip
    assert llama.chat(NAME, past, tools=tools, think=False).message.content == "Five."


def test_arguments_are_passed_on_as_they_were_written() -> None:
    """Half of a surrogate pair is no character, and can't be written again."""
    for text in ('{"t": "\\ud83d!"}', '{"n": 1.0, "m": 10000000000000000000000}', "{}"):
        assert msgspec.json.encode({"input": whole_object(text)}) == f'{{"input":{text}}}'.encode()
    assert not any(map(whole_object, ("", '{"a": 1', '{"a": NaN}')))


def test_of_a_call_that_is_cut_short_no_tool_is_run(
    claude: anthropic.Anthropic, llama: ollama.Client, says: Says
) -> None:
    says(written(HERMES, CALLS[:1]))
    adding: Any = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]
    cut = llama.chat(NAME, ASKED, tools=adding, options={"num_predict": 24})
    assert cut.done_reason == "length" and not cut.message.tool_calls
    short = claude.messages.create(model=NAME, max_tokens=24, messages=ASKED, tools=TOOLS)
    assert short.stop_reason == "max_tokens"
    assert all(not block.input for block in short.content if block.type == "tool_use")


def test_prompts_forms_and_models_of_ollama(llama: ollama.Client, says: Says, server: Running) -> None:
    assert [model.model for model in llama.list().models] == [NAME] == [model.model for model in llama.ps().models]
    says('{"a": 1, "b": 2}')
    assert json.loads(llama.generate(NAME, "Give.", format="json", raw=True).response) == {"a": 1, "b": 2}
    says("<think>hm</think>" + '{"a": 1, "b": 2}')
    given = llama.generate(NAME, "Give.", system="Be brief.", format=ADD)
    assert json.loads(given.response) == {"a": 1, "b": 2} and given.thinking == "hm"
    says("one two three four")
    few = list(llama.generate(NAME, "Give.", raw=True, stream=True, options={"num_predict": 2, "num_ctx": 64}))
    assert few[-1].done_reason == "length" and few[-1].eval_count == 2
    for call in (lambda: llama.pull("x"), lambda: llama.delete("x"), lambda: llama.create("x", from_="y"),
                 lambda: llama.copy("x", "y"), lambda: llama.push("x")):  # fmt: skip
        with pytest.raises(ollama.ResponseError, match="has the model that it was started with"):
            call()
    with pytest.raises(ollama.ResponseError, match="not served here"):
        llama.chat("other", ASKED)
    with pytest.raises(ollama.ResponseError, match="pictures are not read here"):
        llama.generate(NAME, "a", images=["aGk="])
    with server.client() as http:
        assert http.get("/api/version").json()["version"]
        for path, field in (("/api/generate", {"response": ""}), ("/api/chat", {"messages": []})):
            loaded = http.post(path, json={"model": f"{NAME}:latest", "keep_alive": "5m"} | field if "messages" in field
                               else {"model": NAME}).json()  # fmt: skip
            assert loaded["done"] and loaded["done_reason"] == "load"
        assert http.post("/api/generate", json={"model": "other"}).status_code == 404
        shown = llama.show(NAME)
        assert "tools" in (shown.capabilities or ()) and shown.modelinfo == {
            "general.architecture": "weft", "weft.context_length": 2048}  # fmt: skip
        assert http.post("/api/show", json={"model": "other"}).status_code == 404
        assert "not served here" in http.post("/api/embed2", json={}).json()["error"]


def test_completions_of_llama_cpp(server: Running, says: Says) -> None:
    says("one two\nthree four")
    with server.client() as http:
        whole = http.post("/completion", json={"prompt": "Count", "n_predict": 50, "id_slot": 0, "seed": -1}).json()
        assert (whole["content"], whole["stop"], whole["stop_type"]) == ("one two\nthree four", True, "eos")
        assert whole["has_new_line"] and whole["tokens_predicted"] == whole["timings"]["predicted_n"] > 3
        stopped = http.post("/completion", json={"prompt": [5, 6], "stop": [" three", "\nthree"]}).json()
        assert (stopped["stop_type"], stopped["stopping_word"], stopped["content"]) == ("word", "\nthree", "one two")
        lines = http.post("/completion", json={"prompt": "Count", "n_predict": 2, "stream": True}).text.splitlines()
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1]["stop_type"] == "limit" and "".join(piece["content"] for piece in pieces).startswith("one")
        says('{"a": 1, "b": 2}')
        assert json.loads(http.post("/completion", json={"prompt": "a", "json_schema": ADD}).json()["content"])
        says("yes")
        for grammar in ('root ::= "yes" | no\nno ::= "no"', 'start: "yes" | "no"'):
            given = {"prompt": "a", "grammar": grammar, "logit_bias": [[5, False], [6, 1.5]]}
            assert http.post("/completion", json=given).json()["content"] == "yes"
        for wrong, said in (({"grammar": "root ::= ("}, "can't be followed"), ({"n_probs": 3}, "n_probs"),
                            ({"prompt": ""}, "empty")):  # fmt: skip
            answer = http.post("/completion", json={"prompt": "a", **wrong})
            assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_no_route_is_outside_the_guard(packaged: Path) -> None:
    """But for those that are open: a key is wanted, in either header, and JSON."""
    with running(packaged, Settings(NAME, keys=["right", "other"])) as there, there.client() as http:
        told = {path: [*map(str.upper, each)] for path, each in there.app.openapi()["paths"].items()}
        routes = {**told, "/": ["GET"], "/app.js": ["GET"], "/api/pull": ["POST"], "/api/delete": ["DELETE"]}
        routes |= {"/openapi.json": ["GET"], "/nowhere": ["GET", "POST"], "/v1/nowhere": ["POST"]}
        assert len(routes) > 22
        for asked, methods in routes.items():
            for method in methods:
                path = asked.replace("{model}", NAME).replace("{response}", "resp_1")
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"x-api-key": ""}):
                    status = http.request(method, path, headers=headers, json={}).status_code
                    assert (status != 401) is (path in OPEN), (path, headers)
                for headers in ({"Authorization": "Bearer right"}, {"x-api-key": "other"}):
                    assert http.request(method, path, headers=headers, json={}).status_code not in (401, 403), path
                    if method == "POST":
                        kind = headers | {"Content-Type": "text/plain"}
                        assert http.post(path, headers=kind, content=b"{}").status_code == 415, path
