"""llama.cpp's own completions: what a request may say, in OpenAI's terms, and the form of the answer.

Knows both protocols; knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from pydantic import Field

from weft.server.answers import AnswerForm, Json, Usage
from weft.server.manner import LLAMACPP
from weft.server.schema import MOST_BIASES, MOST_STOPS, CompletionRequest, Stop, Tokens
from weft.server.strict import Strict
from weft.server.ticket import Piece, Prefill
from weft.server.wanted import Text

STOPPED = {"length": "limit", "timeout": "limit"}


class LlamaCompletion(Strict):
    """`POST /completion`."""

    prompt: str | Tokens
    model: str | None = None
    n_predict: Annotated[int, Field(ge=-1, lt=1 << 31)] = -1
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool = False
    json_schema: dict[str, Any] | None = None
    grammar: Text | None = None
    logit_bias: Annotated[list[tuple[int, float | bool]], Field(max_length=MOST_BIASES, fail_fast=True)] | None = None
    return_progress: bool = False
    timings_per_token: bool = False
    return_tokens: bool = False
    id_slot: int | None = None  # weft finds the slot with the longest shared beginning by itself

    def chat(self) -> CompletionRequest:
        """The same in OpenAI's terms."""
        banned = -100.0  # what it writes as false
        biases = {str(token): banned if bias is False else float(bias) for token, bias in self.logit_bias or ()}
        names = ("model", "stream", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                 "stop", "ignore_eos", "return_progress")  # fmt: skip
        asked: Json = {name: getattr(self, name) for name in names} | {
            "prompt": self.prompt, "max_tokens": self.n_predict if self.n_predict >= 0 else None,
            "repetition_penalty": self.repeat_penalty, "seed": self.seed if self.seed != -1 else None,
            "logit_bias": biases or None, "guided_json": self.json_schema, "guided_grammar": self.grammar or None,
        }  # fmt: skip
        request = CompletionRequest(**asked)
        return request if self.n_predict >= 0 else request.model_copy(update={"max_tokens": None})


class LlamaForm(AnswerForm):
    """One completion."""

    manner = LLAMACPP

    def __post_init__(self) -> None:
        super().__post_init__()
        self._begun = time.monotonic()
        self._last: Piece | None = None
        self._lines = False

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """See `AnswerForm`."""
        [piece] = pieces
        self._seen(piece)
        return msgspec.json.encode(self._piece(piece) | self._over(usage))

    def chunks(self, piece: Piece, usage: Usage | None) -> list[Json]:
        """See `AnswerForm`."""
        self._seen(piece)
        return [self._piece(piece) | {"stop": False}] if piece.text else []

    def closings(self, usage: Usage, asked: bool) -> list[Json]:
        """See `AnswerForm`."""
        return [{"index": 0, "content": "", "tokens": []} | self._over(usage)]

    def progress(self, prefill: Prefill) -> list[Json]:
        """See `AnswerForm`."""
        [told] = super().progress(prefill)
        empty = {"index": 0, "content": "", "tokens": [], "stop": False}
        return [empty | {"prompt_progress": told["prompt_progress"]}]

    def _seen(self, piece: Piece) -> None:
        self._lines = self._lines or "\n" in piece.text
        if piece.finish_reason is not None:
            self._last = piece

    def _piece(self, piece: Piece) -> Json:
        return {"index": 0, "content": piece.text, "tokens": [token.chosen.token for token in piece.tokens]}

    def _over(self, usage: Usage) -> Json:
        assert self._last is not None, "an answer has an end"
        word = self._last.stop_reason if isinstance(self._last.stop_reason, str) else ""
        seconds = max(time.monotonic() - self._begun - usage.first, 1e-6)
        fresh = usage.prompt - usage.reused
        return {
            "stop": True, "model": self.model, "tokens_predicted": usage.output, "tokens_evaluated": usage.prompt,
            "tokens_cached": usage.prompt + usage.output, "has_new_line": self._lines, "truncated": False,
            "stop_type": "word" if word else STOPPED.get(str(self._last.finish_reason), "eos"), "stopping_word": word,
            "timings": {
                "cache_n": usage.reused, "prompt_n": fresh, "prompt_ms": usage.first * 1e3,
                "prompt_per_second": fresh / max(usage.first, 1e-6), "predicted_n": usage.output,
                "predicted_ms": seconds * 1e3, "predicted_per_second": max(0, usage.output - 1) / seconds,
            },
        }  # fmt: skip
