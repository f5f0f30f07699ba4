"""Errors as answers. Knows what can go wrong and how HTTP says it; how a protocol says it is manner's."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from weft.errors import Busy, InputError, RequestFailed, Unavailable
from weft.server.manner import JSON, Manner, manner_of
from weft.server.refused import MISTAKE, Gone, Refused, misread


def response(
    manner: Manner, status: int, message: str, param: str | None = None, code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:  # fmt: skip
    """An error as a protocol's answer."""
    return Response(manner.failed(status, message, param, code), status, headers, JSON)


def status_of(error: BaseException) -> int | None:
    """How HTTP says it, if it is one of ours."""
    if isinstance(error, Refused):
        return error.status
    kinds: dict[type[BaseException], int] = {
        InputError: 400, Busy: 429, RequestFailed: 500, Unavailable: 503,
    }  # fmt: skip
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), None)


def said(error: BaseException) -> tuple[int, str]:
    """Status and message; our own mistakes say nothing of themselves."""
    status = status_of(error)
    return (500, MISTAKE) if status is None else (status, str(error))


def answer(error: BaseException, manner: Manner) -> Response:
    """To a request that could not be served."""
    status, message = said(error)
    headers = {429: {"Retry-After": str(getattr(error, "retry_after", 1))}, 503: {"Retry-After": "5"}}.get(status)
    if isinstance(error, RequestFailed):  # it was tried twice already; OpenAI's clients try 500 again unless told
        headers = {"x-should-retry": "false"}
    if isinstance(error, Refused):
        return response(manner, status, message, error.field, error.code, headers)
    return response(manner, status, message, None, "queue_full" if status == 429 else None, headers)


def _invalid(request: Request, error: Any) -> Response:
    return answer(misread(error.errors(), outer=1), manner_of(request.url.path))


def _http(request: Request, error: Any) -> Response:
    path, said = request.url.path, str(error.detail)
    if error.status_code == 404 and said == "Not Found":
        said = f"{path[:100]} is not served here; /openapi.json has what is"
    return response(manner_of(path), error.status_code, said, headers=error.headers)


def _ours(request: Request, error: Any) -> Response:
    return answer(error, manner_of(request.url.path))


def install(app: FastAPI) -> None:
    """Has the application answer so."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Gone, lambda *_: Response(status_code=499))  # nobody reads it
    for kind in (InputError, Refused, Busy, RequestFailed, Unavailable, Exception):  # the last one is logged too
        app.add_exception_handler(kind, _ours)
