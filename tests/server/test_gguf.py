"""A server with a GGUF model: chats by its own template, which may be anything."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import pytest

from tests.formats.gguf_files import bytes_only, write
from tests.formats.test_gguf import tiny
from tests.server.running import running

ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
LARGE = "{% set x = 'x' * 1000000000 %}{{ x * 4 }}"
REACHES_OUT = "{{ messages.__class__.__mro__ }}"


def made(path: Path, template: str | None) -> Path:
    """A model with this chat template."""

    def more(writer: gguf.GGUFWriter) -> None:
        bytes_only(writer)
        if template is not None:
            writer.add_chat_template(template)

    return write(path, tiny("llama"), "llama", "Q8_0", more)


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
TEXT = {"prompt": "some text", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_chats_and_completions(tmp_path: Path) -> None:
    with running(made(tmp_path / "tiny.gguf", None)) as server, server.client() as http:
        answer = http.post("/v1/chat/completions", json=CHAT).json()
        assert answer["usage"]["prompt_tokens"] == len("user: hi\nassistant: ")
        assert http.post("/v1/completions", json=TEXT).json()["usage"]["completion_tokens"] == 4
        tokens = http.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "abc"


@pytest.mark.parametrize("template", [ENDLESS, LARGE, REACHES_OUT], ids=["endless", "large", "reaches-out"])
def test_a_template_can_hurt_nobody(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rendered in a process beside, with limits; meanwhile others are answered."""
    monkeypatch.setattr("weft.server.beside.SECONDS", 3.0)
    with running(made(tmp_path / "tiny.gguf", template)) as server, server.client() as http:
        begin = time.monotonic()
        refused = http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 400 and time.monotonic() - begin < 30
        assert "Traceback" not in refused.text
        assert http.post("/v1/completions", json=TEXT).json()["usage"]["completion_tokens"] == 4
