"""Random requests, and what each must be answered: from the tokens that the engine gives it alone, and from nothing
else of weft's. Texts, ends and the bytes of tokens are worked out here once more, in the plainest way.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.fuzz import faults
from benchmarks.fuzz.models import PIECES, SPECIAL, Reference
from weft.batching.params import SamplingParams
from weft.completion import Completion
from weft.engine import Engine
from weft.errors import InputError, RequestFailed
from weft.llm import default_params
from weft.server.chat import ChatRequest
from weft.server.schema import CompletionRequest

SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["ab", "cd"]}, {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                             "additionalProperties": False}, {"type": "boolean"},
]  # fmt: skip
MALFORMED: tuple[Any, ...] = (
    b"{", b"", b"[1]", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "min_p": -Infinity}',
    b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": NaN}}}}',
    {"prompt": ""}, {"prompt": [0, 1 << 30]}, {"prompt": [-1]}, {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "max_tokens": -1}, {"prompt": "a", "max_tokens": 0}, {"prompt": "a", "unknown": 1},
    {"prompt": [5] * 5000}, {"prompt": "a", "n": 10**6}, {"prompt": "a", "stop": [""]}, {"prompt": "a", "top_p": 0},
    {"prompt": "a", "stop_token_ids": [10**6]}, {"prompt": "a", "logprobs": 1e3}, {"prompt": ["a", 1]},
    {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
    {"prompt": "a", "seed": 1 << 80}, {"prompt": "\ud800"}, {"prompt": "a", "model": "another"}, {"prompt": [True]},
)  # fmt: skip


@dataclass
class Case:
    """A request and what it gets alone: choices as JSON, or an error. `prompt`: its tokens; `source`: the request whose
    prompt and answer it goes on with."""

    chat: bool
    body: dict[str, Any]
    params: SamplingParams
    prompt: tuple[int, ...]
    source: Case | None = None
    choices: list[dict[str, Any]] = field(default_factory=list)
    refused: bool = False
    scores: list[float] | None = None  # of the prompt, by transformers

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class Cases:
    """Draws requests for one engine, and answers each alone."""

    def __init__(self, engine: Engine, reference: Reference, seed: int) -> None:
        assert engine.tokenizer is not None
        self.engine, self.reference, self.draw = engine, reference, random.Random(seed)
        self.tokenizer = engine.tokenizer
        self.backend = engine.tokenizer._hf.backend_tokenizer
        self.special = frozenset(self.backend.token_to_id(token) for token in SPECIAL)
        self.proposed = default_params(engine.path)
        size = self.backend.get_vocab_size()
        # Some of which end a little before a multiple of 128, the granule of --reproducible.
        self.beginnings = [[self.draw.randrange(3, size) for _ in range(length)] for length in (40, 115, 240, 300)]
        self.answered: list[tuple[list[int], Case]] = []  # prompts with their answers, which others go on with
        self.source: Case | None = None  # of the prompt that was drawn last

    def make(self) -> Case:
        """One that is well-formed, though the model's tokenizer may not be able to do what it asks."""
        draw, chat = self.draw, self.draw.random() < 0.2
        given: Any = self._prompt()
        body: dict[str, Any] = {
            "max_tokens": draw.choice((1, 3, 8, 16, 30)),
            "temperature": draw.choice((0, 0.7, 1, 3)),
        }
        if chat:
            given = given if isinstance(given, str) else self.tokenizer.decode(given)
            body["messages"] = [{"role": "user", "content": given}]
            prompt = tuple(self.tokenizer.chat(body["messages"]))
        else:
            body["prompt"] = given
            prompt = tuple(self.tokenizer.encode(given) if isinstance(given, str) else given)
        self._wishes(body, chat)
        body["seed"] = draw.randrange(1000)
        asked: Any = (ChatRequest if chat else CompletionRequest).model_validate(body)
        logprobs = (asked.top_logprobs or 0) if chat and asked.logprobs else None if chat else asked.logprobs
        scored = logprobs if not chat and asked.echo else None
        scored = 0 if scored is None and asked.max_tokens == 0 else scored
        shape = asked.shape()
        more = {"logprobs": logprobs, "prompt_logprobs": scored, **(shape.alone() if shape is not None else {})}
        return Case(chat, body, asked.params(self.proposed, asked.max_tokens, **more), prompt, self.source)

    def _prompt(self) -> str | list[int]:
        """As text or as tokens, a good part of it shared with others."""
        draw = self.draw
        if draw.random() < 0.3:
            return "".join(draw.choice([*PIECES, " "]) for _ in range(draw.randrange(1, 40)))
        self.source = None
        if self.answered and draw.random() < 0.2:
            across = [each for each in self.answered if len(each[0]) // 128 > len(each[1].prompt) // 128]
            tokens, self.source = draw.choice(across or self.answered)
            return tokens + [draw.randrange(3, self.backend.get_vocab_size()) for _ in range(5)]
        begin = draw.choice(self.beginnings) if draw.random() < 0.5 else []
        begin = begin[: draw.randrange(1, len(begin) + 1)] if begin and draw.random() < 0.5 else begin
        size = self.backend.get_vocab_size()
        return begin + [draw.randrange(3, size) for _ in range(draw.randrange(1, 30))]

    def _wishes(self, body: dict[str, Any], chat: bool) -> None:
        """Some of the fields, each sometimes."""
        draw = self.draw
        some: dict[str, Any] = {
            "n": 2, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "presence_penalty": 1.0, "frequency_penalty": -0.5,
            "repetition_penalty": 1.3, "ignore_eos": True, "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "stop_token_ids": [draw.randrange(self.backend.get_vocab_size()) for _ in range(3)],
            "response_format": {"type": "json_schema", "json_schema": {"schema": draw.choice(SCHEMAS)}},
        }  # fmt: skip
        body |= {name: value for name, value in some.items() if draw.random() < 0.12}
        if draw.random() < 0.4:
            body["stop"] = [self._stop() for _ in range(draw.randrange(1, 4))]
        if draw.random() < (0.5 if "stop" in body else 0.15):  # together they are where a text may end wrongly
            body["min_tokens"] = draw.randrange(1, 12)
        if draw.random() < 0.4:
            body |= {"logprobs": True, "top_logprobs": draw.randrange(4)} if chat else {"logprobs": draw.randrange(4)}
        if not chat and draw.random() < 0.3:
            body["echo"] = True
            body["max_tokens"] = draw.choice((0, 1, body["max_tokens"]))

    def _stop(self) -> str:
        return "".join(self.draw.choice([*PIECES, " "]) for _ in range(self.draw.choice((1, 1, 1, 2))))

    def harmful(self, kind: str) -> Case:
        """One that brings a fault."""
        body: dict[str, Any] = {"prompt": "the", "max_tokens": 20, "temperature": 1.0, "ignore_eos": True,
                                "seed": faults.seed_of(kind)}  # fmt: skip
        if kind.startswith("grammar"):
            body["response_format"] = {"type": "json_object"}
        asked = CompletionRequest.model_validate(body)
        return Case(False, body, asked.params(self.proposed, 20), tuple(self.tokenizer.encode("the")))

    def answer(self, case: Case) -> None:
        """Runs it alone, on an engine that does nothing else and remembers nothing, and works out what it gets."""
        engine = self.engine
        engine.batcher.forget_prefixes()
        try:
            # Without stop texts: where they end an answer is worked out below.
            request = engine.add(case.prompt, replace(case.params, stop=None))
        except InputError:
            case.refused = True
            return
        while not engine.batcher.idle:
            engine.step()
        if request.error:
            raise RequestFailed(request.error)
        if case.params.prompt_logprobs is not None:
            case.scores = self.reference.scores(list(case.prompt))
        pairs = zip(request.sequences, engine.requests.settle(request), strict=True)
        if len(case.prompt) < 400:
            self.answered += [([*case.prompt, *sequence.output], case) for sequence in request.sequences]
        case.choices = [self._choice(case, s.index, list(s.output), c, s.finish_reason) for s, c in pairs]

    def _choice(self, case: Case, index: int, tokens: list[int], completion: Completion, reason: Any) -> dict[str, Any]:
        ends = completion.ends if reason == "stop" and tokens and tokens[-1] in completion.ends else frozenset()
        text, count, stop = self._text(case, tokens[:-1] if ends else tokens)
        if stop is not None:
            tokens, reason = tokens[:count], "stop"
        elif ends and tokens[-1] in completion.own_ends:
            stop = tokens[-1]  # type: ignore[assignment]
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": reason, "stop_reason": stop}
        if case.params.logprobs is not None:
            chosen = completion.chosen[: len(tokens)]
            choice["tokens"] = tokens
            choice["logprobs"] = [each.logprob for each in chosen]
            choice["top"] = [each.top for each in chosen]
        if case.params.json_schema and reason == "stop" and stop is None and not case.params.stops:
            json.loads(text)
        return choice

    def _text(self, case: Case, tokens: list[int]) -> tuple[str, int, str | None]:
        """The answer's text, how many tokens it took and the stop text that ended it: tried token by token."""
        params, before = case.params, ""
        for count in range(1, len(tokens) + 1):
            text = self.decoded(case, tokens[:count])
            if count >= params.min_tokens:
                found = [(text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in params.stops]
                if any(at >= 0 for at, _ in found):
                    at, stop = min((at, stop) for at, stop in found if at >= 0)
                    return text[: at + (len(stop) if params.include_stop_str_in_output else 0)], count, stop
            # Bytes that are no character yet may become one; then it is new.
            before = text.rstrip("�")
        return self.decoded(case, tokens), len(tokens), None

    def decoded(self, case: Case, tokens: list[int]) -> str:
        """All tokens decoded together, behind the last one of the prompt that is no part of a character."""
        skip = case.params.skip_special_tokens
        if self.backend.token_to_id("<0x00>") is None and "ByteLevel" in str(self.backend.decoder):
            return str(self.backend.decode(tokens, skip_special_tokens=skip))  # bytes have no neighbours
        seen = [t for t in case.prompt if not (skip and t in self.special)]
        anchor = next((t for t in reversed(seen) if not self.backend.id_to_token(t).startswith("<0x")), None)
        before = [] if anchor is None else [anchor]
        if anchor is None and seen:  # bytes alone: they keep the space that a text would lose
            before = [self.backend.token_to_id("a")]
        whole = self.backend.decode([*before, *tokens], skip_special_tokens=skip)
        return str(whole[len(self.backend.decode(before, skip_special_tokens=skip)) :])
