"""A model that says what it is told to, held to the form that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from weft.batching.request import Sequence
from weft.completion import Completion, _alone
from weft.execute.protocol import Choice
from weft.text import Tokenizer

Says = Callable[[str], None]


def with_template(model: Path, folder: Path, template: str) -> Path:
    """The same model with another chat template."""
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def scripted(model: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """What is called with the next text that any model in this process says, of a tokenizer like this one's."""
    script: list[int] = []
    tokenizer = Tokenizer(model)

    def choice(self: Completion, after: int) -> Choice:
        index = self.sequence.produced + after
        token = script[index] if index < len(script) else min(self.ends)
        allowed = self.matcher.allowed() if self.matcher else b""
        if allowed and not (token // 8 < len(allowed) and allowed[token // 8] >> token % 8 & 1):
            raise ValueError(f"token {token}, the {index}th, is not allowed")
        return Choice(allowed=_alone(token))

    monkeypatch.setattr(Completion, "_choice", choice)
    monkeypatch.setattr(Sequence, "foreseeable", False)

    def say(text: str) -> None:
        script[:] = tokenizer._hf.backend_tokenizer.encode(text, add_special_tokens=False).ids

    return say
