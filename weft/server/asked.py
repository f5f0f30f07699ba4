"""What a request comes to once it is read, as it travels between processes. Knows tokens and wishes; no protocol."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from weft.speech.listener import Speech


class Facts(msgspec.Struct, frozen=True):
    """What a reader knows of the model. `name`: as clients call it; `length`: tokens of the context; `ends`: tokens
    that end an answer; `proposed`: the checkpoint's own sampling parameters; `width`: numbers of an embedding, which is
    made by `pooling` unless a request says how."""

    path: str
    name: str
    vocabulary: int
    length: int
    ends: tuple[int, ...]
    proposed: dict[str, Any]
    width: int
    pooling: str


class Prompt(msgspec.Struct, frozen=True):
    """A prompt as it is queued; and, where it is to stand before its answer, its text and the characters before each
    of its tokens. `tokens`, `offsets`: unsigned numbers of 32 bits, in this machine's order."""

    tokens: bytes
    text: str = ""
    offsets: bytes = b""


class Asked(msgspec.Struct, frozen=True, tag=True):
    """What is to be queued, and how it is to be answered. `params`: of `SamplingParams`; `echo`: prompts stand before
    their answers; `usage`, `counting`: tokens are told at a stream's end, and with every piece of it; `progress`:
    and how far a prompt is; `timeout`: seconds; `about`: what the answer says again of the request; `scored`: it says
    how likely the prompt's tokens were."""

    prompts: list[Prompt]
    params: dict[str, Any]
    logprobs: bool
    echo: bool
    stream: bool
    usage: bool
    counting: bool
    progress: bool
    priority: int
    timeout: float | None
    speech: Speech | None = None
    about: dict[str, Any] = {}
    salt: str = ""
    scored: bool = False


class Answered(msgspec.Struct, frozen=True, tag=True):
    """What needs no model: the answer, as JSON."""

    body: bytes


def unpacked(numbers: bytes) -> list[int]:
    """What `packed` packed."""
    return array("I", numbers).tolist()
