"""The endpoints. Knows requests' schemas, the service and the forms of answers; knows nothing of processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from weft.batching.params import SamplingParams
from weft.errors import InputError
from weft.execute.protocol import Chosen
from weft.llm import default_params
from weft.server.answers import Chat, Form, Json, Usage
from weft.server.errors import UnknownModel
from weft.server.guard import OWNER
from weft.server.live import live
from weft.server.schema import (
    MOST_COMPLETIONS,
    MOST_LOGPROBS,
    MOST_SCORES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Sampling,
    StreamOptions,
    TokenizeRequest,
)
from weft.server.service import Service, State
from weft.server.stream import Event, events, whole
from weft.server.ticket import Piece, Prefill, Ticket, Token, Wishes
from weft.text import Tokenizer

A = TypeVar("A")
P = ParamSpec("P")
QUIET = 10.0  # seconds without a piece after which a stream says that it is alive
LONG = 20_000  # characters of a prompt that is better tokenised beside the loop
REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"description": "an error in OpenAI's shape"} for code in (400, 401, 403, 404, 408, 413, 415, 429, 503)
}


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
    """What endpoints need. `name`: the model's, as clients call it. `timeout`: seconds that a request may take."""

    service: Service
    name: str
    timeout: float | None

    def demand(self, model: str | None) -> None:
        """Raises if another model is asked for."""
        if model not in (None, "", self.name):
            raise UnknownModel(f"the model {model!r} is not served here; there is {self.name!r}")

    def tokenizer(self) -> Tokenizer:
        """Raises `InputError` if the checkpoint has none."""
        tokenizer = self.service.engine.tokenizer
        if tokenizer is None:
            raise InputError("this model has no tokenizer.json; send prompts as token ids to /v1/completions")
        return tokenizer

    def decode(self, tokens: list[int]) -> str:
        """Their text; without a tokenizer nothing."""
        tokenizer = self.service.engine.tokenizer
        return tokenizer.decode(tokens) if tokenizer else ""

    def text_of(self, token: int) -> str:
        """One token's; without a tokenizer its number."""
        tokenizer = self.service.engine.tokenizer
        return tokenizer.spelling.text_of(token) if tokenizer else f"token_id:{token}"

    def bytes_of(self, token: int) -> bytes:
        """The same in bytes."""
        tokenizer = self.service.engine.tokenizer
        return tokenizer.spelling.bytes_of(token) if tokenizer else b""

    def echo(self, prompt: str | list[int], tokens: list[int]) -> Echo:
        """A prompt as it stands before its answer."""
        text = prompt if isinstance(prompt, str) else self.decode(tokens)
        tokenizer = self.service.engine.tokenizer
        if tokenizer is None:
            return Echo(text, tokens, [0] * len(tokens))
        # What was given as text has no special tokens; a tokenizer may put some around it.
        stream = tokenizer.stream((), skip_special_tokens=isinstance(prompt, str))
        for token in tokens:
            stream.step(token)
        stream.end()
        return Echo(text, tokens, [min(offset, len(text)) for offset in stream.offsets])

    async def encode_all(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Every prompt's tokens."""
        return await _beside(sum(map(len, prompts)), lambda: [self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise InputError("the prompt is empty; give at least one character")
        return self.tokenizer().encode(prompt)

    async def render(self, messages: Sequence[Message]) -> list[int]:
        """A conversation's tokens."""
        plain = [message.plain() for message in messages]
        return await _beside(sum(len(m["content"]) for m in plain), self.tokenizer().chat, plain)

    def wishes(self, asked: Sampling, request: Request) -> Wishes:
        """What a request asks of the service."""
        times = [time for time in (asked.timeout, self.timeout) if time is not None]
        return Wishes(asked.priority, request.scope.get(OWNER, ""), min(times, default=None))

    @cached_property
    def proposed(self) -> SamplingParams:
        """The checkpoint's defaults, read once."""
        return default_params(self.service.engine.directory)


async def _beside(size: int, work: Callable[P, A], *arguments: P.args, **options: P.kwargs) -> A:
    """At once, or on a thread where it would keep other requests waiting."""
    return await asyncio.to_thread(work, *arguments, **options) if size > LONG else work(*arguments, **options)


def router(api: Api) -> APIRouter:
    """All endpoints."""
    routes = APIRouter(responses=REFUSALS)
    _answers(routes, api)
    _models(routes, api)
    _tokens(routes, api)
    _operation(routes, api)
    return routes


def _answers(routes: APIRouter, api: Api) -> None:
    @routes.post("/v1/completions", response_class=JSONResponse, tags=["openai"])
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        api.demand(asked.model)
        prompts = asked.prompts()
        if len(prompts) * (asked.n or 1) > MOST_COMPLETIONS:
            raise InputError(f"{len(prompts)} prompts with n {asked.n} are more than {MOST_COMPLETIONS} completions")
        ids = await api.encode_all(prompts)
        alone = 0 if asked.max_tokens == 0 else None  # then the prompt is scored in any case: there is nothing else
        if asked.echo and (entries := sum(map(len, ids)) * ((asked.logprobs or 0) + 1)) > MOST_SCORES:
            raise InputError(f"{entries} log-probabilities of prompts are more than {MOST_SCORES}; send fewer prompts")
        scored = (asked.logprobs if asked.logprobs is not None else alone) if asked.echo else None
        params = asked.params(api.proposed, asked.max_tokens, asked.logprobs, scored)
        form = Form(api.name, api.text_of, api.bytes_of, asked.logprobs is not None)
        echoes = None
        if asked.echo:
            echoes = [await _beside(4 * len(pair[1]), api.echo, *pair) for pair in zip(prompts, ids, strict=True)]
        return await _answer(api, asked, request, ids, params, form, echoes)

    @routes.post("/v1/chat/completions", response_class=JSONResponse, tags=["openai"])
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answers the last message of a conversation."""
        api.demand(asked.model)
        ids = await api.render(asked.messages)
        if asked.top_logprobs and not asked.logprobs:
            raise InputError("top_logprobs wants logprobs true beside it; send that too, or leave both out")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        params = asked.params(api.proposed, asked.max_completion_tokens or asked.max_tokens, logprobs)
        form = Chat(api.name, api.text_of, api.bytes_of, bool(asked.logprobs))
        return await _answer(api, asked, request, [ids], params, form, None)


def _models(routes: APIRouter, api: Api) -> None:
    @routes.get("/v1/models", tags=["openai"])
    async def models() -> Json:
        """The one that is served."""
        return {"object": "list", "data": [_model(api)]}

    @routes.get("/v1/models/{model:path}", tags=["openai"])
    async def model(model: str) -> Json:
        """The same by its name."""
        api.demand(model)
        return _model(api)


def _tokens(routes: APIRouter, api: Api) -> None:
    @routes.post("/tokenize", tags=["tokens"])
    async def tokenize(asked: TokenizeRequest) -> Json:
        """Tokens of a prompt, or of messages."""
        api.demand(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise InputError("give either prompt or messages")
        if asked.messages is not None:
            tokens = await api.render(asked.messages)
        else:
            [tokens] = await api.encode_all([asked.prompt or ""])
        return {"count": len(tokens), "max_model_len": api.service.engine.config.max_length, "tokens": tokens}

    @routes.post("/detokenize", tags=["tokens"])
    async def detokenize(asked: DetokenizeRequest) -> Json:
        """The text of tokens."""
        api.demand(asked.model)
        vocabulary = api.service.engine.model.vocabulary
        if outside := [token for token in asked.tokens if token >= vocabulary]:
            raise InputError(f"token id {outside[0]} is not in the vocabulary, 0 to {vocabulary - 1}")
        return {"prompt": await _beside(4 * len(asked.tokens), api.tokenizer().decode, asked.tokens)}


def _operation(routes: APIRouter, api: Api) -> None:
    @routes.get("/health", tags=["operation"])
    async def health() -> Response:
        """Whether the server works: 503 once it has given up."""
        service = api.service
        state = {"status": service.state, "reason": service.reason, "loaded": round(service.loaded, 3)}
        return JSONResponse(state, 503 if service.state is State.FAILED else 200)

    @routes.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """Whether requests are answered without delay."""
        fine = api.service.state is State.READY
        return JSONResponse({"ready": fine, "status": api.service.state}, 200 if fine else 503)

    @routes.get("/version", tags=["operation"])
    async def versions() -> Json:
        """weft's."""
        return {"version": version("weft")}

    @routes.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """For Prometheus."""
        content = api.service.metrics.text(api.service.loaded_engine)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/live", tags=["operation"])
    async def now(drawn: int = -1) -> Json:
        """What the page shows; `drawn`: the batch whose timeline it has already."""
        return await asyncio.to_thread(live, api.service, api.name, drawn)


def _model(api: Api) -> Json:
    loaded = api.service.engine
    return {
        "id": api.name,
        "object": "model",
        "created": 0,
        "owned_by": "weft",
        "max_model_len": loaded.config.max_length,
    }


def _size(piece: Piece) -> int:
    """About the characters that a piece becomes."""
    return len(piece.text) + 4 * (len(piece.tokens) + len(piece.scores)) * (1 + MOST_LOGPROBS // 4)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """One completion's pieces as one."""
    tokens = [token for piece in pieces for token in piece.tokens]
    return replace(pieces[-1], text="".join(piece.text for piece in pieces), tokens=tokens)


async def _answer(
    api: Api, asked: Sampling, request: Request, prompts: list[list[int]], params: SamplingParams, form: Form,
    echoes: list[Echo] | None,
) -> Response:  # fmt: skip
    """Queues all prompts, then answers as they were asked for; whoever goes away frees their slots."""
    options = asked.stream_options or StreamOptions()
    if options.asks and not asked.stream:
        raise InputError("stream_options are for streams; send stream true, or leave them out")
    wishes = api.wishes(asked, request)
    # Together, so that all are there for the next batch.
    found = await asyncio.gather(*(api.service.submit(p, params, wishes) for p in prompts), return_exceptions=True)
    tickets = [ticket for ticket in found if isinstance(ticket, Ticket)]
    if errors := [error for error in found if isinstance(error, BaseException)]:
        _cancel(api, tickets)
        raise errors[0]
    answer = _Answer(api, tickets, params.n, form, echoes)
    if not asked.stream:
        return whole(answer.whole)
    return events(lambda: answer.events(options, asked.return_progress))


def _cancel(api: Api, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        api.service.cancel(ticket)


@dataclass
class _Answer:
    """One request's completions on their way; prompt p's i-th is number p * n + i."""

    api: Api
    tickets: list[Ticket]
    n: int
    form: Form
    echoes: list[Echo] | None
    counting: bool = False  # tokens so far, with every piece

    async def whole(self) -> Json:
        """All of them."""
        try:
            done = await asyncio.gather(*(self._collected(number) for number in range(len(self.tickets))))
            pieces = [piece for pieces in done for piece in pieces]
            size = sum(map(_size, pieces))
            return await _beside(size, self.form.whole, pieces, Usage.of(self.tickets))
        finally:
            _cancel(self.api, self.tickets)

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

    async def events(self, options: StreamOptions, progress: bool) -> AsyncGenerator[Event]:
        """Pieces as they come, of all prompts."""
        self.counting = options.continuous_usage_stats
        merged: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._feed(number, merged, progress)) for number in range(1, len(self.tickets))]
        try:
            for opening in self.form.openings(self.n * len(self.tickets)):
                yield opening
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
            if options.include_usage:
                yield self.form.closing(Usage.of(self.tickets))
        finally:
            for task in tasks:
                task.cancel()
            _cancel(self.api, self.tickets)

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
                if progress:
                    yield self.form.progress(piece)
            elif piece.text or piece.finish_reason is not None or (self.form.logprobs and piece.tokens):
                usage = {"usage": Usage.of(self.tickets).json()} if self.counting else {}
                yield await _beside(_size(piece), self.form.chunk, piece) | usage
