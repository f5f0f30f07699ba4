"""Nothing that tests start outlives them, however they end: a process beside pytest sees to that.

Everything that pytest starts, directly or not, has a mark in its environment. The guardian holds the read end of a
pipe; when the other end closes, it kills what has the mark, and removes pytest's folder and network namespaces.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "WEFT_TESTED_BY"
SECONDS = 10.0  # for processes to end


class Guardian:
    """Watches over this process, and over `folder`, which goes with it."""

    def __init__(self, folder: Path) -> None:
        self.mark = os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"
        unmarked = {name: value for name, value in os.environ.items() if name != MARK}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.mark, str(folder)], stdin=subprocess.PIPE, env=unmarked,
            start_new_session=True,
        )  # fmt: skip

    def end(self) -> list[str]:
        """The end of the tests: what still runs a moment later is listed, then killed."""
        deadline = time.monotonic() + 3.0
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        lines = [_described(process) for process in left]
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(2 * SECONDS)
        return lines


def marked(mark: str) -> list[psutil.Process]:
    """Running processes that carry the mark since their start."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid}"


def main(mark: str, folder: str) -> None:
    """Waits for the other end of the pipe, then clears up."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + SECONDS
    while (left := marked(mark)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    owner = mark.partition("-")[0]
    for path in Path("/run/netns").glob("weft-*"):
        if re.fullmatch(rf"weft-{owner}-\w+", path.name):
            subprocess.run(["ip", "netns", "delete", path.name], check=False, capture_output=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
