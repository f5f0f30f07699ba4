"""Embeddings, scores and rankings: the official clients' own calls, and what clients shouldn't do."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import ollama
import openai
import pytest
import torch
import transformers

from tests.server.running import NAME, Running, running

TEXTS = ["The cat sat on the mat.", "x", "A dog.", "Nothing at all, said at some length, and then once more."]


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[Running]:
    with running(packaged, max_num_seqs=4, max_model_len=256, tensor_parallel_size=2, overlap="iso:2") as there:
        yield there
        there.service.check_integrity()
        assert there.service.running == there.service.waiting == 0


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(packaged: Path) -> Any:
    """What transformers makes of a text."""
    model = transformers.AutoModel.from_pretrained(packaged, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged)

    def made(text: str, pooling: str = "mean", dimensions: int | None = None, unit: bool = True) -> Any:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].numpy()
        vector = (states.mean(axis=0) if pooling == "mean" else states[-1])[:dimensions]
        return vector / np.linalg.norm(vector) if unit else vector

    return made


def far(given: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(given) - expected).max())


def test_openai(client: openai.OpenAI, expected: Any) -> None:
    found = client.embeddings.create(model=NAME, input=TEXTS)
    assert [entry.index for entry in found.data] == list(range(len(TEXTS)))
    assert all(far(entry.embedding, expected(text)) < 1e-5 for entry, text in zip(found.data, TEXTS, strict=True))
    [one] = client.embeddings.create(model=NAME, input=TEXTS[0], encoding_format="float").data
    assert far(one.embedding, found.data[0].embedding) < 1e-6
    [few] = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=16).data
    assert far(few.embedding, expected(TEXTS[0], dimensions=16)) < 1e-5
    more: Any = {"pooling": "last", "normalize": False}
    [last] = client.embeddings.create(model=NAME, input=TEXTS[0], extra_body=more).data
    assert far(last.embedding, expected(TEXTS[0], "last", unit=False)) < 1e-4


def test_tokens_are_taken_too_and_counted(client: openai.OpenAI, server: Running) -> None:
    assert server.service.tokenizer is not None
    ids = [server.service.tokenizer.encode(text) for text in TEXTS]
    by_text, by_ids = (client.embeddings.create(model=NAME, input=given) for given in (TEXTS, ids))
    assert all(far(a.embedding, b.embedding) < 1e-6 for a, b in zip(by_text.data, by_ids.data, strict=True))
    assert by_text.usage.prompt_tokens == by_ids.usage.total_tokens == sum(map(len, ids))
    [one] = client.embeddings.create(model=NAME, input=ids[0]).data
    assert far(one.embedding, by_text.data[0].embedding) < 1e-6


def test_hundreds_in_one_request_beside_a_stream(client: openai.OpenAI, server: Running) -> None:
    """More than may wait at once, in their order; and a conversation goes on as it would alone."""
    asked: Any = {"model": NAME, "prompt": "Once upon", "max_tokens": 60, "temperature": 0, "stream": True}
    alone = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked))
    texts = [f"text number {number}" for number in range(600)]
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(client.embeddings.create, model=NAME, input=texts)
        beside = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked))
        found = many.result(60)
    assert beside == alone
    assert len(found.data) == 600
    for at in (0, 299, 599):
        [one] = client.embeddings.create(model=NAME, input=texts[at]).data
        assert far(one.embedding, found.data[at].embedding) < 1e-6


@pytest.fixture
def llama(server: Running) -> Iterator[ollama.Client]:
    client = ollama.Client(server.url, timeout=60)
    with closing(client._client):
        yield client


def test_ollama(llama: ollama.Client, expected: Any) -> None:
    found = llama.embed(f"{NAME}:latest", TEXTS)
    assert all(far(vector, expected(text)) < 1e-5 for vector, text in zip(found.embeddings, TEXTS, strict=True))
    assert found.prompt_eval_count and found.total_duration
    long = "word " * 400
    [cut] = llama.embed(NAME, long).embeddings
    assert len(cut) == len(found.embeddings[0])
    with pytest.raises(ollama.ResponseError, match="the context holds 256"):
        llama.embed(NAME, long, truncate=False)
    assert llama.embed(NAME, []).embeddings == []
    [few] = llama.embed(NAME, "a", dimensions=3).embeddings
    assert len(few) == 3


def test_scores_and_rankings(server: Running, expected: Any) -> None:
    with server.client() as http:
        one = http.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS}).json()
        cosines = [float(expected(TEXTS[0]) @ expected(text)) for text in TEXTS]
        assert far([entry["score"] for entry in one["data"]], cosines) < 1e-5 and one["usage"]["prompt_tokens"] > 20
        pairs = http.post("/v1/score", json={"text_1": TEXTS[:2], "text_2": TEXTS[:2][::-1]}).json()["data"]
        assert len(pairs) == 2 and pairs[0]["score"] == pytest.approx(pairs[1]["score"], abs=1e-6)
        documents = [*TEXTS[1:], {"text": TEXTS[0]}]
        ranked = http.post("/v1/rerank", json={"query": TEXTS[0], "documents": documents, "top_n": 2}).json()
        assert ranked["results"][0]["index"] == 3 and len(ranked["results"]) == 2
        assert ranked["results"][0]["document"] == {"text": TEXTS[0]}
        assert ranked["results"][0]["relevance_score"] == pytest.approx(1.0)
        bare = http.post("/v1/rerank", json={"query": "a", "documents": ["b", "c"], "return_documents": False}).json()
        assert all("document" not in each for each in bare["results"]) and len(bare["results"]) == 2


WRONG: list[tuple[str, Any, str]] = [
    ("/v1/embeddings", {"input": []}, "input: [] is no input"),
    ("/v1/embeddings", {"input": ""}, "the prompt is empty"),
    ("/v1/embeddings", {"input": ["a", ""]}, "text 1: the prompt is empty"),
    ("/v1/embeddings", {"input": ["a", 1]}, "is no input"),
    ("/v1/embeddings", {"input": [True]}, "is no input"),
    ("/v1/embeddings", {"input": [[1], [1 << 30]]}, "text 1: token id 1073741824 is not in the vocabulary"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "at most 2048"),
    ("/v1/embeddings", {"input": "a " * 300}, "the context holds 256; shorten it"),
    ("/v1/embeddings", {"input": "\ud800"}, "surrogate"),
    ("/v1/embeddings", {"input": ["\ud800"]}, "surrogate"),
    ("/v1/embeddings", {"input": "a", "dimensions": 100000}, "give at most"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, "greater than or equal to 1"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ("/v1/embeddings", {"input": "a", "pooling": "cls"}, "pooling"),
    ("/v1/embeddings", {"input": "a", "stream": True}, "stream"),
    ("/v1/embeddings", {"input": "a", "model": "other"}, "not served here"),
    ("/v1/embeddings", {}, "input: is missing"),
    ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1 has 2 texts and text_2 1"),
    ("/v1/score", {"text_1": "a"}, "text_2: is missing"),
    ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
    ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
    ("/v1/rerank", {"query": "", "documents": ["a"]}, "the prompt is empty"),
    ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
    ("/v1/rerank", {"query": "a", "documents": [{"text": "a", "image": "b"}]}, "image"),
    ("/api/embed", {"input": [1]}, "input"),
]


@pytest.mark.parametrize(("path", "body", "complaint"), WRONG)
def test_what_is_wrong_is_said(server: Running, path: str, body: Any, complaint: str) -> None:
    with server.client() as http:
        answer = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert answer.status_code == (404 if "model" in body else 400)
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert complaint in message and "\n" not in message


def test_time_is_over_and_clients_go(server: Running) -> None:
    texts = [f"{number} " * 60 for number in range(200)]
    with server.client() as http:
        late = http.post("/v1/embeddings", json={"input": texts, "timeout": 0.05})
        assert late.status_code == 408 and "the time" in late.json()["error"]["message"]
        with pytest.raises(httpx2.TimeoutException):
            http.post("/v1/embeddings", json={"input": texts}, timeout=0.2)
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    waited = 0
    while (server.service.running or server.service.waiting) and waited < 100:
        asyncio.run(asyncio.sleep(0.05))
        waited += 1
    assert server.service.running == server.service.waiting == 0


def test_a_full_queue_is_said_or_waited_for(packaged: Path) -> None:
    with running(packaged, max_num_seqs=1, most_waiting=1) as server, server.client() as http:
        found = http.post("/v1/embeddings", json={"input": [f"text {number}" for number in range(40)]})
        assert found.status_code == 200 and len(found.json()["data"]) == 40
        with ThreadPoolExecutor(3) as pool:
            asked = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
            under_way = [pool.submit(http.post, "/v1/completions", json=asked) for _ in range(2)]
            while server.service.running + server.service.waiting < 2:
                asyncio.run(asyncio.sleep(0.01))
            refused = http.post("/v1/embeddings", json={"input": ["a", "b"]})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert all(each.result(60).status_code == 200 for each in under_way)


def test_prompt_logprobs(server: Running, client: openai.OpenAI) -> None:
    with server.client() as http:
        asked = {"prompt": "the cat sat", "max_tokens": 0, "echo": True, "logprobs": 2}
        echoed = http.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
        asked = {"prompt": "the cat sat", "max_tokens": 1, "prompt_logprobs": 2, "n": 2}
        for choice in http.post("/v1/completions", json=asked).json()["choices"]:
            first, *listed = choice["prompt_logprobs"]
            assert first is None and choice["logprobs"] is None
            assert all(min(len(each), 3) == len(each) >= 2 for each in listed)
            values = [max(v["logprob"] for v in each.values() if v["decoded_token"] == token)
                      for each, token in zip(listed, echoed["tokens"][1:], strict=True)]  # fmt: skip
            assert values == pytest.approx(echoed["token_logprobs"][1:], abs=1e-5)
            assert all(1 in [v["rank"] for v in each.values()] for each in listed)
        chat: Any = {"messages": [{"role": "user", "content": "hi there"}], "max_tokens": 1, "prompt_logprobs": 0}
        told = http.post("/v1/chat/completions", json=chat).json()
        assert told["prompt_logprobs"][0] is None and len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
        assert "prompt_logprobs" not in told["choices"][0]
        for body, complaint in (({"stream": True}, "whole answers"), ({"echo": True, "logprobs": 1}, "same number"),
                                ({"prompt_logprobs": 21}, "prompt_logprobs")):  # fmt: skip
            answer = http.post("/v1/completions", json=asked | body)
            assert answer.status_code == 400 and complaint in answer.json()["error"]["message"]


def test_base64_is_the_same_numbers(server: Running) -> None:
    with server.client() as http:
        plain, coded = (
            http.post("/v1/embeddings", json={"input": "a", "encoding_format": form}).json()["data"][0]["embedding"]
            for form in ("float", "base64")
        )
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == plain
