"""What else the fuzz asks for: embeddings, and the same answers by other protocols. Each must be what it is alone."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

from benchmarks.fuzz.cases import Case
from benchmarks.fuzz.models import Reference

CLOSE = 1e-3  # to transformers', of vectors of length 1
SAME = 1e-6  # to what the same prompt gave before, whatever it was computed beside


@dataclass(frozen=True)
class Protocol:
    """How another protocol says what a case asks. `fields`: its names for OpenAI's, where it has them; `wrapped`: what
    holds these; `greedy`: it has no seed; `text`: of a whole answer, or of an event of a stream."""

    path: str
    chat: bool
    fields: dict[str, str]
    text: Callable[[dict[str, Any]], str]
    wrapped: str = ""
    greedy: bool = False
    lines: bool = False  # of JSON, instead of server-sent events
    fixed: tuple[tuple[str, Any], ...] = ()

    def body(self, case: Case) -> dict[str, Any] | None:
        """None if it can't say that."""
        given = {name: value for name, value in case.body.items() if name not in ("prompt", "messages")}
        if self.greedy and given.get("temperature") == 0:
            given.pop("seed", None)
        if case.chat != self.chat or not given.keys() <= self.fields.keys():
            return None
        named = {self.fields[name]: value for name, value in given.items()}
        asked = {"input": case.body["messages"]} if self.path == "/v1/responses" else {
            name: case.body[name] for name in ("prompt", "messages") if name in case.body
        }  # fmt: skip
        if self.path == "/api/generate" and not isinstance(asked["prompt"], str):
            return None
        return asked | ({self.wrapped: named} if self.wrapped else named) | dict(self.fixed)


_SAMPLING = {name: name for name in ("temperature", "top_p", "top_k")}
_MORE = _SAMPLING | {name: name for name in ("min_p", "seed", "stop", "presence_penalty", "frequency_penalty")}
_MORE |= {"repetition_penalty": "repeat_penalty"}


def _said(event: dict[str, Any]) -> str:
    """Of a response, or of an event of it."""
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    parts = (part for item in event.get("output", ()) if item["type"] == "message" for part in item["content"])
    return "".join(part["text"] for part in parts)


def _blocks(event: dict[str, Any]) -> str:
    if event.get("type") == "content_block_delta":
        return str(event["delta"].get("text", ""))
    blocks = event.get("content", ()) if event.get("type") == "message" else ()
    return "".join(block.get("text", "") for block in blocks)


PROTOCOLS = (
    Protocol("/completion", False, _MORE | {"max_tokens": "n_predict", "ignore_eos": "ignore_eos"},
             lambda event: event["content"]),
    Protocol("/api/generate", False, _MORE | {"max_tokens": "num_predict"}, lambda event: event["response"],
             "options", lines=True, fixed=(("raw", True),)),
    Protocol("/api/chat", True, _MORE | {"max_tokens": "num_predict"}, lambda event: event["message"]["content"],
             "options", lines=True),
    Protocol("/v1/responses", True, {"max_tokens": "max_output_tokens", "temperature": "temperature", "top_p": "top_p"},
             _said, greedy=True),
    Protocol("/v1/messages", True, _SAMPLING | {"max_tokens": "max_tokens", "stop": "stop_sequences"}, _blocks,
             greedy=True),
)  # fmt: skip


class Others:
    """Asks a server for them. `wrong`: is told what must not be."""

    def __init__(
        self, reference: Reference, draw: random.Random, wrong: Callable[[str, str, Case | None], None]
    ) -> None:
        self._reference, self._draw, self._wrong = reference, draw, wrong
        self._seen: dict[tuple[int, ...], Any] = {}

    async def vectors(self, http: httpx2.AsyncClient, cases: list[Case]) -> int:
        """Embeddings of some prompts; returns how many tokens they have."""
        form = self._draw.choice(("float", "base64"))
        body = {"input": [list(case.prompt) for case in cases], "encoding_format": form}
        answer = await http.post("/v1/embeddings", json=body)
        if answer.status_code != 200:
            self._wrong("vectors", f"{answer.status_code}: {answer.text}", cases[0])
            return 0
        for case, entry in zip(cases, answer.json()["data"], strict=True):
            given = entry["embedding"]
            vector = np.array(given) if form == "float" else np.frombuffer(base64.b64decode(given), "<f4")
            self._compare(case, vector)
        return sum(len(case.prompt) for case in cases)

    def _compare(self, case: Case, vector: Any) -> None:
        states = np.array(self._reference.states(list(case.prompt)))
        mean = states.mean(axis=0)
        far = np.abs(vector - mean / np.linalg.norm(mean)).max()
        if not far <= CLOSE:
            self._wrong("vectors", f"{far} from transformers'", case)
        if not np.abs(self._seen.setdefault(case.prompt, vector) - vector).max() <= SAME:
            self._wrong("vectors", "not what the same prompt gave before", case)

    def sayable(self, case: Case) -> list[tuple[Protocol, dict[str, Any]]]:
        """By which other protocols it can be asked, and how."""
        if case.refused or case.params.n != 1:
            return []
        return [(protocol, body) for protocol in PROTOCOLS if (body := protocol.body(case)) is not None]

    async def foreign(self, http: httpx2.AsyncClient, case: Case) -> None:
        """The case by one of those."""
        protocol, body = self._draw.choice(self.sayable(case))
        stream = self._draw.random() < 0.5
        answer = await http.post(protocol.path, json=body | {"stream": stream})
        if answer.status_code != 200:
            self._wrong(protocol.path, f"{answer.status_code}: {answer.text}", case)
            return
        events = list(_events(answer.text, protocol.lines)) if stream else [answer.json()]
        text = "".join(protocol.text(event) for event in events)
        if text != case.choices[0]["text"]:
            self._wrong(protocol.path, f"{text!r} instead of {case.choices[0]['text']!r}, stream {stream}", case)


def _events(text: str, lines: bool) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        content = line if lines else line.removeprefix("data: ") if line.startswith("data: ") else ""
        if content and content != "[DONE]":
            yield json.loads(content)
