"""Errors in OpenAI's shape. Knows what can go wrong and how HTTP says it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from weft.batching.params import shown
from weft.errors import Busy, InputError, RequestFailed, Unavailable

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 408: "timeout_error",
         413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}  # fmt: skip


class UnknownModel(LookupError):
    """A model that is not served here."""


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
    kinds: dict[type[BaseException], int] = {
        InputError: 400, UnknownModel: 404, Busy: 429, RequestFailed: 500, Unavailable: 503,
    }  # fmt: skip
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), None)


def said(error: BaseException) -> tuple[int, str]:
    """Status and message; our own mistakes say nothing of themselves."""
    status = status_of(error)
    return (500, "the server made a mistake; its log says more") if status is None else (status, str(error))


def answer(error: BaseException) -> Response:
    """To a request that could not be served."""
    status, message = said(error)
    headers = {429: {"Retry-After": str(getattr(error, "retry_after", 1))}, 503: {"Retry-After": "5"}}.get(status)
    if isinstance(error, RequestFailed):  # it was tried twice already; OpenAI's clients try 500 again unless told
        headers = {"x-should-retry": "false"}
    code = {404: "model_not_found", 429: "queue_full"}.get(status)
    return response(status, message, None, code, headers)


def _invalid(_: Request, error: Any) -> Response:
    """What pydantic says, the first of it; of a union's members rather the one that had the right type."""
    found = error.errors()
    first = next((each for each in found if not each["type"].endswith("_type")), found[0])
    field = next((str(part) for part in first["loc"][1:]), None)
    place = ".".join(str(part) for part in first["loc"][1:] if not _names_a_type(part))
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be"):
        message = f"{shown(first['input'])} is not allowed; it {message.removeprefix('Input ')}"
    if first["type"] == "unknown_field":
        field = field or first["ctx"]["field"]
        place = ".".join(filter(None, [place, first["ctx"]["field"]]))
    elif first["type"] == "missing":
        message = "is missing, and is needed"
    elif first["type"] == "json_invalid":
        field, place, message = None, "", f"the body is not JSON: {first.get('ctx', {}).get('error', message)}"
    elif not place:
        message = f"the body must be a JSON object, not {shown(first['input'])}"
    named = f"{place}: {message}" if place and not message.startswith(f"{place} ") else message
    return response(400, named, field)


def _names_a_type(part: int | str) -> bool:
    """pydantic says which member of a union it tried."""
    return isinstance(part, str) and (part in ("str", "int", "nullable") or not part.replace("_", "").isalnum())


def _http(_: Request, error: Any) -> Response:
    return response(error.status_code, str(error.detail), headers=error.headers)


def install(app: FastAPI) -> None:
    """Has the application answer so."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (InputError, UnknownModel, Busy, RequestFailed, Unavailable, Exception):  # the last one is logged too
        app.add_exception_handler(kind, lambda _, error: answer(error))
