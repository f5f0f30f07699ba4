"""Not a test of weft: what tests/test_left_behind.py has pytest killed over, and a test that needs SIGINT."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil

from tests.processes import Command
from weft import LLM


def test_is_killed(packaged: Path) -> None:
    with Command("serve", "--port", "0", "--tp", "2", "--overlap", "serial") as server, LLM(packaged) as llm:
        server.until("for a page")
        listed = [server.child.pid, *(child.pid for child in psutil.Process(server.child.pid).children(recursive=True))]
        print("LEFT", *listed, *llm.engine.workers.controller.launcher.pids(), flush=True)
        print("FOLDER", llm.engine.workers.controller._folder.path, flush=True)
        time.sleep(120)


def test_leaves_a_server() -> None:
    server = Command("serve", "--port", "0")
    server.until("for a page")
    raise AssertionError("a failure")


def test_is_interrupted() -> None:
    with Command("serve", "--port", "0") as server:
        server.until("for a page")
        assert server.end(signal.SIGINT) in (0, 130)
