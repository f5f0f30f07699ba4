"""A server for benchmarks: `weft serve` as a process of its own, on a free port, ended afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WEFT = [sys.executable, "-m", "weft.cli.main"]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


class Served(NamedTuple):
    """Its process and where it answers."""

    pid: int
    url: str


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """One rank of one thread, unless the arguments say otherwise; the model in the package, unless they name one."""
    command = [*WEFT, "serve", *arguments, "--threads", "1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=OFFLINE)
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if "/v1 for OpenAI" in line), "")
        if not line:
            raise SystemExit("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else it would wait for a reader
        yield Served(process.pid, "http://127.0.0.1:" + line.partition("http://127.0.0.1:")[2].partition("/")[0])
    finally:
        process.terminate()
        process.wait(60)
