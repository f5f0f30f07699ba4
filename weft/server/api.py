"""The endpoints. Knows requests' schemas and the forms of answers; how they are answered is answering's."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from weft.batching.params import shown
from weft.server.answering import Api, answered, embedded, told
from weft.server.answers import AnswerForm, Chat, Json
from weft.server.anthropic import CountRequest, MessageForm, MessagesRequest
from weft.server.chat import ChatRequest, DetokenizeRequest, TokenizeRequest
from weft.server.client import State
from weft.server.guard import OWNER
from weft.server.kept_responses import KeptResponse, KeptResponses
from weft.server.live import live
from weft.server.llamacpp import LlamaCompletion, LlamaForm
from weft.server.ollama import DETAILS, GenerateForm, OllamaChat, OllamaForm, OllamaGenerate, OllamaShow
from weft.server.reading import Body
from weft.server.refused import Refused
from weft.server.responses import CONTINUED, ResponseForm, ResponsesRequest
from weft.server.schema import CompletionRequest
from weft.server.vectors import (
    EmbeddingForm,
    EmbeddingRequest,
    OllamaEmbed,
    OllamaEmbedForm,
    RerankForm,
    RerankRequest,
    ScoreForm,
    ScoreRequest,
)

REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"description": "an error in the protocol's shape"} for code in (400, 401, 403, 404, 408, 413, 415, 429, 503)
}
NOT_HERE = ("pull", "push", "create", "copy", "delete")  # what Ollama does with models


def router(api: Api) -> APIRouter:
    """All endpoints."""
    routes = APIRouter(responses=REFUSALS)
    _answers(routes, api)
    _vectors(routes, api)
    _anthropic(routes, api)
    _ollama(routes, api)
    _llamacpp(routes, api)
    _responses(routes, api, KeptResponses())
    _models(routes, api)
    _tokens(routes, api)
    _operation(routes, api)
    return routes


def _asks(body: type[Body]) -> dict[str, Any]:
    """For the OpenAPI document: endpoints read their bodies themselves, see `Beside`."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"response_class": JSONResponse, "openapi_extra": content}


def _answers(routes: APIRouter, api: Api) -> None:
    @routes.post("/v1/completions", tags=["openai"], **_asks(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continues prompts."""
        return await answered(api, request, AnswerForm)

    @routes.post("/v1/chat/completions", tags=["openai"], **_asks(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answers the last message of a conversation."""
        return await answered(api, request, Chat)


def _vectors(routes: APIRouter, api: Api) -> None:
    @routes.post("/v1/embeddings", tags=["openai"], **_asks(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Texts as vectors."""
        return await embedded(api, request, EmbeddingForm)

    @routes.post("/v1/score", tags=["vectors"], **_asks(ScoreRequest))
    async def score(request: Request) -> Response:
        """How alike texts are, by their embeddings."""
        return await embedded(api, request, ScoreForm)

    @routes.post("/v1/rerank", tags=["vectors"], **_asks(RerankRequest))
    async def rerank(request: Request) -> Response:
        """Documents in the order in which they are like a query, by their embeddings."""
        return await embedded(api, request, RerankForm)

    @routes.post("/api/embed", tags=["ollama"], **_asks(OllamaEmbed))
    async def embed(request: Request) -> Response:
        """Texts as vectors, as Ollama does."""
        return await embedded(api, request, OllamaEmbedForm)


def _anthropic(routes: APIRouter, api: Api) -> None:
    @routes.post("/v1/messages", tags=["anthropic"], **_asks(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Answers the last message of a conversation, as Anthropic's API does."""
        return await answered(api, request, MessageForm)

    @routes.post("/v1/messages/count_tokens", tags=["anthropic"], **_asks(CountRequest))
    async def count(request: Request) -> Response:
        """How many tokens that would be."""
        return await told(api, request)


def _llamacpp(routes: APIRouter, api: Api) -> None:
    @routes.post("/completion", tags=["llama.cpp"], **_asks(LlamaCompletion))
    async def completion(request: Request) -> Response:
        """Continues a prompt, as llama.cpp's server does."""
        return await answered(api, request, LlamaForm)


class _Glance(msgspec.Struct):
    """What is looked at of a request before it is read: the rest may be long."""

    input: msgspec.Raw
    previous_response_id: Any = None
    store: Any = None

    def items(self) -> list[bytes]:
        """The input's."""
        given = bytes(self.input)
        if given[:1] == b"[":
            return [bytes(each) for each in msgspec.json.decode(given, type=list[msgspec.Raw])]
        return [b'{"type":"message","role":"user","content":%b}' % given]


def _responses(routes: APIRouter, api: Api, kept: KeptResponses) -> None:
    def owner(request: Request) -> str:
        return str(request.scope.get(OWNER, ""))

    def found(name: str, request: Request) -> KeptResponse:
        if (one := kept.get(name, owner(request))) is None:
            raise Refused(404, f"response {shown(name)} is not here: it has expired, or never was this key's",
                          "previous_response_id", "not_found")  # fmt: skip
        return one

    @routes.post("/v1/responses", tags=["openai"], **_asks(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """Answers input, going on from an earlier response if it names one."""
        body = await request.body()
        try:
            glance = msgspec.json.decode(body, type=_Glance)
            own = glance.items()
        except (msgspec.MsgspecError, RecursionError):  # whoever reads all of it says what is wrong
            return await answered(api, request, ResponseForm)
        name, past, given = glance.previous_response_id, list[bytes](), None
        if isinstance(name, str) and name:
            past = found(name, request).items
            given = CONTINUED, body.rstrip()[:-1] + b',"past":[' + b",".join(past) + b"]}"

        def keep(response: Json) -> None:
            said = [msgspec.json.encode(item) for item in response["output"]]
            kept.put(response["id"], owner(request), [*past, *own, *said], msgspec.json.encode(response))

        return await answered(api, request, ResponseForm, given, keep if glance.store in (None, True) else None)

    @routes.get("/v1/responses/{response}", tags=["openai"])
    async def response(response: str, request: Request) -> Response:
        """An earlier one."""
        return Response(found(response, request).body, media_type="application/json")

    @routes.delete("/v1/responses/{response}", tags=["openai"])
    async def forget(response: str, request: Request) -> Json:
        """Forgets an earlier one."""
        found(response, request)
        return {"id": response, "object": "response.deleted", "deleted": kept.drop(response, owner(request))}


def _ollama(routes: APIRouter, api: Api) -> None:
    @routes.post("/api/chat", tags=["ollama"], **_asks(OllamaChat))
    async def chat(request: Request) -> Response:
        """Answers the last message of a conversation, as Ollama does."""
        return await answered(api, request, OllamaForm)

    @routes.post("/api/generate", tags=["ollama"], **_asks(OllamaGenerate))
    async def generate(request: Request) -> Response:
        """Answers a prompt."""
        return await answered(api, request, GenerateForm)

    @routes.post("/api/show", tags=["ollama"], **_asks(OllamaShow))
    async def show(request: Request) -> Response:
        """What the model is."""
        return await told(api, request)

    @routes.get("/api/tags", tags=["ollama"])
    async def tags() -> Json:
        """The one model that is served."""
        return {"models": [_tag(api)]}

    @routes.get("/api/ps", tags=["ollama"])
    async def running() -> Json:
        """The same."""
        return {"models": [_tag(api)]}

    @routes.get("/api/version", tags=["ollama"])
    async def ollama_version() -> Json:
        """weft's, in Ollama's form."""
        return {"version": version("weft")}

    @routes.api_route("/api/{what:path}", methods=["POST", "DELETE"], include_in_schema=False)
    async def refused(what: str) -> Response:
        if what in NOT_HERE:
            raise Refused(400, f"{what}: this server has the model that it was started with, and no other")
        raise Refused(404, f"/api/{what[:100]} is not served here; /openapi.json has what is")


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
    @routes.post("/tokenize", tags=["tokens"], **_asks(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Tokens of a prompt, or of messages."""
        return await told(api, request)

    @routes.post("/detokenize", tags=["tokens"], **_asks(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        return await told(api, request)


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
        content = api.service.metrics.text(api.service.figures)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/live", response_class=JSONResponse, tags=["operation"])
    async def now(drawn: int = -1) -> Response:
        """What the page shows; `drawn`: the batch whose timeline it has already."""

        def made() -> bytes:
            return msgspec.json.encode(live(api.service, api.name, drawn))

        return Response(await asyncio.to_thread(made), media_type="application/json")


def _tag(api: Api) -> Json:
    tools = ["completion", "tools"] if api.service.tokenizer is not None else ["completion"]
    return {"name": api.name, "model": api.name, "modified_at": "1970-01-01T00:00:00Z", "size": 0, "digest": "",
            "details": DETAILS, "capabilities": tools}  # fmt: skip


def _model(api: Api) -> Json:
    about = api.service.about
    return {
        "id": api.name,
        "object": "model",
        "created": 0,
        "owned_by": "weft",
        "max_model_len": about.max_length,
    }
