"""`weft chat`: with a model here, with a server, and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.server.running import NAME, running
from tests.server.scripted import with_template
from weft.server.app import Settings

COMMAND = [sys.executable, "-m", "weft.cli.main", "chat"]
WISHES = ["--max-tokens", "10", "--temperature", "0"]


def chat(said: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], input=said, capture_output=True, text=True, timeout=90, check=False,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )  # fmt: skip


SAID = "The for statement is used to\n/system Be brief.\n/nonsense\n/reset\nThe for statement is used to\n"


def test_here_and_by_a_server_alike(packaged: Path) -> None:
    here = chat(SAID, str(packaged), "--threads", "1", *WISHES)
    with running(packaged, Settings(NAME, keys=("secret",))) as server:
        there = chat(SAID, "--url", server.url, *WISHES, WEFT_API_KEY="secret")
        refused = chat(SAID, "--url", f"{server.url}/v1", *WISHES)
    assert here.returncode == there.returncode == 0, here.stderr + there.stderr
    assert here.stdout == there.stdout and len(here.stdout) > 40
    for done in (here, there):
        assert len(re.findall(r"first token after \d+ ms, 10 tokens, [\d.]+ tokens/s", done.stderr)) == 2
        assert "/nonsense is not known" in done.stderr and "system: Be brief." in done.stderr
    assert refused.returncode == 2 and "API key" in refused.stderr


def test_what_is_only_thought_is_no_answer(packaged: Path, tmp_path: Path) -> None:
    """Here and by a server: shown apart, and not sent again."""
    with_template(packaged, tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}<think>{# </think> #}")
    here = chat("import os\n", str(tmp_path), "--threads", "1", *WISHES)
    with running(tmp_path) as server:
        there = chat("import os\n", "--url", server.url, *WISHES)
    for done in (here, there):
        assert done.returncode == 0 and not done.stdout.strip(), done
        thought = done.stderr.partition("first token after")[0].splitlines()
        assert len(" ".join(thought)) > 10, done.stderr


def test_mistakes_are_lines(packaged: Path) -> None:
    nobody = chat("hi\n", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 2 and "start one with weft serve" in nobody.stderr
    both = chat("hi\n", "some/model", "--url", "http://127.0.0.1:9")
    assert both.returncode == 2 and "can't both be given" in both.stderr
    long = chat("word " * 3000 + "\nimport os\n", str(packaged), "--threads", "1", *WISHES)
    assert long.returncode == 0 and "the context holds 2048" in long.stderr, "and the conversation goes on"
    assert "first token after" in long.stderr


class Terminal:
    """A pseudo-terminal with the command on it."""

    def __init__(self, *options: str) -> None:
        self.main, other = pty.openpty()
        self.child = subprocess.Popen(
            ["setsid", "--ctty", *COMMAND, *options], stdin=other, stdout=other, stderr=other, close_fds=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come; there was {self.seen!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096).decode("utf-8", "replace")
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())


def test_a_conversation_on_a_terminal(packaged: Path) -> None:
    terminal = Terminal(str(packaged), "--threads", "1", "--temperature", "0", "--max-tokens", "1500")
    try:
        terminal.until("> ")
        terminal.type("import os\n")
        time.sleep(1.0)
        terminal.type("\x03")  # Ctrl-C ends the answer, not the conversation
        terminal.until("stopped")
        terminal.until("> ")
        terminal.type("\x1b[A")  # arrow up: what was written before
        terminal.until("import os")
        terminal.type("\n")
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.until("stopped")
        terminal.until("> ")
        terminal.type("/reset\n")
        terminal.until("forgotten")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.child.wait(20) == 0
    finally:
        terminal.child.kill()
        terminal.child.wait()
        os.close(terminal.main)


@pytest.mark.parametrize("argument", ["--help"])
def test_help(argument: str) -> None:
    assert "/reset forgets" in chat("", argument).stdout
