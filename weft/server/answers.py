"""What completions and chats look like as OpenAI's JSON, whole and in chunks. Knows pieces; knows no HTTP."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from weft.execute.protocol import Chosen
from weft.server.manner import OPENAI
from weft.server.strict import no_constant
from weft.server.ticket import Piece, Prefill, Ticket, Token
from weft.speech.dialect import Dialect
from weft.speech.listener import Called, Given, Listener, Part, Said, Speech, Thought, listener

Json = dict[str, Any]
LEAST = -9999.0  # as a log-probability, instead of minus infinity, which JSON doesn't have


@dataclass
class Usage:
    """Tokens of one request, and how long the first one took."""

    prompt: int = 0
    reused: int = 0
    output: int = 0
    first: float = 0.0  # seconds until the first one

    @classmethod
    def of(cls, tickets: Sequence[Ticket]) -> Usage:
        """All prompts of one request."""
        usage = cls()
        for ticket in tickets:
            usage.add(ticket)
        return usage

    def add(self, ticket: Ticket) -> None:
        """One more prompt's."""
        self.prompt += ticket.prompt_tokens
        self.reused += ticket.reused
        self.output += ticket.tokens
        self.first = max(self.first, ticket.first or 0.0)

    def told(self) -> Json:
        """For who looks at what the server does."""
        return {"prompt_tokens": self.prompt, "cached_tokens": self.reused, "output_tokens": self.output,
                "first_ms": round(self.first * 1e3, 1)}  # fmt: skip

    def json(self) -> Json:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.output, "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }  # fmt: skip


@dataclass
class AnswerForm:
    """Completions' form; `Chat` is the other one. `text_of`, `bytes_of`: a token's, for log-probabilities."""

    model: str
    text_of: Callable[[int], str]
    bytes_of: Callable[[int], bytes]
    logprobs: bool = False
    hearing: Hearing | None = None  # of chats
    about: Json = field(default_factory=dict)  # what the answer says again of its request
    finished: Callable[[Json], None] | None = None  # is told the whole answer, where a form has such
    scored: bool = False  # whole answers say how likely the prompt's tokens were
    created: int = field(default_factory=lambda: int(time.time()))
    prefix = "cmpl"
    manner = OPENAI
    whole_kind = chunk_kind = "text_completion"

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def _frame(self, kind: str, choices: Sequence[Json | msgspec.Raw]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """The answer to a request without streaming, as JSON; `pieces` hold one completion each."""
        # Each written by itself: all in one go would keep the interpreter from everything else for as long.
        choices = [msgspec.Raw(msgspec.json.encode(self._choice(piece))) for piece in pieces]
        more = {"usage": self._counted(usage)} | self._more(pieces)
        return msgspec.json.encode(self._frame(self.whole_kind, choices) | more)

    def chunks(self, piece: Piece, usage: Usage | None) -> list[Json]:
        """What a piece of a completion makes known; `usage`: so far, for who asked for it with every piece."""
        delta, more = self._delta(piece), {"usage": usage.json()} if usage is not None else {}
        return [self._frame(self.chunk_kind, [delta]) | more] if delta is not None else []

    def openings(self, count: int, usage: Usage) -> list[Json]:
        """What comes before a stream's first piece."""
        return []

    def closings(self, usage: Usage, asked: bool) -> list[Json]:
        """What comes behind the last one. `asked`: for tokens."""
        return [self._frame(self.chunk_kind, []) | {"usage": self._counted(usage)}] if asked else []

    def _counted(self, usage: Usage) -> Json:
        """All tokens, once the answer is over."""
        return usage.json()

    def progress(self, prefill: Prefill) -> list[Json]:
        """How far a prompt is, in llama.cpp's form."""
        state = {"total": prefill.total, "cache": prefill.reused, "processed": prefill.done,
                 "time_ms": round(prefill.seconds * 1e3)}  # fmt: skip
        return [self._frame(self.chunk_kind, []) | {"prompt_progress": state}]

    def _more(self, pieces: Sequence[Piece]) -> Json:
        """What a whole answer says beside."""
        return {}

    def _choice(self, piece: Piece) -> Json:
        said = {"text": piece.text, "logprobs": self._logprobs(piece.tokens)}
        return self._ended(piece) | said | self._prompt_logprobs(piece)

    def _prompt_logprobs(self, piece: Piece) -> Json:
        """How likely the prompt's tokens were, in vLLM's form: nothing of the first one."""
        if not self.scored:
            return {}
        listed: list[Json | None] = [None]
        for chosen in piece.scores:
            listed.append({
                str(token): {"logprob": _number(value), "rank": rank, "decoded_token": self.text_of(token)}
                for token, (value, rank) in chosen.ranked().items()
            })  # fmt: skip
        return {"prompt_logprobs": listed}

    def _delta(self, piece: Piece) -> Json | None:
        return self._choice(piece)

    def _ended(self, piece: Piece) -> Json:
        more = {"stop_reason": piece.stop_reason} if piece.stop_reason is not None else {}
        return {"index": piece.index, "finish_reason": piece.finish_reason, **more}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.logprobs:
            return None
        names = [self._names(token.chosen) for token in tokens]
        return {
            "tokens": [named[token.chosen.token] for named, token in zip(names, tokens, strict=True)],
            "token_logprobs": [_number(token.chosen.logprob) if token.scored else None for token in tokens],
            "text_offset": [token.offset for token in tokens],
            "top_logprobs": [
                {named[other]: _number(value) for other, value in token.chosen.top} if token.scored else None
                for named, token in zip(names, tokens, strict=True)
            ],
        }

    def _names(self, chosen: Chosen) -> dict[int, str]:
        """What a token and its alternatives are called: by their texts, and of two that look alike the less likely one
        by its id, as vLLM writes it."""
        named: dict[int, str] = {}
        for token in dict.fromkeys([*(token for token, _ in chosen.top), chosen.token]):
            text = self.text_of(token)
            named[token] = text if text not in named.values() else f"token_id:{token}"
        return named


@dataclass
class Chat(AnswerForm):
    """Chats' form."""

    heard: dict[int, Heard] = field(default_factory=dict)  # by completion
    prefix = "chatcmpl"
    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def openings(self, count: int, usage: Usage) -> list[Json]:
        """The role of every completion."""
        role = {"role": "assistant", "content": ""}
        choice = {"delta": role, "finish_reason": None, "logprobs": None}
        return [self._frame(self.chunk_kind, [{"index": index, **choice}]) for index in range(count)]

    def _choice(self, piece: Piece) -> Json:
        said: Json = {"content": piece.text, "reasoning_content": None}
        ended = self._ended(piece)
        if self.hearing is not None:
            heard = self.heard[piece.index] = Heard(self.hearing)
            said = {"content": None, "reasoning_content": None} | heard.message(heard.parts(piece, last=True))
            ended |= heard.reason(piece)
        message = {"role": "assistant", **said, "refusal": None}
        return ended | {"message": message, "logprobs": self._logprobs(piece.tokens)}

    def _more(self, pieces: Sequence[Piece]) -> Json:
        return self._prompt_logprobs(pieces[0])

    def _counted(self, usage: Usage) -> Json:
        if self.hearing is None:
            return usage.json()
        thought = sum(heard.tokens_of_thoughts for heard in self.heard.values())
        return usage.json() | {"completion_tokens_details": {"reasoning_tokens": thought}}

    def _delta(self, piece: Piece) -> Json | None:
        if self.hearing is None:
            content: Json = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
            return self._ended(piece) | {"delta": content, "logprobs": self._logprobs(piece.tokens)}
        if (heard := self.heard.get(piece.index)) is None:
            heard = self.heard[piece.index] = Heard(self.hearing)
        content = heard.delta(heard.parts(piece, last=piece.finish_reason is not None))
        if not content and piece.finish_reason is None and not (self.logprobs and piece.tokens):
            return None
        ended = self._ended(piece) | heard.reason(piece)
        return ended | {"delta": content, "logprobs": self._logprobs(piece.tokens)}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.logprobs:
            return None
        listed = [token.chosen for token in tokens]
        return {"content": [self._entry(c.token, c.logprob) | {"top_logprobs": self._top(c)} for c in listed]}

    def _top(self, chosen: Chosen) -> list[Json]:
        return [self._entry(token, value) for token, value in chosen.top]

    def _entry(self, token: int, value: float) -> Json:
        return {"token": self.text_of(token), "logprob": _number(value), "bytes": list(self.bytes_of(token))}


@dataclass(frozen=True)
class Hearing:
    """How answers are taken apart. `hidden`: texts of special tokens that are no text."""

    dialect: Dialect
    speech: Speech
    hidden: Collection[str]

    def listener(self) -> Listener:
        """For one completion."""
        speech = self.speech
        return listener(self.dialect, frozenset(speech.tools), speech.thinking, self.hidden, speech.goes_on)


class Heard:
    """One completion's text, taken apart, in OpenAI's form."""

    def __init__(self, hearing: Hearing | None) -> None:
        self._hearing, self._listener = hearing, hearing.listener() if hearing is not None else None
        self._calls, self._called, self._thought = 0, False, False
        self._said: list[str] = []
        self._offsets: list[int] = []

    def call_id(self) -> str:
        """A new call's."""
        return self._hearing.dialect.call_id() if self._hearing is not None else ""

    def parts(self, piece: Piece, last: bool) -> list[Part]:
        """What its characters make known."""
        text = piece.text
        if self._listener is None:
            return [Said(text)] if text else []
        self._said.append(text)
        self._offsets += [token.offset for token in piece.tokens]
        parts = self._listener.grow(text) + (self._listener.end() if last else [])
        self._called = self._called or any(isinstance(part, Called) for part in parts)
        self._thought = self._thought or any(isinstance(part, Thought) for part in parts)
        return parts

    @property
    def tokens_of_thoughts(self) -> int:
        """So far, by the characters before each token."""
        if not self._thought or self._hearing is None:
            return 0
        text = "".join(self._said)
        places = [at for mark in self._hearing.dialect.thought_ends if (at := text.find(mark)) >= 0]
        return sum(offset < min(places, default=len(text) + 1) for offset in self._offsets)

    def reason(self, piece: Piece) -> Json:
        """Why it ended, where it isn't as the engine says."""
        return {"finish_reason": "tool_calls"} if self._called and piece.finish_reason == "stop" else {}

    def message(self, parts: Sequence[Part]) -> Json:
        """Of all parts of an answer."""
        made = self.delta(parts)
        for call in made.get("tool_calls", ()):
            del call["index"]
            call["function"]["arguments"] = call["function"]["arguments"] or "{}"
        return made

    def delta(self, parts: Sequence[Part]) -> Json:
        """Of some parts; of several that are alike, one."""
        made: Json = {}
        calls: list[Json] = []
        for part in parts:
            match part:
                case Said(text):
                    made["content"] = made.get("content", "") + text
                case Thought(text):
                    made["reasoning_content"] = made.get("reasoning_content", "") + text
                case Called(name):
                    calls.append({
                        "index": self._calls, "id": self.call_id(), "type": "function",
                        "function": {"name": name, "arguments": ""},
                    })  # fmt: skip
                    self._calls += 1
                case Given(text):
                    if not calls:
                        calls.append({"index": self._calls - 1, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        return made | ({"tool_calls": calls} if calls else {})


def whole_object(arguments: str) -> msgspec.Raw | None:
    """A call's arguments as an object, as they were written; None of those that were cut short."""
    try:
        json.loads(arguments, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    return msgspec.Raw(arguments.encode())


def _number(logprob: float) -> float:
    return max(logprob, LEAST)
