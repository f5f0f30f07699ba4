"""The application: endpoints behind the guard, errors in one shape, the page. Knows all of the server's parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from weft.server import errors
from weft.server.answering import Api
from weft.server.api import router
from weft.server.beside import Beside
from weft.server.client import EngineClient
from weft.server.guard import Guard
from weft.server.logged import Logged
from weft.server.reading import BODIES

PAGE = Path(__file__).parent / "page"
# The page has nothing from elsewhere and sends nothing elsewhere.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How to serve. `name`: the model's, for clients. `keys`: who may ask; none is everyone. `local`: only this
    machine reaches the server. `most_body`: bytes. `patience`: seconds to send a body, and to take a piece of an
    answer. `timeout`: seconds that a request may take. `origins`: of web pages elsewhere that may ask; "*" is any.
    `isolated`: prefixes are shared within a key alone. `log`: takes a line a request, see `Logged`."""

    name: str
    keys: Sequence[str] = ()
    local: bool = True
    most_body: int = 4 << 20
    patience: float = 30.0
    timeout: float | None = None
    origins: Sequence[str] = ()
    isolated: bool = False
    log: Callable[[str], None] | None = None
    log_text: bool = False


class _Application(FastAPI):
    """Its OpenAPI document also says what bodies may hold, which endpoints read themselves."""

    def openapi(self) -> dict[str, Any]:
        """FastAPI's document, with these schemas."""
        if self.openapi_schema is None:
            mode: Literal["validation"] = "validation"
            bodies = [(body, mode) for body in BODIES.values()]
            _, made = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
            super().openapi().setdefault("components", {}).setdefault("schemas", {}).update(made["$defs"])
        return super().openapi()


def application(service: EngineClient, settings: Settings) -> FastAPI:
    """For any ASGI server. Interactive documentation is left out: it would load scripts from elsewhere."""
    beside = Beside(service, settings.name, settings.most_body)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(beside.warm())
        yield
        await beside.close()
        await warming

    app = _Application(
        title="weft", version=version("weft"), docs_url=None, redoc_url=None, lifespan=lifespan,
        description="OpenAI's API for a model that is split over slow links.",
    )  # fmt: skip
    errors.install(app)
    app.include_router(router(Api(service, beside, settings.name, settings.timeout, settings.isolated)))

    # Kept in memory: reading a file takes turns on other threads, each of which waits for whatever computes.
    index, script = ((PAGE / name).read_bytes() for name in ("index.html", "app.js"))

    # Ollama's command line looks by HEAD whether a server is there.
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(index, headers=PAGE_HEADERS, media_type="text/html")

    @app.get("/app.js", include_in_schema=False)
    async def code() -> Response:
        return Response(script, headers=PAGE_HEADERS, media_type="text/javascript")

    app.add_middleware(
        Guard, keys=settings.keys, local=settings.local, most=settings.most_body, patience=settings.patience
    )
    app.add_middleware(Logged, tell=settings.log, text=settings.log_text)  # before the guard: what it refuses too
    if settings.origins:  # before the guard: browsers ask whether they may without a key
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            allow_private_network=True,  # a page of the web that asks this machine is what the option is for
            expose_headers=["Retry-After", "x-should-retry", "x-request-id"],
        )  # fmt: skip
    return app
