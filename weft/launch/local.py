"""Starts workers as child processes of this one. Knows processes; knows nothing of what workers do.

No child outlives the launcher: each holds the read end of a pipe and ends when the other end closes, however this
process died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import psutil

from weft.launch.launcher import LEASE_VARIABLE, PLACE_VARIABLE, TOKEN_VARIABLE, Other

CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class LocalLauncher:
    """Children on this machine, reached over loopback. `prefix(index)` goes before each command.

    `command` is what is started, with `--join` and `--address` behind it.
    """

    command: Sequence[str] = (sys.executable, "-P", "-m", "weft.execute.worker")  # -P: nothing of this folder

    one_clock = True
    leaves_machine = False
    shares_memory = True
    may_change = False
    first_place = 0  # of the ranks that are started here

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []
        self.meanwhile: Callable[[], None] = lambda: None  # nothing here has to be waited for
        self.told: Callable[[str], None] = lambda line: None

    @property
    def link_name(self) -> str:
        """Of the device that the workers talk over."""
        return "loopback"

    def demand(self, terms: bytes) -> None:
        """There is no other machine."""

    def here(self, ranks: int) -> int:
        """All."""
        return ranks

    def elsewhere(self, place: int) -> Other | None:
        """None."""
        return None

    def attend(self) -> None:
        """Nobody asks."""

    def control_address(self, folder: str) -> str:
        """A socket of the file system, which network namespaces share too."""
        return f"ipc://{folder}/control"

    def start(self, threads: int, address: str, tokens: Sequence[str]) -> None:
        """Starts the children, each with its own environment and a log of what it prints."""
        for index, token in enumerate(tokens):
            log = tempfile.TemporaryFile(prefix="weft-worker-")  # noqa: SIM115 (closed by stop)
            child = subprocess.Popen(
                [
                    *self.prefix(index), *self.command, "--join", address, "--address", self.data_address(index),
                    "--port", str(self.data_port(index)),
                ],
                env=self.environment(index, threads, token), stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for the engine, which then ends its workers
            )  # fmt: skip
            self._children.append(child)
            self._logs.append(log)

    def prefix(self, index: int) -> Sequence[str]:
        """A command that runs the worker's command; none here."""
        return ()

    def data_address(self, index: int) -> str:
        """Where other ranks reach this one."""
        return "127.0.0.1"

    def shape(self, rate: float | None) -> bool:
        """Loopback is as it is."""
        return False

    def data_port(self, index: int) -> int:
        """Its port there; 0 leaves it to the system."""
        return 0

    def interface(self, index: int) -> str:
        """The network device of the data plane."""
        return LOOPBACK

    def environment(self, index: int, threads: int, token: str) -> dict[str, str]:
        """The worker's environment."""
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {
            TOKEN_VARIABLE: token, LEASE_VARIABLE: "1", PLACE_VARIABLE: str(self.first_place + index),
            "GLOO_SOCKET_IFNAME": self.interface(index),
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(paths),
        }  # fmt: skip

    def pids(self) -> list[int]:
        """Process ids of the children."""
        return [child.pid for child in self._children]

    def dead(self) -> list[str]:
        """A line for each child that has ended, or that is stopped."""
        names = [f"rank {place} (process {child.pid})" for place, child in enumerate(self._children, self.first_place)]
        codes = [_code(child) for child in self._children]
        ended = [f"{name} {_how(code)}" for name, code in zip(names, codes, strict=True) if code is not None]
        stopped = [name for name, child in zip(names, self._children, strict=True) if _stopped(child)]
        return ended + [f"{name} is stopped" for name in stopped]

    def crashed(self) -> bool:
        """True if a child has ended by its own fault: with an exit code, or a signal that processors send."""
        codes = [_code(child) or 0 for child in self._children]
        return any(code > 0 or -code in CRASHES for code in codes)

    def last_words(self) -> list[str]:
        """The last line that each child that has ended printed."""
        pairs = zip(self._children, self._logs, strict=True)
        return [line for child, log in pairs if _code(child) is not None for line in _last_line(log)]

    def stop(self) -> None:
        """Kills what is left, waits for it, and closes every pipe and log."""
        children, logs = self._children, self._logs
        self._children, self._logs = [], []  # first: what is waited for has no number of its own any more
        for child in children:
            if _code(child) is None:
                child.kill()
        for child, log in zip(children, logs, strict=True):
            child.wait()
            if child.stdin:
                child.stdin.close()
            log.close()

    def close(self) -> None:
        """The same: nothing else is held."""
        self.stop()


def _code(child: subprocess.Popen[bytes]) -> int | None:
    """Its exit code, or the signal that ended it, below zero; None while it runs.

    Asking does not take the child off the system's list: until `stop`, its number is nobody else's.
    """
    if child.returncode is not None or not hasattr(os, "waitid"):
        return child.poll()
    done = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if done is None:
        return None
    return done.si_status if done.si_code == os.CLD_EXITED else -done.si_status


def _last_line(log: IO[bytes]) -> list[str]:
    log.seek(0)
    written = log.read().decode("utf-8", "replace").splitlines()
    lines = [line.strip() for line in written if line.strip() and not line.startswith("[W")]  # torch warns of nothing
    return lines[-1:]


def _stopped(child: subprocess.Popen[bytes]) -> bool:
    """True while a signal keeps it from running: whoever waits for it would wait for ever."""
    try:
        return bool(_code(child) is None and psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _how(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"
