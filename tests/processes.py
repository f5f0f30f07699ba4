"""weft's commands as processes of their own, for tests: what they say, and their end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from types import TracebackType


class Command:
    """`weft ARGUMENTS` with more in its environment; killed at the end of a `with`."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed at the end)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "weft.cli.main", *arguments], stderr=self._log, stdout=self._log,
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
