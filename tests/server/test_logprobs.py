"""Log-probabilities over HTTP: of prompts, of parts of characters, whole and streamed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from benchmarks.fuzz.models import KINDS, Reference, save
from tests.server.running import Running, running
from weft.execute.protocol import Chosen
from weft.server.answers import AnswerForm, Chat, Usage
from weft.server.ticket import Piece, Token

PROMPT = "a the é\n"


@pytest.fixture(scope="module", params=list(KINDS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = save(KINDS[request.param], tmp_path_factory.mktemp("logprobs"))
    with running(directory, max_num_seqs=4, reproducible=True) as there:
        yield there
        there.service.check_integrity()


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def tokens_of(http: httpx2.Client) -> list[int]:
    return list(http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"])


@pytest.mark.parametrize("most", [0, 1, 4])
def test_a_prompt_is_scored_as_evaluation_harnesses_ask_for_it(server: Running, http: httpx2.Client, most: int) -> None:
    """Batches of prompts as token ids, echoed: one entry a token, the first one null."""
    prompts = [tokens_of(http), [*range(5, 60)], [7]]
    body = {"prompt": prompts, "echo": True, "max_tokens": most, "logprobs": 1, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body).json()
    reference = Reference(server.service.engine.path)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        found = choice["logprobs"]
        assert {len(found[name]) for name in found} == {len(prompt) + most}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        expected = reference.scores(prompt)
        assert found["token_logprobs"][1 : len(prompt)] == pytest.approx(expected, abs=1e-3)
        for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert len(top) == 1 and max(top.values()) >= value
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 3 * most


def test_a_prompt_alone_costs_no_token_and_is_echoed(http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, "echo": True, "max_tokens": 0}).json()
    assert answer["choices"][0]["text"] == PROMPT and answer["choices"][0]["logprobs"] is None
    refused = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 0})
    assert refused.status_code == 400 and "echo" in refused.json()["error"]["message"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_carries_what_the_whole_answer_carries(http: httpx2.Client, echo: bool, n: int) -> None:
    body: dict[str, Any] = {"prompt": [*range(5, 40)], "echo": echo, "max_tokens": 40, "logprobs": 3, "n": n,
                            "temperature": 2.0, "seed": 5, "ignore_eos": True, "stop": ["zz"]}  # fmt: skip
    whole = http.post("/v1/completions", json=body).json()["choices"]
    streamed: list[dict[str, Any]] = [{} for _ in range(n)]
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                [part] = json.loads(line[6:])["choices"]
                for name, values in part["logprobs"].items():
                    streamed[part["index"]].setdefault(name, []).extend(values)
    assert streamed == [choice["logprobs"] for choice in whole]
    for choice in whole:
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets) and len(set(offsets)) > 5
        assert (offsets[0] == 0) and len(offsets) == 40 + 35 * echo


def test_alternatives_that_look_alike_are_all_there(server: Running, http: httpx2.Client) -> None:
    """A byte and the token of the same text, parts of different characters: none takes another's place."""
    body = {"prompt": [*range(5, 60)], "echo": True, "max_tokens": 8, "logprobs": 20, "temperature": 0}
    found = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert [len(top) for top in found["top_logprobs"][1:]] == [20] * (len(found["tokens"]) - 1)


def test_a_token_that_looks_like_an_alternative_is_not_taken_for_it(server: Running, http: httpx2.Client) -> None:
    """Evaluation harnesses ask whether the token's name is that of the likeliest one."""
    vocabulary, draw = server.service.engine.model.vocabulary, random.Random(3)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(60)] for _ in range(10)]
    body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 20, "temperature": 0}
    for choice in http.post("/v1/completions", json=body).json()["choices"]:
        found = choice["logprobs"]
        entries = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
        for name, value, top in entries[1:]:
            assert top.get(name, value) == value and (value < min(top.values()) or name in top)


def test_a_prompt_that_there_was_no_time_to_score_has_its_entries(server: Running, http: httpx2.Client) -> None:
    body = {"prompt": [*range(5, 60)], "max_tokens": 1, "echo": True, "logprobs": 1, "timeout": 1e-6}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "timeout" and len(choice["logprobs"]["tokens"]) == 55
    assert set(choice["logprobs"]["token_logprobs"]) == {None}


def test_bytes_of_a_chat_add_up_to_its_text(server: Running, http: httpx2.Client) -> None:
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 60, "logprobs": True, "top_logprobs": 2,
             "temperature": 2.0, "seed": 3, "ignore_eos": True, "skip_special_tokens": False}  # fmt: skip
    [choice] = http.post("/v1/chat/completions", json=asked).json()["choices"]
    entries = choice["logprobs"]["content"]
    raw = [bytes(entry["bytes"]) for entry in entries]
    if "byte-level" in str(server.service.engine.path):
        assert b"".join(raw).decode("utf-8", "replace") == choice["message"]["content"]
        assert any(entry["token"].startswith("bytes:") for entry in entries)
    tops = [top for entry in entries for top in entry["top_logprobs"]]
    for entry in (*entries, *tops):
        if not entry["token"].startswith("bytes:"):
            assert entry["token"].encode() == bytes(entry["bytes"])


def test_stop_texts_wait_for_min_tokens(http: httpx2.Client) -> None:
    """Text that came before them stays as it is; the first stop text after that ends the answer."""
    body: dict[str, Any] = {
        "prompt": [*range(5, 40)],
        "max_tokens": 60,
        "temperature": 2.0,
        "seed": 8,
        "ignore_eos": True,
    }
    plain = http.post("/v1/completions", json=body | {"logprobs": 0}).json()["choices"][0]
    text, offsets = plain["text"], plain["logprobs"]["text_offset"]
    letter = next(each for each in text if each.isascii() and text.count(each) > 1)
    first = text.index(letter)
    early = http.post("/v1/completions", json=body | {"stop": letter}).json()["choices"][0]
    assert early["text"] == text[:first] and early["stop_reason"] == letter
    after = next(at for at, offset in enumerate(offsets) if offset > first) + 1
    late = http.post("/v1/completions", json=body | {"stop": letter, "min_tokens": after}).json()["choices"][0]
    second = text.index(letter, offsets[after - 1])
    assert late["text"] == text[:second], "the first one was not cut out of the middle"


def test_prompts_are_counted_once(server: Running, http: httpx2.Client) -> None:
    def counted(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])

    before = counted("vllm:prompt_tokens_total"), counted("vllm:generation_tokens_total")
    asked: list[dict[str, Any]] = [
        {"prompt": [7], "max_tokens": 5}, {"prompt": [*range(5, 60)], "max_tokens": 3, "n": 2},
        {"prompt": [*range(5, 60)], "max_tokens": 1, "echo": True, "logprobs": 1},
        {"prompt": [*range(5, 60)], "max_tokens": 0, "echo": True, "logprobs": 1},
    ]  # fmt: skip
    usage = [http.post("/v1/completions", json=body | {"ignore_eos": True}).json()["usage"] for body in asked]
    after = counted("vllm:prompt_tokens_total"), counted("vllm:generation_tokens_total")
    assert after[0] - before[0] == 1 + 3 * 55 == sum(each["prompt_tokens"] for each in usage)
    assert after[1] - before[1] == 5 + 6 + 1 == sum(each["completion_tokens"] for each in usage)


def test_numbers_that_json_does_not_have(http: httpx2.Client) -> None:
    for body in (
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "top_p": Infinity}',
        b'{"prompt": [1, NaN]}',
    ):
        answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "NaN" not in answer.text


def test_a_token_that_cannot_come_has_a_number_all_the_same() -> None:
    """-9999, as vLLM writes minus infinity."""
    never = Chosen(3, float("-inf"), 5, [(4, -0.5), (3, float("-inf"))])
    for form in (AnswerForm, Chat):
        made = form("m", str, lambda token: b"", logprobs=True).whole([Piece(0, "", [Token(never, 0)])], Usage())
        assert b"-9999.0" in made and json.loads(made)
