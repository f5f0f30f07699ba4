"""Answering: a request's completions as they come, whole or as a stream, in a protocol's form.

Knows the service, readers and forms; knows nothing of which endpoints there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from weft.batching.params import SamplingParams
from weft.execute.protocol import Chosen
from weft.grammar import Grammar
from weft.server.answers import AnswerForm, Hearing, Json, Usage
from weft.server.asked import Answered, Asked, unpacked
from weft.server.beside import Beside
from weft.server.client import EngineClient
from weft.server.guard import OWNER, Scope
from weft.server.logged import TOKENS
from weft.server.manner import JSON
from weft.server.refused import unknown_model
from weft.server.schema import MOST_LOGPROBS
from weft.server.stream import Event, events, unless_gone, whole
from weft.server.ticket import Piece, Prefill, Ticket, Token, Wishes
from weft.server.vectorising import Vectorising
from weft.server.vectors import VectorForm

A = TypeVar("A")
P = ParamSpec("P")
_dump = msgspec.json.encode  # a tenth of the time of Python's own
QUIET = 10.0  # seconds without a piece after which a stream says that it is alive
LONG = 20_000  # characters of an answer that is better made beside the loop


@dataclass(frozen=True)
class Echo:
    """A prompt's text and tokens, and the characters before each."""

    text: str
    tokens: list[int]
    offsets: list[int]

    def before(self, piece: Piece) -> Piece:
        """A completion's first piece with the prompt before it."""
        # What there was no time to score has an entry all the same.
        unknown = [Token(Chosen(token), offset, False) for token, offset in zip(self.tokens, self.offsets, strict=True)]
        scored = list(map(Token, piece.scores, self.offsets[1:]))
        prompt = [*unknown[:1], *scored, *unknown[1 + len(scored) :]]
        return replace(self.after(piece), text=self.text + piece.text, tokens=prompt + self.after(piece).tokens)

    def after(self, piece: Piece) -> Piece:
        """Any other piece of it: its tokens stand behind the prompt."""
        return replace(piece, tokens=[token._replace(offset=token.offset + len(self.text)) for token in piece.tokens])


@dataclass(frozen=True)
class Api:
    """What endpoints need. `beside`: reads bodies. `name`: the model's, as clients call it. `timeout`: seconds that a
    request may take; `isolated`: prefixes are shared within a key alone."""

    service: EngineClient
    beside: Beside
    name: str
    timeout: float | None
    isolated: bool = False

    def demand(self, model: str) -> None:
        """Raises if another model is asked for."""
        if model != self.name:
            raise unknown_model(model, self.name)

    def text_of(self, token: int) -> str:
        """One token's; without a tokenizer its number."""
        tokenizer = self.service.tokenizer
        return tokenizer.spelling.text_of(token) if tokenizer else f"token_id:{token}"

    def bytes_of(self, token: int) -> bytes:
        """The same in bytes."""
        tokenizer = self.service.tokenizer
        return tokenizer.spelling.bytes_of(token) if tokenizer else b""

    async def read(self, request: Request, given: tuple[str, bytes] | None = None) -> Asked | Answered:
        """What its body asks for; or a path and a body in their place. Raises what it is refused for, and `Gone`."""
        path, body = given or (request.scope["route"].path, await request.body())
        if (read := self.beside.at_once(path, body)) is not None:
            return read
        return await unless_gone(request.receive, self.beside.read(path, body, _asker(request)))

    async def grammar(self, schema: str, request: Request) -> Grammar:
        """A schema's; tried beside first, within limits. Raises what it is refused for, and `Gone`."""
        if (kept := self.service.kept_grammar(schema)) is not None:
            return kept

        async def made() -> Grammar:
            await self.beside.try_schema(schema, _asker(request))
            return await self.service.grammar(schema)

        return await unless_gone(request.receive, made())

    def hearing(self, asked: Asked) -> Hearing | None:
        """How the answer is to be taken apart."""
        tokenizer, speech = self.service.tokenizer, asked.speech
        if speech is None or tokenizer is None:
            return None
        return Hearing(tokenizer.dialect(bool(speech.tools)), speech, tokenizer.special if speech.hides else ())

    def wishes(self, asked: Asked, request: Request, arrived: float) -> Wishes:
        """What a request asks of the service."""
        times = [seconds for seconds in (asked.timeout, self.timeout) if seconds is not None]
        owner = request.scope.get(OWNER, "")
        salt = f"{owner if self.isolated else ''}/{asked.salt}"
        return Wishes(asked.priority, owner, min(times, default=None), arrived, salt)


def _asker(request: Request) -> str:
    """Who takes turns with others: by key, or else by address."""
    return str(request.scope.get(OWNER) or (request.client.host if request.client else ""))


async def _beside(size: int, work: Callable[P, A], *arguments: P.args, **options: P.kwargs) -> A:
    """At once, or on a thread where it would keep other requests waiting."""
    return await asyncio.to_thread(work, *arguments, **options) if size > LONG else work(*arguments, **options)


async def answered(
    api: Api, request: Request, form: type[AnswerForm], given: tuple[str, bytes] | None = None,
    finished: Callable[[Json], None] | None = None,
) -> Response:  # fmt: skip
    """What a request asks for, in a form. `given`: see `Api.read`; `finished`: see `AnswerForm`."""
    arrived = time.monotonic()
    asked = await api.read(request, given)
    if isinstance(asked, Answered):  # without the model
        return Response(asked.body, media_type=JSON)
    params = SamplingParams(**asked.params)
    grammar = await api.grammar(params.form, request) if params.form else None
    hearing = api.hearing(asked)
    shape = form(api.name, api.text_of, api.bytes_of, asked.logprobs, hearing, asked.about, finished, asked.scored)
    return await _answer(api, asked, params, api.wishes(asked, request, arrived), grammar, shape, request.scope)


async def embedded(api: Api, request: Request, form: type[VectorForm]) -> Response:
    """The vectors that a request asks for, in a form."""
    arrived = time.monotonic()
    asked = await api.read(request)
    if isinstance(asked, Answered):
        return Response(asked.body, media_type=JSON)
    shape = form(api.name, asked.about)
    made = Vectorising(api.service, SamplingParams(**asked.params), api.wishes(asked, request, arrived))
    request.scope[TOKENS] = made.usage.told

    async def answer() -> list[bytes]:
        await made.all([unpacked(prompt.tokens) for prompt in asked.prompts], shape.take)
        return shape.whole(made.usage)

    return whole(answer, shape.manner)


async def told(api: Api, request: Request) -> Response:
    """What needs no model."""
    read = await api.read(request)
    assert isinstance(read, Answered)
    return Response(read.body, media_type="application/json")


def _size(piece: Piece) -> int:
    """About the characters that a piece becomes."""
    return len(piece.text) + 4 * (len(piece.tokens) + len(piece.scores)) * (1 + MOST_LOGPROBS // 4)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """One completion's pieces as one."""
    tokens = [token for piece in pieces for token in piece.tokens]
    text = "".join(piece.text for piece in pieces)
    return replace(pieces[-1], text=text, tokens=tokens, scores=pieces[0].scores)


async def _answer(
    api: Api, asked: Asked, params: SamplingParams, wishes: Wishes, grammar: Grammar | None, form: AnswerForm,
    scope: Scope,
) -> Response:  # fmt: skip
    """Queues all prompts, then answers as they were asked for; whoever goes away frees their slots."""
    prompts = [unpacked(prompt.tokens) for prompt in asked.prompts]
    # Together, so that all are there for the next batch.
    submitting = (api.service.submit(prompt, params, wishes, grammar) for prompt in prompts)
    submitted = await asyncio.gather(*submitting, return_exceptions=True)
    tickets = [ticket for ticket in submitted if isinstance(ticket, Ticket)]
    if errors := [error for error in submitted if isinstance(error, BaseException)]:
        _cancel(api, tickets)
        raise errors[0]
    echoes = [Echo(prompt.text, *map(unpacked, (prompt.tokens, prompt.offsets))) for prompt in asked.prompts]
    scope[TOKENS] = lambda: Usage.of(tickets).told()
    answer = _Answer(api, tickets, params.n, form, echoes if asked.echo else None)
    manner = form.manner
    if asked.stream:
        return events(lambda: answer.events(asked), manner, answer.close)
    return whole(answer.whole, manner, answer.close)


def _cancel(api: Api, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        api.service.cancel(ticket)


@dataclass
class _Answer:
    """One request's completions on their way; prompt p's i-th is number p * n + i."""

    api: Api
    tickets: list[Ticket]
    n: int
    form: AnswerForm
    echoes: list[Echo] | None
    counting: bool = False  # tokens so far, with every piece

    def close(self) -> None:
        """Nobody waits for it any more."""
        _cancel(self.api, self.tickets)

    async def whole(self) -> bytes:
        """All of them."""
        done = await asyncio.gather(*(self._collected(number) for number in range(len(self.tickets))))
        pieces = [piece for pieces in done for piece in pieces]
        return await _beside(sum(map(_size, pieces)), self.form.whole, pieces, Usage.of(self.tickets))

    async def _collected(self, number: int) -> list[Piece]:
        """One prompt's completions, each as a single piece."""
        done: dict[int, list[Piece]] = {}
        async for piece in self._pieces(number):
            if isinstance(piece, Piece):
                done.setdefault(piece.index, []).append(piece)
        return [_joined(done[index]) for index in sorted(done)]

    async def _pieces(self, number: int) -> AsyncGenerator[Piece | Prefill | None]:
        """One prompt's, numbered among all completions, with the prompt before them if it is wanted."""
        fresh = set(range(self.n))
        async for piece in self.tickets[number].pieces(QUIET):
            if not isinstance(piece, Piece):
                yield piece
                continue
            numbered = replace(piece, index=number * self.n + piece.index)
            if self.echoes is not None:
                echo = self.echoes[number]
                place = echo.before if piece.index in fresh else echo.after
                numbered = await _beside(_size(numbered), place, numbered)
            fresh.discard(piece.index)
            yield numbered

    async def events(self, asked: Asked) -> AsyncGenerator[Event]:
        """Pieces as they come, of all prompts."""
        self.counting, progress = asked.counting, asked.progress
        merged: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._feed(number, merged, progress)) for number in range(1, len(self.tickets))]
        try:
            for opening in self.form.openings(self.n * len(self.tickets), Usage.of(self.tickets)):
                yield self._framed(opening)
            if not tasks:  # the usual case, without a queue more between
                async for event in self._events_of(0, progress):
                    yield event
            else:
                tasks.append(asyncio.create_task(self._feed(0, merged, progress)))
                for _ in self.tickets:
                    while (item := await merged.get()) is not None:
                        if isinstance(item, Exception):
                            raise item
                        yield item
            for closing in self.form.closings(Usage.of(self.tickets), asked.usage):
                yield self._framed(closing)
        finally:
            for task in tasks:
                task.cancel()

    async def _feed(self, number: int, merged: asyncio.Queue[Event | Exception | None], progress: bool) -> None:
        try:
            async for event in self._events_of(number, progress):
                merged.put_nowait(event)
            merged.put_nowait(None)
        except Exception as error:
            merged.put_nowait(error)

    async def _events_of(self, number: int, progress: bool) -> AsyncGenerator[Event]:
        """One prompt's."""
        async for piece in self._pieces(number):
            if piece is None:
                yield "still at it"
            elif isinstance(piece, Prefill):
                yield f"prompt {piece.done} of {piece.total} tokens"
                for event in self.form.progress(piece) if progress else ():
                    yield self._framed(event)
            elif piece.text or piece.finish_reason is not None or (self.form.logprobs and piece.tokens):
                usage = Usage.of(self.tickets) if self.counting else None
                if chunks := await _beside(_size(piece), self._chunks, piece, usage):
                    yield chunks

    def _chunks(self, piece: Piece, usage: Usage | None) -> bytes:
        """Nothing of a piece that says nothing yet."""
        return b"".join(map(self._framed, self.form.chunks(piece, usage)))

    def _framed(self, event: Json) -> bytes:
        return self.form.manner.event(_dump(event), str(event.get("type", "")))
