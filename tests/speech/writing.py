"""Answers as models of each family write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from weft.speech.dialect import CALLS, CallSyntax, Dialect
from weft.speech.listener import Called, Listener, Part

NAMES = tuple(name for name in CALLS if name != "harmony")
Call = tuple[str, dict[str, Any]]
THINK = ("<think>", "</think>")


def dialect(name: str, thoughts: bool = True) -> Dialect:
    return Dialect(name, CALLS[name], THINK if thoughts else None)


def written(syntax: CallSyntax, calls: Sequence[Call]) -> str:
    """Calls, one behind the other."""
    each = [f"{syntax.before}{name}{syntax.between}{json.dumps(given, ensure_ascii=False)}{syntax.after}"
            for name, given in calls]  # fmt: skip
    return syntax.mark + syntax.opening + syntax.again.join(each) + syntax.closing


def harmony(thought: str, calls: Sequence[Call], said: str = "") -> str:
    """An answer of gpt-oss's."""
    messages = [f"analysis<|message|>{thought}<|end|>"] if thought else []
    messages += [
        f"commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(given)}<|call|>"
        for name, given in calls
    ]
    messages += [f"final<|message|>{said}<|return|>"] if said else []
    return "<|start|>assistant".join(f"<|channel|>{message}" for message in messages)


def heard(by: Listener, pieces: Sequence[str]) -> list[Part]:
    """All parts, those that are alike joined."""
    parts = [part for piece in pieces for part in by.grow(piece)] + by.end()
    joined: list[Part] = []
    for part in parts:
        if joined and type(joined[-1]) is type(part) and not isinstance(part, Called):
            joined[-1] = type(part)(joined[-1].text + part.text)  # type: ignore[union-attr]
        else:
            joined.append(part)
    return joined


def cut(text: str, places: Sequence[int]) -> list[str]:
    """A text in pieces."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
