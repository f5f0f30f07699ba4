"""The endpoints, mostly as OpenAI's own client sees them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.server.running import NAME, Running, running
from weft import LLM, SamplingParams

PROMPT = "The for statement is used to"


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[Running]:
    with running(packaged, max_num_seqs=4) as there:
        yield there
        there.service.check_integrity()


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone(packaged: Path) -> dict[str, Any]:
    """What the engine gives without a server."""
    with LLM(packaged, num_threads=1, overlap="serial") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
        [output] = llm.generate(PROMPT, params)
        assert llm.engine.tokenizer is not None
        return {"text": output.outputs[0].text, "output": output, "tokens": output.prompt_token_ids}


def test_a_completion_is_what_the_engine_gives(client: OpenAI, alone: dict[str, Any]) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, logprobs=2)
    assert answer.choices[0].text == alone["text"] and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(alone["tokens"]), 24)
    found, expected = answer.choices[0].logprobs, alone["output"].outputs[0]
    assert found is not None and found.token_logprobs is not None
    assert sum(found.token_logprobs) == pytest.approx(expected.cumulative_logprob, rel=1e-4)
    assert [len(top) for top in found.top_logprobs or ()] == [2] * 24


def test_streams_add_up_to_the_whole(client: OpenAI, alone: dict[str, Any]) -> None:
    chunks = list(
        client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == alone["text"]
    assert chunks[-2].choices[0].finish_reason == "length" and len(chunks) > 10
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_completions(client: OpenAI, alone: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": [PROMPT, alone["tokens"]], "n": 2, "max_tokens": 24}
    asked["prompt"] = [alone["tokens"], alone["tokens"]]
    answer = client.completions.create(**asked, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {alone["text"]}
    texts: dict[int, str] = {}
    for chunk in client.completions.create(**asked, temperature=0, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == dict.fromkeys(range(4), alone["text"])


def test_stops_seeds_and_echo(client: OpenAI, alone: dict[str, Any]) -> None:
    word = alone["text"].split()[3]
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, stop=[word], echo=True)
    choice = answer.choices[0]
    assert choice.text == PROMPT + alone["text"][: alone["text"].index(word)] and choice.finish_reason == "stop"
    drawn = [
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, seed=seed, temperature=1).choices[0].text
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chats(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "import os\n"}], "temperature": 0}
    answer = client.chat.completions.create(**asked, max_completion_tokens=8, logprobs=True, top_logprobs=3)
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content[0].top_logprobs) == 3
    chunks = list(client.chat.completions.create(**asked, max_tokens=8, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_json_of_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
        "required": ["size", "kind"], "additionalProperties": False,
    }  # fmt: skip
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "describe it"}], temperature=1, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    given = json.loads(answer.choices[0].message.content or "")
    assert 1 <= given["size"] <= 99 and given["kind"] in ("a", "b") and len(given) == 2
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "describe it"}], temperature=0, max_tokens=20,
        response_format={"type": "json_object"},
    )  # fmt: skip
    assert (answer.choices[0].message.content or "").startswith("{")


def test_models_tokens_and_version(server: Running, client: OpenAI, alone: dict[str, Any]) -> None:
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with server.client() as http:
        found = http.post("/tokenize", json={"prompt": PROMPT}).json()
        assert found == {"count": len(alone["tokens"]), "max_model_len": 2048, "tokens": alone["tokens"]}
        assert http.post("/detokenize", json={"tokens": alone["tokens"]}).json() == {"prompt": PROMPT}
        messages = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}
        assert http.post("/tokenize", json=messages).json()["count"] > 0
        assert http.get("/version").json()["version"]


def test_health_ready_and_metrics(server: Running, client: OpenAI) -> None:
    client.completions.create(model=NAME, prompt=PROMPT * 8, max_tokens=4)
    client.completions.create(model=NAME, prompt=PROMPT * 8, max_tokens=4)
    with server.client() as http:
        assert http.get("/health").json()["status"] == "ready" and http.get("/ready").status_code == 200
        lines = http.get("/metrics").text.splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    label = f'{{model_name="{NAME}"}}'
    assert values[f"vllm:num_requests_running{label}"] == 0
    assert values[f"vllm:generation_tokens_total{label}"] >= 8
    assert values[f"vllm:prefix_cache_hits_total{label}"] >= 40
    assert values[f"vllm:time_to_first_token_seconds_count{label}"] >= 2
    assert f"weft:wire_bytes_total{label}" in values and f"weft:exposed_communication_seconds_total{label}" in values


def test_progress_of_a_long_prompt(packaged: Path) -> None:
    with running(packaged, max_num_batched_tokens=64) as server, server.client() as http:
        asked = {"prompt": list(range(10, 400)), "max_tokens": 2, "stream": True, "return_progress": True}
        with http.stream("POST", "/v1/completions", json=asked) as answer:
            lines = list(answer.iter_lines())
        progress = [json.loads(line[6:])["prompt_progress"] for line in lines if "prompt_progress" in line]
        done = [entry["processed"] for entry in progress]
        assert len(done) >= 5 and done == sorted(done) and progress[0]["total"] == 390
        assert any(line.startswith(": prompt 64 of 390") for line in lines)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/completions", {"prompt": ""}, "the prompt is empty"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "tempreature": 1}, "tempreature: is not known here"),
        ("/v1/completions", {"prompt": "a", "n": 1000}, "n: 1000 is not allowed; it should be"),
        ("/v1/completions", {"prompt": "a", "\ud800": 1}, "\\ud800: is not known here"),
        ("/v1/completions", {"prompt": "a", "b\nc": 1}, "b\\nc: is not known here"),
        ("/v1/completions", {"prompt": "a", "length_penalty": 1.5}, "length_penalty: is not known here"),
        ("/v1/completions", {"prompt": "a", "parallel_tool_calls": 1}, "parallel_tool_calls: is not known here"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "token ids are whole numbers"),
        ("/v1/completions", {"prompt": None}, "prompt: is missing"),
        ("/v1/completions", [1], "the body must be a JSON object, not [1]"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of: is not known here"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix: is not known here"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, "99999 is not in the vocabulary"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "token ids are whole numbers"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 101}}, "101 is not allowed"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}, "at most 1024"),
        ("/v1/completions", {"prompt": ["a"] * 40, "n": 2}, "more than 64 completions"),
        ("/v1/completions", {"prompt": [1, 99999]}, "token id 99999 is not in the vocabulary"),
        ("/v1/completions", {"prompt": [1] * 3000}, "3000 tokens"),
        ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [99999]}, "not in the vocabulary"),
        ("/v1/completions", {"prompt": "\ud800"}, "surrogate"),
        ("/v1/completions", {"prompt": "a", "stop": ["\ud800"]}, "unicode"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema"}}, "json_schema"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            "tools.0.type: is missing",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_calls": [1]}]}, "messages.0.tool_calls"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "wants logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("/tokenize", {}, "either prompt or messages"),
        ("/detokenize", {"tokens": [1 << 20]}, "not in the vocabulary"),
    ],
)
def test_bad_requests_say_what_is_wrong(server: Running, path: str, body: Any, says: str) -> None:
    with server.client() as http:
        answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"] and "\n" not in error["message"], error
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


NOTHING = {
    "length_penalty": 1.0, "typical_p": 1.0, "use_beam_search": False,
    "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "logit_bias": {}, "functions": [],
    "response_format": {"type": "text"}, "stream_options": {"include_usage": False},
}  # fmt: skip
NULLS = [
    "n", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "stop_token_ids", "ignore_eos",
    "min_tokens", "skip_special_tokens", "include_stop_str_in_output", "priority", "timeout", "return_progress",
    "response_format", "user", "metadata", "logit_bias", "tools", "tool_choice", "logprobs", "max_tokens", "model",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "service_tier", "never_heard_of",
]  # fmt: skip


def test_null_and_neutral_values_ask_for_nothing(client: OpenAI) -> None:
    fixed = {"temperature": 0, "max_tokens": 8}
    plain = client.completions.create(model=NAME, prompt=PROMPT, **fixed).choices[0].text
    nulls: dict[str, Any] = dict.fromkeys([*NULLS, "echo", "suffix", "best_of"])
    for more in (nulls | fixed, {**NOTHING, "best_of": 1.0, "suffix": "", **fixed}):
        assert client.completions.create(model=NAME, prompt=PROMPT, extra_body=more).choices[0].text == plain
    usual = client.completions.create(model=NAME, prompt=PROMPT, extra_body=nulls | {"ignore_eos": True}).usage
    assert usual is not None and usual.completion_tokens == 16  # null is OpenAI's default, not no limit
    said: Any = [{"role": "user", "content": "def main("}]
    chats = [
        client.chat.completions.create(model=NAME, messages=said, max_tokens=8, extra_body=more).choices[0].message
        for more in ({"temperature": 0}, dict.fromkeys([*NULLS, "top_logprobs"]) | fixed, NOTHING | fixed)
    ]
    assert chats[0] == chats[1] == chats[2]


def test_an_answer_is_taken_back_as_it_was_given(server: Running, client: OpenAI) -> None:
    said: Any = [{"role": "user", "content": "def main("}]
    with server.client() as http:
        raw = http.post("/v1/chat/completions", json={"messages": said, "max_tokens": 8}).json()["choices"][0][
            "message"
        ]
    parsed = client.chat.completions.create(model=NAME, messages=said, max_tokens=8).choices[0].message
    others = {"annotations": [], "tool_calls": [], "audio": None, "function_call": None}
    for before in (raw, parsed, parsed.model_dump(), raw | others, {"role": "assistant", "content": None}):
        more: Any = [*said, before, {"role": "user", "content": "and"}]
        assert client.chat.completions.create(model=NAME, messages=more, max_tokens=4).choices


def test_a_bias_decides(client: OpenAI, alone: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": alone["tokens"], "max_tokens": 4, "temperature": 0}
    first = alone["output"].outputs[0].token_ids[0]
    forced = client.completions.create(**asked, logit_bias={"70": 100}, logprobs=0).choices[0]
    assert forced.logprobs is not None and len(set(forced.logprobs.tokens or ())) == 1
    without = client.completions.create(**asked, logit_bias={str(first): -100}, extra_body={"return_token_ids": False})
    assert without.choices[0].text != client.completions.create(**asked).choices[0].text


def test_usage_comes_with_every_piece_for_who_asks(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model=NAME,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options=options,
            extra_body={"ignore_eos": True},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-2:] == [12, 12]
    assert all(c.usage.prompt_tokens_details is not None for c in chunks if c.usage is not None)


def test_wrong_elements_by_the_hundred_thousand_cost_little(server: Running) -> None:
    many = 300_000
    bodies = [
        ("/v1/completions", {"prompt": [-1] * many}), ("/v1/completions", {"prompt": [[-1] * many]}),
        ("/v1/completions", {"prompt": ["a", -1] * (many // 2)}), ("/detokenize", {"tokens": ["x"] * many}),
        ("/v1/completions", {"prompt": "a", "stop": [1] * many}),
        ("/v1/completions", {"prompt": "a"} | {f"x{number}": 1 for number in range(many // 4)}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {f"x{number}": 1 for number in range(many // 4)}}),
        ("/v1/chat/completions", {"messages": [1] * many}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * many}]}),
    ]  # fmt: skip
    with server.client() as http:
        http.post(bodies[0][0], json=bodies[0][1])  # starts the process that reads large ones: imports, not this body
        for path, body in bodies:
            begin = time.monotonic()
            answer = http.post(path, json=body)
            assert answer.status_code == 400 and len(answer.content) < 2000, answer.text[:300]
            assert time.monotonic() - begin < 1.5, body.keys()  # it took 6 s; a tenth of a second is usual


def test_bad_schemas_bodies_and_names(server: Running, client: OpenAI) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.completions.create(model=NAME, prompt="a", extra_body={"response_format": wrong})
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="a")
    with server.client() as http:
        digits = b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"
        answer = http.post("/v1/completions", content=digits, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"].endswith("a number has too many digits")
        answer = http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]
        assert http.get("/v1/completions").status_code == 405 and http.get("/nothing").json()["error"]["type"]


def test_who_goes_away_frees_the_slot(server: Running) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with server.client() as http:
        for stream in (True, False):
            if stream:
                with http.stream("POST", "/v1/completions", json=asked) as answer:
                    lines = answer.iter_lines()  # kept: the stream ends with its iterator
                    next(lines)
                    assert server.service.running == 1
            else:
                with pytest.raises(Exception, match="timed out"):
                    http.post("/v1/completions", json={**asked, "stream": False}, timeout=0.5)
            until = time.monotonic() + 2
            while server.service.running and time.monotonic() < until:
                time.sleep(0.01)
            assert server.service.running == 0


def test_a_deadline_ends_a_request(server: Running, client: OpenAI) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=1900, extra_body={"ignore_eos": True, "timeout": 0.5}
    )
    assert answer.choices[0].finish_reason == "timeout" and len(answer.choices[0].text) > 0


def test_too_many_are_told_when_to_come_again(packaged: Path) -> None:
    with running(packaged, max_num_seqs=1, most_waiting=1) as server, server.client() as http:
        asked = {"prompt": PROMPT, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=asked) as first:
            lines = first.iter_lines()  # kept: the stream ends with its iterator
            next(lines)
            with http.stream("POST", "/v1/completions", json=asked) as second:
                assert second.status_code == 200
                refused = http.post("/v1/completions", json=asked)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"


def test_our_own_mistakes_are_said_in_the_same_shape(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def mistaken(*_: object) -> None:
        raise RuntimeError("what only the log should say")

    monkeypatch.setattr(server.service, "submit", mistaken)
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "what only the log should say" not in answer.text
