"""A rank is killed, stopped or cut off while answers are streamed: they go on, and nothing is lost or said twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.running import Running, running
from weft.launch.local import LocalLauncher
from weft.launch.namespaces import NamespaceLauncher, demand_namespaces
from weft.llm import LLM
from weft.server.client import State

PROMPTS = ["The for statement is used to", "import os\n", "class Shape:\n", "def main("]
TOKENS = 200


def ask(server: Running, prompt: str, tokens: int = TOKENS) -> str:
    """A streamed answer's text."""
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=asked) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def all_at_once(server: Running) -> list[str]:
    """Every prompt's answer, asked for together."""
    found = [""] * len(PROMPTS)

    def one(number: int) -> None:
        found[number] = ask(server, PROMPTS[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


class Watch:
    """When the service noticed that it had lost a rank, and when it was back."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.noticed = self.reason = None

    def until_noticed(self, limit: float) -> tuple[float, str]:
        """Seconds from now."""
        begin = time.monotonic()
        while self.server.service.state is not State.RESTARTING:
            assert time.monotonic() - begin < limit, f"not noticed within {limit} s"
            time.sleep(0.005)
        return time.monotonic() - begin, self.server.service.reason


@pytest.fixture(scope="module")
def launcher() -> NamespaceLauncher | LocalLauncher:
    try:
        demand_namespaces()
    except ValueError:
        return LocalLauncher()
    return NamespaceLauncher()


@pytest.fixture(scope="module", params=[{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp", "pp"])
def server(request: pytest.FixtureRequest, packaged: Path, launcher: LocalLauncher) -> Iterator[Running]:
    with running(packaged, **request.param, max_num_seqs=4, launcher=launcher) as there:
        yield there
        there.service.check_integrity()
        assert there.service.running == there.service.waiting == 0


@pytest.fixture(scope="module")
def expected(server: Running) -> list[str]:
    return [ask(server, prompt) for prompt in PROMPTS]


def kill(launcher: LocalLauncher) -> None:
    os.kill(launcher.pids()[1], signal.SIGKILL)


def stop(launcher: LocalLauncher) -> None:
    os.kill(launcher.pids()[0], signal.SIGSTOP)


def cut(launcher: LocalLauncher) -> None:
    if not isinstance(launcher, NamespaceLauncher):
        pytest.skip("cutting a link needs root and iproute2")
    subprocess.run(["ip", "-n", launcher.prefix(0)[-1], "link", "set", "data0", "down"], check=True)


@pytest.mark.parametrize(("harm", "limit"), [(kill, 2.0), (stop, 2.0), (cut, 2.0)])
def test_answers_go_on(
    server: Running, launcher: LocalLauncher, expected: list[str], harm: Callable[[LocalLauncher], None], limit: float
) -> None:
    server.service.engine.workers.restarts.clear()  # each case is an accident of its own
    found: list[list[str]] = []
    asking = threading.Thread(target=lambda: found.append(all_at_once(server)))
    asking.start()
    while server.service.running < len(PROMPTS):
        time.sleep(0.01)
    time.sleep(0.2)
    harm(launcher)
    seconds, reason = Watch(server).until_noticed(limit)
    asking.join(60)
    assert found == [expected], f"after {reason}"
    assert server.service.state is State.READY
    print(f"{harm.__name__}: {reason}; noticed after {seconds:.2f} s")


def test_noticed_while_nothing_runs(server: Running, launcher: LocalLauncher, expected: list[str]) -> None:
    server.service.engine.workers.restarts.clear()
    kill(launcher)
    Watch(server).until_noticed(2.0)
    assert ask(server, PROMPTS[0]) == expected[0]


def test_gives_up_when_workers_do_not_stay(packaged: Path) -> None:
    launcher = LocalLauncher()
    over = threading.Event()

    def harm() -> None:
        while not over.wait(0.1):
            for pid in launcher.pids():
                os.kill(pid, signal.SIGKILL)

    with running(packaged, launcher=launcher) as server, server.client() as http:
        harming = threading.Thread(target=harm)
        harming.start()
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 500, "ignore_eos": True})
        until = time.monotonic() + 60
        while http.get("/health").status_code != 503 and time.monotonic() < until:
            time.sleep(0.1)
        over.set()
        harming.join()
        health = http.get("/health")
        assert health.status_code == 503 and "within a minute" in health.json()["reason"]
        assert answer.status_code == 503 and answer.json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert http.get("/ready").status_code == 503 and http.get("/metrics").is_success


def test_while_it_loads_and_when_it_cannot(packaged: Path) -> None:
    goes_on = threading.Event()

    def slowly(tell: Callable[[str, float], None]) -> object:
        tell("loading", 0.5)
        assert goes_on.wait(30)
        return LLM(packaged, tensor_parallel_size=2, shares=(1,)).engine

    with running(make=slowly) as server, server.client() as http:  # type: ignore[arg-type]
        assert http.get("/health").json() == {"status": "loading", "reason": "loading", "loaded": 0.5}
        assert http.get("/ready").status_code == 503
        early = http.post("/v1/completions", json={"prompt": "a"})
        assert early.status_code == 503 and early.headers["retry-after"]
        goes_on.set()
        with pytest.raises(ValueError, match="shares"):
            server.service.wait()
        assert http.get("/health").status_code == 503
