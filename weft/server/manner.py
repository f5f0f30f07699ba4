"""How protocols frame what they send: errors, and events of a stream. Knows bytes; knows nothing of what is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSON, SERVER_SENT, LINES = "application/json", "text/event-stream; charset=utf-8", "application/x-ndjson"
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 408: "timeout_error",
         413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}  # fmt: skip


@dataclass(frozen=True)
class Manner:
    """`error(status, message, field, code)`: an error's body. `media`: of a stream; `named`: its events say in a line
    of their own what they are; `last`: what ends it. Streams that aren't server-sent events are JSON, a line each."""

    error: Callable[[int, str, str | None, str | None], Any]
    media: str = SERVER_SENT
    named: bool = False
    last: bytes = b""

    def failed(self, status: int, message: str, field: str | None = None, code: str | None = None) -> bytes:
        """An error's body, in ASCII: what was given need not be Unicode."""
        return json.dumps(self.error(status, message, field, code)).encode()

    def event(self, content: bytes, name: str = "") -> bytes:
        """One, as it travels."""
        if self.media == LINES:
            return content + b"\n"
        head = f"event: {name}\n".encode() if self.named and name else b""
        return head + b"data: " + content + b"\n\n"

    def comment(self, text: str) -> bytes:
        """What clients leave unread, where there is such a thing."""
        return b"" if self.media == LINES else f": {text}\n\n".encode()

    def broken(self, status: int, message: str) -> bytes:
        """An error in a stream."""
        return self.event(self.failed(status, message), "error")


def _kind(status: int) -> str:
    return KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def _openai(status: int, message: str, field: str | None, code: str | None) -> Any:
    return {"error": {"message": message, "type": _kind(status), "param": field, "code": code}}


def _anthropic(status: int, message: str, field: str | None, code: str | None) -> Any:
    kind = {403: "permission_error", 413: "request_too_large", 503: "overloaded_error"}.get(status, _kind(status))
    return {
        "type": "error",
        "error": {"type": "api_error" if status >= 500 and status != 503 else kind, "message": message},
    }


def _plain(status: int, message: str, field: str | None, code: str | None) -> Any:
    return {"error": message}


OPENAI = Manner(_openai, last=b"data: [DONE]\n\n")
RESPONSES = Manner(_openai, named=True)
ANTHROPIC = Manner(_anthropic, named=True)
OLLAMA = Manner(_plain, media=LINES)
LLAMACPP = Manner(_openai)
BEGINNINGS = (("/v1/messages", ANTHROPIC), ("/v1/responses", RESPONSES), ("/api/", OLLAMA))


def manner_of(path: str) -> Manner:
    """By the path that is asked for."""
    return next((manner for beginning, manner in BEGINNINGS if path.startswith(beginning)), OPENAI)
