"""Ranks on other machines: here they are processes that join over loopback, as they would over a network."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.processes import Command, free_port
from tests.server.running import Running, running
from weft import LLM
from weft.errors import InputError
from weft.launch.addresses import interface_of, parse_address
from weft.launch.joined import SILENT, JoinedLauncher

TOKEN = "between-us"


def joining(port: int, token: str = TOKEN, *options: str) -> Command:
    """`weft worker` on "another machine"."""
    return Command("worker", "--join", f"127.0.0.1:{port}", *options, WEFT_TOKEN=token)


def worker_of(machine: Command) -> int:
    return int(psutil.Process(machine.child.pid).children()[0].pid)


def ask(server: Running) -> str:
    with server.client() as http:
        asked = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}
        return str(http.post("/v1/completions", json=asked).json()["choices"][0]["text"])


def test_a_rank_that_joined_is_started_again_and_machines_may_change(packaged: Path) -> None:
    port = free_port()
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 1, TOKEN, lambda line: None)
    with (
        joining(port) as first, joining(port) as other,
        running(packaged, tensor_parallel_size=2, launcher=launcher) as server,
    ):  # fmt: skip
        expected = ask(server)
        used, spare = (first, other) if "starting rank 1" in first.said else (other, first)
        os.kill(worker_of(used), signal.SIGKILL)
        begin = time.monotonic()
        while server.service.state != "restarting":
            assert time.monotonic() - begin < 2.0
            time.sleep(0.01)
        assert re.search(r"the worker on \S+ \(127.0.0.1\): .*SIGKILL", server.service.reason)
        assert ask(server) == expected
        assert used.end(signal.SIGTERM) == 130
        assert ask(server) == expected, "the other machine takes its place"
        spare.until("starting rank 1")
        server.service.close()
        spare.until("as it was told to")


def test_a_lost_machine_is_one_loss_and_is_waited_for(packaged: Path) -> None:
    """Killed with its worker, silent for long, replaced: said on the terminal and in /health; requests wait, and those
    that have no time end."""
    port, said = free_port(), list[str]()
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 1, TOKEN, lambda line: None)
    with joining(port) as lost, running(packaged, tensor_parallel_size=2, launcher=launcher) as server:
        launcher.told = server.service.tell
        server.service._told = said.append
        expected = ask(server)
        lost.child.kill()
        with server.client() as http:
            end = time.monotonic() + 20
            while "waiting for 1 more machine to join" not in (health := http.get("/health").json())["reason"]:
                assert time.monotonic() < end, health
                time.sleep(0.05)
            assert health["status"] == "restarting" and http.get("/ready").status_code == 503
            waiting: list[str] = []
            asking = threading.Thread(target=lambda: waiting.append(ask(server)))
            asking.start()
            hurried = {"prompt": "a", "timeout": 0.5}
            assert http.post("/v1/completions", json=hurried).json()["choices"][0]["finish_reason"] == "timeout"
            time.sleep(SILENT)  # longer than a machine may be silent
            with joining(port):
                asking.join(60)
                assert waiting == [expected] and http.get("/health").json()["status"] == "ready"
            metrics = http.get("/metrics").text
    assert re.search(r"^weft:restarts_total\S* 1.0$", metrics, re.MULTILINE)
    told = " ".join(said)
    assert said[0].startswith("the workers are started again: ")
    assert "waiting for 1 more machine to join at 127.0.0.1" in told and "there again" in told
    assert "gloo" not in told


def test_a_machine_that_comes_and_goes_never_ends_the_server(packaged: Path) -> None:
    """Five losses within a minute; see benchmarks/unplugging.py for more kinds of them."""
    port = free_port()
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 1, TOKEN, lambda line: None)
    with joining(port) as machine, running(packaged, tensor_parallel_size=2, launcher=launcher) as server:
        expected = ask(server)
        for losses in range(1, 6):
            os.kill(worker_of(machine), signal.SIGKILL)
            assert ask(server) == expected
            assert server.service.engine.workers.restarts.total == losses


def test_long_work_is_no_silence(packaged: Path) -> None:
    """Answers come one upon the other for longer than a machine waits for a sign of life."""
    port = free_port()
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 0, TOKEN, lambda line: None)
    with joining(port) as machine, running(packaged, launcher=launcher, max_num_seqs=1) as server:
        with server.client() as http:
            begin = time.monotonic()
            while time.monotonic() - begin < 1.5 * SILENT:
                asked = {"prompt": "def main(", "max_tokens": 1000, "ignore_eos": True}
                assert http.post("/v1/completions", json=asked).is_success
        assert server.service.engine.workers.restarts.total == 0 and "gone silent" not in machine.said


def test_who_has_another_token_is_not_heard() -> None:
    port = free_port()
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 0, TOKEN, lambda line: None)
    with joining(port, "another") as stranger:
        stranger.until("doesn't answer: WEFT_TOKEN is not the one", 20)
        assert launcher._there(0.0) == []
    launcher.close()


def test_a_machine_may_have_the_model_elsewhere(packaged: Path, tmp_path: Path) -> None:
    port = free_port()
    shutil.copytree(packaged, tmp_path / "model")
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 0, TOKEN, lambda line: None)
    with joining(port, TOKEN, str(packaged)), running(tmp_path / "model", launcher=launcher) as server:
        assert ask(server)


def test_a_model_that_is_missing_there_is_said_so(packaged: Path, tmp_path: Path) -> None:
    port = free_port()
    launcher = JoinedLauncher(f"127.0.0.1:{port}", 0, TOKEN, lambda line: None)
    here = tmp_path / "model"
    shutil.copytree(packaged, here)
    with joining(port) as machine:
        with pytest.raises(InputError, match="has no directory .*weft worker MODEL"):
            LLM(here, num_threads=1, launcher=_Removing(launcher, here))
        machine.until("as it was told to")


class _Removing:
    """A launcher during whose start the model goes away, as it is missing on another machine."""

    def __init__(self, launcher: JoinedLauncher, directory: Path) -> None:
        self._launcher, self._directory = launcher, directory

    def start(self, *arguments: Any) -> None:
        shutil.rmtree(self._directory)
        self._launcher.start(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)


def test_addresses() -> None:
    assert parse_address("10.0.0.1:7000", "--join") == ("10.0.0.1", 7000)
    assert parse_address("tcp://[::1]:7000", "--join") == ("::1", 7000)
    for wrong in ("10.0.0.1", ":7000", "a:b", "a:0", "a:70000", ""):
        with pytest.raises(InputError, match="write it like"):
            parse_address(wrong, "--join")
    assert interface_of("127.0.0.1")
    with pytest.raises(InputError, match="no network device"):
        interface_of("192.0.2.1")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as found:
            found.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_everything_over_ipv6(packaged: Path) -> None:
    port = free_port()
    options = "--tp", "2", "--threads", "1", "--overlap", "serial", "--port", "0", "--host", "[::1]"
    with (
        Command("worker", "--join", f"[::1]:{port}", WEFT_TOKEN=TOKEN),
        Command("serve", *options, "--join-address", f"[::1]:{port}", WEFT_TOKEN=TOKEN) as server,
    ):
        said = server.until("for OpenAI's clients", 60)
        url = said[said.rindex("http://[::1]:") :].split()[0]
        asked = {"prompt": "def main(", "max_tokens": 4}
        assert httpx2.post(f"{url}v1/completions", json=asked, timeout=30).is_success
