"""Ranks on other machines: here they are processes that join over loopback, as they would over a network."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import Command, free_port
from tests.server.running import Running, running
from weft import LLM, SamplingParams
from weft.engine import Engine
from weft.errors import InputError, Interrupted
from weft.launch.addresses import interface_of, parse_address
from weft.launch.hub import SILENT, Hub
from weft.launch.joined import JoinedLauncher
from weft.launch.keys import key_of, new_key
from weft.opening import open_engine

SECRET = "a secret between us"
TOKEN = key_of(SECRET).token


def joining(port: int, token: str = TOKEN, *options: str) -> Command:
    """`weft worker` on "another machine"."""
    return Command("worker", "--join", f"127.0.0.1:{port}", *options, WEFT_TOKEN=token)


def worker_of(machine: Command) -> int:
    """Once it runs the worker's program: one that is stopped before that keeps its launcher waiting for it."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for child in psutil.Process(machine.child.pid).children():
            if "weft.execute.worker" in child.cmdline():
                return int(child.pid)
        time.sleep(0.005)
    raise AssertionError("no worker was started")


def ask(server: Running) -> str:
    with server.client() as http:
        asked = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}
        return str(http.post("/v1/completions", json=asked).json()["choices"][0]["text"])


@pytest.mark.parametrize("split", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp", "pp"])
def test_a_rank_that_joined_is_started_again_and_machines_may_change(packaged: Path, split: dict[str, int]) -> None:
    port = free_port()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 1)
    with (
        joining(port) as first, joining(port) as other,
        running(packaged, **split, launcher=launcher) as server,
    ):  # fmt: skip
        expected = ask(server)
        used, spare = (first, other) if "starting rank 1" in first.said else (other, first)
        spare.until("stands by")
        assert "stands by" not in used.said
        os.kill(worker_of(used), signal.SIGKILL)
        begin = time.monotonic()
        while server.service.state != "restarting":
            assert time.monotonic() - begin < 2.0
            time.sleep(0.01)
        assert re.search(r"\S+ \(127.0.0.1\): rank 1 \(process \d+\) was ended by SIGKILL", server.service.reason)
        assert ask(server) == expected
        assert used.end(signal.SIGTERM) == 130
        assert ask(server) == expected, "the other machine takes its place"
        spare.until("starting rank 1")
        server.service.close()
        spare.until("the server has ended")


def test_a_lost_machine_is_one_loss_and_is_waited_for(packaged: Path) -> None:
    """Killed with its worker, silent for long, replaced: said on the terminal and in /health; requests wait, and those
    that have no time end."""
    port, said = free_port(), list[str]()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 1)
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
    assert said[0].startswith("the ranks are started again: ")
    assert "waiting for 1 more machine to join at 127.0.0.1" in told and "there again" in told
    assert "gloo" not in told


def test_a_machine_that_comes_and_goes_never_ends_the_server(packaged: Path) -> None:
    """Five losses within a minute; see benchmarks/unplugging.py for more kinds of them."""
    port = free_port()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 1)
    with joining(port) as machine, running(packaged, tensor_parallel_size=2, launcher=launcher) as server:
        expected = ask(server)
        for losses in range(1, 6):
            os.kill(worker_of(machine), signal.SIGKILL)
            assert ask(server) == expected
            assert server.service.engine.workers.restarts.total == losses


def test_long_work_is_no_silence(packaged: Path) -> None:
    """Answers come one upon the other for longer than a machine waits for a sign of life."""
    port = free_port()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 0)
    with joining(port) as machine, running(packaged, launcher=launcher, max_num_seqs=1) as server:
        with server.client() as http:
            begin = time.monotonic()
            while time.monotonic() - begin < 1.5 * SILENT:
                asked = {"prompt": "def main(", "max_tokens": 1000, "ignore_eos": True}
                assert http.post("/v1/completions", json=asked).is_success
        assert server.service.engine.workers.restarts.total == 0 and "gone silent" not in machine.said


def test_who_has_another_token_is_not_heard() -> None:
    """Both sides say so."""
    port, said = free_port(), list[str]()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET, said.append), 0)
    with joining(port, new_key().token) as stranger:
        stranger.until("takes no hand-shake: WEFT_TOKEN is not the one", 20)
        end = time.monotonic() + 5
        while not said:
            assert launcher.hub.there() == [] and time.monotonic() < end
    assert said == ["a machine tried to join with another token than this server's, and is not heard"]
    launcher.close()


def test_a_server_that_is_not_there_is_said_so() -> None:
    with joining(free_port()) as early:
        early.until("no server answers at 127.0.0.1:", 20)


def test_a_machine_may_have_the_model_elsewhere(packaged: Path, tmp_path: Path) -> None:
    port = free_port()
    shutil.copytree(packaged, tmp_path / "model")
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 0)
    with joining(port, TOKEN, str(packaged)), running(tmp_path / "model", launcher=launcher) as server:
        assert ask(server)


def test_a_model_that_went_away_here_is_said_so(packaged: Path, tmp_path: Path) -> None:
    port = free_port()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 0)
    here = tmp_path / "model"
    shutil.copytree(packaged, here)
    with joining(port) as machine:
        with pytest.raises(InputError, match=r"model\.safetensors can't be read \(No such file"):
            LLM(here, num_threads=1, launcher=_Removing(launcher, here))
        machine.until("the server has ended")


def other_models(packaged: Path, tmp_path: Path) -> tuple[Path, Path]:
    """With other tensors; and with another number in one place that no sample is of."""
    other, changed = tmp_path / "other", tmp_path / "changed"
    for directory in (other, changed):
        shutil.copytree(packaged, directory)
    weights = load_file(packaged / "model.safetensors")
    save_file({**weights, "one.more": torch.zeros(3)}, other / "model.safetensors")
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)  # beside all samples
        file.write(b"\x07")
    return other, changed


class Opening:
    """An engine that is being opened on a thread, and waits for machines; closed at the end of a `with`."""

    def __init__(self, model: Path, launcher: JoinedLauncher, ranks: int, **options: Any) -> None:
        self.engines: list[Engine] = []
        self._launcher = launcher
        make = partial(open_engine, model, ranks=ranks, threads=1, overlap="serial", launcher=launcher, **options)
        self._thread = threading.Thread(target=lambda: self.engines.append(make()))
        self._thread.start()

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, *_: object) -> None:
        self._launcher.hub.interrupted.set()
        self._thread.join(60)
        for engine in self.engines:
            engine.close()

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def opened(self) -> Engine:
        self._thread.join(60)
        return self.engines[0]


def token_of(engine: Engine) -> int:
    request = engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=1))
    while request.sequences[0].finish_reason is None:
        engine.step()
    return request.sequences[0].output[0]


def test_a_machine_with_another_model_is_refused_and_the_server_waits_on(packaged: Path, tmp_path: Path) -> None:
    """Before the first start, and beside a group that is complete; whichever of its files differs is named, and a
    machine that has the right one takes its place."""
    other, changed = other_models(packaged, tmp_path)
    port, said = free_port(), list[str]()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET, said.append), 1)
    reason = r"other/model\.safetensors is not the file that the engine's machine has \(\d+ b"
    with Opening(packaged, launcher, 2) as opening:
        with joining(port, TOKEN, str(other)) as wrong:
            assert wrong.child.wait(30) == 2
            assert re.search(reason, wrong.said)
        assert opening.waits
        with joining(port, TOKEN, str(changed)) as right, joining(port, TOKEN, str(other)) as late:
            engine = opening.opened()
            assert "starting rank 1" in right.said
            end = time.monotonic() + 20
            while late.child.poll() is None:
                engine.look()
                assert time.monotonic() < end
            assert late.child.returncode == 2 and re.search(reason, late.said)
            assert token_of(engine) >= 0 and engine.workers.restarts.total == 0
    assert sum("is not used: " in line for line in said) == 2


def test_what_only_loading_finds_refuses_the_machine_and_not_the_server(packaged: Path, tmp_path: Path) -> None:
    """Numbers that differ where whole files are compared; one that has the same takes the place."""
    _, changed = other_models(packaged, tmp_path)
    port, said = free_port(), list[str]()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET, said.append), 0)
    with Opening(packaged, launcher, 1, check_content=True) as opening:
        with joining(port, TOKEN, str(changed)) as wrong:
            assert wrong.child.wait(60) == 2
            assert re.search(r"changed/model\.safetensors is not the file .*\(other numbers\)", wrong.said)
        assert opening.waits
        with joining(port, TOKEN, str(packaged)):
            assert opening.opened().workers.up
    assert sum("is not used: " in line for line in said) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_that_dies_while_it_loads_is_waited_for(packaged: Path, number: signal.Signals) -> None:
    port, said = free_port(), list[str]()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET, said.append), 1)
    with Opening(packaged, launcher, 2) as opening:
        with joining(port) as machine:
            machine.until("starting rank 1")
            os.kill(worker_of(machine), number)
            machine.until("rank 1 (process", 10)
        with joining(port):
            assert token_of(opening.opened()) >= 0
    assert any("the ranks are started again: " in line and "rank 1 (process" in line for line in said)


def test_a_start_is_interrupted_in_any_phase(packaged: Path) -> None:
    """While machines are waited for, while ranks come, and while they load."""
    for phase in ("waiting", "come", "loaded"):
        port = free_port()
        launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 1)
        reached, errors = threading.Event(), list[BaseException]()

        def tell(what: str, share: float, reached: threading.Event = reached) -> None:
            reached.set()

        def start(launcher: JoinedLauncher = launcher, tell: Any = tell, errors: Any = errors) -> None:
            try:
                open_engine(packaged, ranks=2, threads=1, launcher=launcher, progress=tell).close()
            except BaseException as error:
                errors.append(error)

        starting = threading.Thread(target=start)
        starting.start()
        with joining(port) if phase != "waiting" else nullcontext() as machine:
            if phase == "come":
                machine.until("starting rank 1")
            elif phase == "loaded":
                assert reached.wait(30)
            launcher.hub.interrupted.set()
            starting.join(5)
            assert not starting.is_alive(), phase
            assert not errors or isinstance(errors[0], Interrupted), errors  # one that was done with loading is whole


def test_a_directory_that_was_named_and_is_missing_is_said_so(packaged: Path, tmp_path: Path) -> None:
    with joining(free_port(), TOKEN, str(tmp_path / "missing")) as machine:
        assert machine.child.wait(30) == 2
        assert "or leave MODEL out: then this machine's part comes from the server's" in machine.said


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
        Command("serve", *options, "--join-address", f"[::1]:{port}", WEFT_TOKEN=SECRET) as server,
    ):
        said = server.until("for OpenAI's clients", 60)
        url = said[said.rindex("http://[::1]:") :].split()[0]
        asked = {"prompt": "def main(", "max_tokens": 4}
        assert httpx2.post(f"{url}v1/completions", json=asked, timeout=30).is_success
