"""weft's commands, for tests: in this process, or as processes of their own."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from types import TracebackType
from unittest.mock import patch

import torch  # noqa: F401  # commands that run in this process would leave it out of it otherwise

from weft.cli.main import main

WEFT = [sys.executable, "-m", "weft.cli.main"]


def weft(
    *arguments: str, text: str | None = None, code: int = 0, process: bool = False
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`weft ARGUMENTS` with `text` on its standard input. In this process unless it is asked for another one: there
    what it needs is imported already, which takes four seconds."""
    if process:
        command = [*WEFT, *arguments]
        done = subprocess.run(command, input=text or "", capture_output=True, text=True, timeout=120, check=False)
    else:
        out, errors, ended = io.StringIO(), io.StringIO(), 0
        with (
            redirect_stdout(out), redirect_stderr(errors), patch.object(sys, "argv", ["weft", *arguments]),
            patch.object(sys, "stdin", io.StringIO(text or "")),
        ):  # fmt: skip
            try:
                main()
            except SystemExit as exit:
                ended = int(exit.code or 0)
        done = subprocess.CompletedProcess(list(arguments), ended, out.getvalue(), errors.getvalue())
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def free_port() -> int:
    """Of loopback: nobody listens there now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Command:
    """`weft ARGUMENTS` with more in its environment and `before` in front of it; killed at the end of a `with`."""

    def __init__(self, *arguments: str, before: Sequence[str] = (), **environment: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed at the end)
        self.child = subprocess.Popen(
            [*before, *WEFT, *arguments], stderr=self._log, stdout=self._log,
            stdin=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "200"} | environment,
        )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        self._log.close()

    @property
    def said(self) -> str:
        """Everything so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def until(self, text: str, seconds: float = 60) -> str:
        """What was said up to when this was."""
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end and self.child.poll() is None, f"{text!r} was not said, but {self.said!r}"
            time.sleep(0.02)
        return self.said

    def end(self, number: int, seconds: float = 20) -> int:
        """Its exit code after a signal."""
        self.child.send_signal(number)
        return self.child.wait(seconds)
