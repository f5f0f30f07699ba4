"""`weft serve` as a process: what it prints, signals, mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.guardian import MARK, marked
from tests.launch.test_namespaces import needs_namespaces
from tests.processes import Command, free_port
from weft.cli.main import main
from weft.launch.keys import key_of


@contextmanager
def started(*options: str, **environment: str) -> Iterator[Command]:
    """A server; nothing is left behind, whatever the test does."""
    before = workers()
    with Command("serve", "--port", "0", "--threads", "1", *options, **environment) as server:
        yield server
    until = time.monotonic() + 10
    while workers() - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not workers() - before


def workers() -> set[int]:
    """All worker processes of these tests."""
    found = set[int]()
    for process in marked(os.environ[MARK]):
        with suppress(psutil.Error):
            if "weft.execute.worker" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def url_of(server: Command) -> str:
    """When it is ready."""
    found = re.search(r"(http://\S+)/v1", server.until("/v1"))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(number: int) -> None:
    with started() as server:
        url = url_of(server)
        asked = {"prompt": "import os", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.child.send_signal(number)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.child.wait(20) == 0
        assert "Traceback" not in server.said


def test_a_second_signal_does_not_wait() -> None:
    with started() as server:
        url = url_of(server)
        asked = {"prompt": "import os", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as answer:
            lines = answer.iter_lines()  # kept: the stream ends with its iterator
            next(lines)
            server.child.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            begin = time.monotonic()
            server.end(signal.SIGTERM, 10)
            assert time.monotonic() - begin < 5
        assert "Traceback" not in server.said


def test_a_signal_while_it_loads() -> None:
    with started("--tp", "2") as server:
        time.sleep(2.5)
        assert server.end(signal.SIGINT) in (0, 130)
        assert "Traceback" not in server.said


def test_mistakes_end_with_a_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, says in (
            (["--port", port], f"port {port} of 127.0.0.1 can't be used"),
            (["--host", "0.0.0.0"], "give --api-key"),
            (
                ["--host", "not.a.host.invalid", "--allow-anyone"],
                "network device 'not.a.host.invalid' is known",
            ),
            (["--api-key", ""], "an API key is empty"),
            (["--isolate-prefixes"], "keeps prefixes within an API key, and there is none"),
            ([str(tmp_path)], "config.json is missing"),
            (["--tp", "2", "--shares", "1"], "--shares gives 1 number for 2 ranks"),
            (["--tp", "2", "--join-address", "nowhere"], "not an address"),
            (["--tp", "2", "--join-address", "0.0.0.0:7000"], "the address at which the other machines reach"),
            (["--tp", "2", "--join-address", "192.0.2.1:7000"], "no network device"),
            (["--tp", "2", "--join-address", "127.0.0.1:7000", "--local-ranks", "2"], "leaves no rank"),
            (["--replicas", "2", "--join-address", "127.0.0.1:7000", "--local-ranks", "2"], "leaves no rank"),
            (["--replicas", "2", "--tp", "auto"], "give one with --pp, --layers, --layout and --replicas"),
            (["--tp", "2", "--join-address", "127.0.0.1:7000", "--rank-ports", "7000"], "--join-address overlap"),
            (["--replicas", "3", "--join-address", "127.0.0.1:7000", "--rank-ports", "6999"], "overlap"),
            (["--token-interval", "0"], "must be above 0"),
            (["--tp", "2", "--optimise", "speed", "--join-address", "127.0.0.1:7000"], "--optimise 'speed' is not kn"),
            (["--pp", "99", "--join-address", "127.0.0.1:7000", "--threads", "1"], "--pp 99: the model has 6 layers"),
            (["--pp", "2", "--layers", "9,9", "--join-address", "127.0.0.1:7000"], "--layers 9,9 does not go with"),
            (["--tp", "2", "--overlap", "bogus", "--join-address", "127.0.0.1:7000"], "--overlap 'bogus' is not a str"),
            (["--tp", "2", "--wire", "bogus", "--join-address", "127.0.0.1:7000"], "--wire 'bogus' is not known"),
            (["--tp", "2", "--max-model-len", "1", "--join-address", "127.0.0.1:7000"], "holds no prompt with an an"),
            (["--pp", "2", "--shares", "9", "--join-address", "127.0.0.1:7000"], "--shares gives 1 number for 2 ra"),
        ):
            monkeypatch.setattr("sys.argv", ["weft", "serve", "--port", "0", *options])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr().err
            assert ended.value.code == 2 and says in said and said.count("\n") == 1, (options, said)


def test_the_key_may_come_from_the_environment() -> None:
    with started("--host", "0.0.0.0", WEFT_API_KEY="sk-secret") as server:
        url = url_of(server).replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        assert httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer sk-secret"}).status_code == 200
        server.end(signal.SIGTERM)
        assert "sk-secret" not in server.said


def test_replicas_here_and_on_a_machine_that_joins() -> None:
    port, secret = free_port(), {"WEFT_TOKEN": "a secret of this test's"}
    joining = ("--replicas", "2", "--join-address", f"127.0.0.1:{port}")
    asked = {"prompt": "import os", "max_tokens": 5, "temperature": 0}
    with started(*joining, **secret) as server:
        said = server.until("weft worker --join")
        assert "on 1 other machine, run:" in said and "replica 1: on" not in said
        token = re.search(r"WEFT_TOKEN=(\S+)", said)
        assert token is not None
        with Command("worker", "--join", f"127.0.0.1:{port}", WEFT_TOKEN=token[1]) as machine:
            url = url_of(server)
            assert "on 2 replicas of 1 rank" in server.said
            answers = [httpx2.post(f"{url}/v1/completions", json=asked, timeout=30).json() for _ in range(4)]
            assert len({answer["choices"][0]["text"] for answer in answers}) == 1
            assert httpx2.get(f"{url}/live").json()["ranks"] == 2
            machine.end(signal.SIGKILL)
        server.until("replica 2: the ranks are started again")
        for number in range(4):  # the one that is left has them all
            answer = httpx2.post(f"{url}/v1/completions", json=asked | {"seed": number}, timeout=30)
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"]
        assert httpx2.get(f"{url}/ready").status_code == 200
        with Command("worker", "--join", f"127.0.0.1:{port}", WEFT_TOKEN=token[1]):
            server.until("replica 2: the ranks are there again")
        assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.said


def test_replicas_on_two_machines_that_join_at_one_address() -> None:
    """One that stands by takes the place of whichever is lost."""
    port, secret = free_port(), {"WEFT_TOKEN": "a secret of this test's"}
    joining = ("--replicas", "2", "--local-ranks", "0", "--join-address", f"127.0.0.1:{port}")
    asked = {"prompt": "import os", "max_tokens": 5, "temperature": 0}

    def machine() -> Command:
        return Command("worker", "--join", f"127.0.0.1:{port}", WEFT_TOKEN=key_of(secret["WEFT_TOKEN"]).token)

    with started(*joining, **secret) as server, machine() as first, machine() as second:
        url = url_of(server)
        assert "on 2 replicas of 1 rank" in server.said and "on 2 other machines, run:" in server.said
        assert "stands by" not in server.said
        with machine() as third:
            third.until("stands by")
            second.end(signal.SIGKILL)
            third.until("starting rank 0")
            first.end(signal.SIGKILL)
            server.until("waiting for 1 more machine")
            with machine():
                server.until("are there again")
                for number in range(4):
                    answer = httpx2.post(f"{url}/v1/completions", json=asked | {"seed": number}, timeout=30)
                    assert answer.status_code == 200 and answer.json()["choices"][0]["text"]
                assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.said


@needs_namespaces
@pytest.mark.parametrize("given", [False, True])
def test_layout_auto_becomes_replicas_where_these_are_better(given: bool) -> None:
    """Over a slow and long link nothing else is nearly as good; a number that is given stays."""
    options = ["--tp", "2", "--link", "20mbit,10ms", "--layout", "auto", "--optimise", "throughput:64,64"]
    asked = {"prompt": "import os", "max_tokens": 5, "temperature": 0}
    with started(*options, *(["--replicas", "1"] if given else [])) as server:
        url = url_of(server)
        said = " ".join(server.said.split())
        if given:
            assert "on 2 ranks" in said and "Replicas would be better: weft serve --replicas 2 --tp 1" in said
        else:
            assert "on 2 replicas of 1 rank" in said and "layout 2 replicas of tp 1 by cost (throughput of 64" in said
            assert "; tp 2: " in said and "; tp 1 x pp 2: " in said
        assert httpx2.get(f"{url}/live").json()["ranks"] == 2
        assert httpx2.post(f"{url}/v1/completions", json=asked, timeout=30).status_code == 200
        assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.said


def test_a_signal_while_the_second_replica_waits_for_its_machine() -> None:
    with started("--replicas", "2", "--join-address", f"127.0.0.1:{free_port()}") as server:
        server.until("waiting for 1 more machine")
        server.end(signal.SIGINT, 10)
        assert "Traceback" not in server.said
