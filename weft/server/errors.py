"""Errors in OpenAI's shape. Knows what can go wrong and how HTTP says it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from weft.errors import Busy, InputError, RequestFailed, Unavailable
from weft.server.refused import MISTAKE, Gone, Refused, misread

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 408: "timeout_error",
         413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}  # fmt: skip


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """`{"error": ...}`, in ASCII: what was given need not be Unicode."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:  # fmt: skip
    """The same as an answer."""
    return Response(body(status, message, param, code), status, headers, "application/json")


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


def answer(error: BaseException) -> Response:
    """To a request that could not be served."""
    status, message = said(error)
    headers = {429: {"Retry-After": str(getattr(error, "retry_after", 1))}, 503: {"Retry-After": "5"}}.get(status)
    if isinstance(error, RequestFailed):  # it was tried twice already; OpenAI's clients try 500 again unless told
        headers = {"x-should-retry": "false"}
    if isinstance(error, Refused):
        return response(status, message, error.field, error.code, headers)
    return response(status, message, None, "queue_full" if status == 429 else None, headers)


def _invalid(_: Request, error: Any) -> Response:
    return answer(misread(error.errors(), outer=1))


def _http(_: Request, error: Any) -> Response:
    return response(error.status_code, str(error.detail), headers=error.headers)


def install(app: FastAPI) -> None:
    """Has the application answer so."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Gone, lambda *_: Response(status_code=499))  # nobody reads it
    for kind in (InputError, Refused, Busy, RequestFailed, Unavailable, Exception):  # the last one is logged too
        app.add_exception_handler(kind, lambda _, error: answer(error))
