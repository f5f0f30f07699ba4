"""Lines of a log, ids of requests, and prefixes that tell nobody else what was said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import NAME, Running, running
from weft.server.app import Settings

SECRET = "secret-key-1"
PROMPT = "The for statement is used to iterate over the elements of a sequence, such as a string, tuple or list, " * 3


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def server(packaged: Path, lines: list[str]) -> Iterator[Running]:
    settings = Settings(NAME, keys=[SECRET, "two"], log=lines.append, isolated=True)
    with running(packaged, settings, max_num_seqs=2) as there:
        yield there
        there.service.check_integrity()


def told_of(lines: list[str], count: int) -> list[dict[str, Any]]:
    """So many lines: each comes once its answer has gone, which the client may have seen before."""
    until = time.monotonic() + 10
    while len(lines) < count and time.monotonic() < until:
        time.sleep(0.01)
    return [json.loads(line) for line in lines]


def headers(key: str = SECRET) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_line_says_how_much_and_not_what(server: Running, lines: list[str]) -> None:
    lines.clear()
    body = {"prompt": "Said in confidence", "max_tokens": 3, "seed": 1}
    with server.client(headers=headers()) as http:
        whole = http.post("/v1/completions", json=body)
        streamed = http.post("/v1/completions", json=body | {"stream": True}, headers={"x-request-id": "mine-1.a:b_c"})
        refused = http.post("/v1/completions", json={"prompt": ""})
        http.get("/health")
    stranger = server.client().post("/v1/completions", json=body, headers={"x-api-key": "wrong-key"})
    told = told_of(lines, 5)
    assert [line["status"] for line in told] == [200, 200, 400, 200, 401]
    assert [line["path"] for line in told][2:] == ["/v1/completions", "/health", "/v1/completions"]
    answers = [whole, streamed, refused, None, stranger]
    for line, answer in zip(told, answers, strict=True):
        assert answer is None or answer.headers["x-request-id"] == line["id"]
        assert line["ms"] > 0 and line["client"] == "127.0.0.1" and line["time"].startswith("20")
    assert told[1]["id"] == "mine-1.a:b_c" and told[0]["id"].startswith("req_") and told[0]["id"] != told[2]["id"]
    for line in told[:2]:
        assert line["prompt_tokens"] == whole.json()["usage"]["prompt_tokens"] and line["output_tokens"] == 3
        assert 0 < line["first_ms"] <= line["ms"] and line["key"] == "0"
    assert "output_tokens" not in told[2] and told[4]["key"] is None
    everything = "\n".join(lines)
    assert not any(word in everything for word in ("confidence", SECRET, "two", "wrong-key", "Bearer"))


@pytest.mark.parametrize("given", ["a b", 'x"', "y" * 129, "", "a\tb"])
def test_an_id_that_would_forge_lines_is_replaced(server: Running, lines: list[str], given: str) -> None:
    lines.clear()
    with server.client(headers=headers()) as http:
        answer = http.get("/v1/models", headers={"x-request-id": given.encode("latin-1")})
    assert answer.headers["x-request-id"].startswith("req_") and told_of(lines, 1)[0]["id"].startswith("req_")


def test_text_if_it_is_wished_for(packaged: Path) -> None:
    lines: list[str] = []
    with running(packaged, Settings(NAME, log=lines.append, log_text=True)) as there, there.client() as http:
        http.post("/v1/completions", json={"prompt": "Said aloud", "max_tokens": 1})
        http.post("/v1/completions", json={"prompt": "x" * 20_000, "max_tokens": 1})
    first, second = told_of(lines, 2)
    assert "Said aloud" in first["body"] and len(second["body"]) == 10_000


def test_prefixes_are_shared_within_a_key_and_a_salt(server: Running) -> None:
    def reused(key: str, salt: str | None = None) -> int:
        body = {"prompt": PROMPT, "max_tokens": 1, "cache_salt": salt}
        with server.client(headers=headers(key)) as http:
            usage = http.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert reused(SECRET) == 0 and reused(SECRET) > 20
    assert reused("two") == 0 and reused("two") > 20 and reused(SECRET) > 20
    assert reused("two", "a") == 0 and reused("two", "b") == 0 and reused("two", "a") > 20
