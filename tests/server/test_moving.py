"""Requests of a replica whose ranks are missing go on with another one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.replicated import answer_of, replicated
from weft.batching.params import SamplingParams
from weft.batching.request import Request
from weft.errors import GivenUp
from weft.llm import LLM
from weft.server.client import State
from weft.server.service import Service


@pytest.fixture(scope="module")
def alone(packaged: Path) -> Iterator[LLM]:
    with LLM(packaged, num_threads=1, max_model_len=1024) as llm:
        yield llm


def test_requests_of_one_whose_machine_is_gone_go_on_elsewhere(
    packaged: Path, alone: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the tokens that they have."""
    monkeypatch.setattr("weft.server.replicas.MOVES_AFTER", 0.3)
    with replicated(packaged, 1, 1, max_num_seqs=8) as group:
        prompts = ["import os\n", "class Shape:\n", "def main(", "x = ["]
        expected = [answer_of(alone, prompt, 700) for prompt in prompts]
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                  "additionalProperties": False}  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        with ThreadPoolExecutor(len(prompts) + 1) as pool, missing_machine(group.services[0]) as back:
            answers = [pool.submit(group.ask, prompt, 700) for prompt in prompts]
            answers.append(pool.submit(group.ask, "a", 700, n=2, response_format=form, seed=4))
            deadline = time.monotonic() + 30
            while not all(service.running for service in group.services) and time.monotonic() < deadline:
                time.sleep(0.002)
            os.kill(group.launchers[0].pids()[0], signal.SIGKILL)
            while group.services[0].state is not State.RESTARTING and time.monotonic() < deadline:
                time.sleep(0.002)
            health = httpx2.get(f"{group.url}/health")
            assert health.status_code == 200 and "replica 1: the ranks are started again" in health.json()["reason"]
            assert [answer.result(timeout=60) for answer in answers[:4]] == expected
            assert answers[4].result(timeout=60).lstrip().startswith("{")
            assert group.services[0].state is State.RESTARTING and not group.services[0].busy
            back.set()
            while group.services[0].state is not State.READY and time.monotonic() < deadline + 30:
                time.sleep(0.01)
        assert group.services[0].state is State.READY and group.replicas.reason == ""
        assert group.ask(prompts[0], 700) == expected[0]


def test_who_goes_away_on_the_way_to_another_replica_is_not_computed(
    packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.server.replicas.MOVES_AFTER", 0.0)
    with replicated(packaged, 1, 1) as group, missing_machine(group.services[0]):
        first, second = group.services
        asked = {"prompt": "def ", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
        held, added = threading.Event(), list[Any]()
        monkeypatch.setattr(second.engine.batcher, "add", added.append)
        with httpx2.stream("POST", f"{group.url}/v1/completions", json=asked, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            second._commands.put(lambda: held.wait(20) and None)
            os.kill(group.launchers[0].pids()[0], signal.SIGKILL)
            deadline = time.monotonic() + 20
            while (not first.missing or first.busy) and time.monotonic() < deadline:
                time.sleep(0.002)
            assert not first.busy and second.waiting == 1, "on its way"
        time.sleep(0.3)  # the server notices that nobody reads
        held.set()
        while second.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not added and not second.busy and second.waiting == 0


def test_one_that_ends_ranks_wherever_it_goes_stays(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.replicas.MOVES_AFTER", 0.0)
    with replicated(packaged, 1, 1) as group, missing_machine(group.services[0]) as back, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(group.ask, "import ", 900)
        deadline = time.monotonic() + 20
        while not group.services[0].running and time.monotonic() < deadline:
            time.sleep(0.002)
        [ticket] = group.services[0].tickets
        assert ticket.request is not None
        ticket.request.failures = 1  # and one more now
        os.kill(group.launchers[0].pids()[0], signal.SIGKILL)
        while group.services[0].state is not State.RESTARTING and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.5)
        assert group.services[0].busy and not group.services[1].busy
        back.set()
        assert answer.result(timeout=60)


def test_moved_requests_are_spread_and_go_where_they_fit(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three has no machine any more, and another one less memory than some requests were promised."""
    monkeypatch.setattr("weft.server.replicas.MOVES_AFTER", 0.5)
    monkeypatch.setattr("weft.server.replicas.QUEUES_AFTER", 3600.0)
    with replicated(packaged, 1, 1, 1) as group, missing_machine(group.services[0]) as back:
        first, second, third = group.services
        monkeypatch.setattr(second, "takes", lambda ticket, later: False)
        monkeypatch.setattr(third, "takes", lambda ticket, later: False)
        with ThreadPoolExecutor(8) as pool:
            monkeypatch.setattr(group.replicas._router, "order", lambda *given: [0])
            answers = [pool.submit(group.ask, f"def f{number}(", 600) for number in range(4)]
            deadline = time.monotonic() + 30
            while first.running < 4 and time.monotonic() < deadline:
                time.sleep(0.002)
            os.kill(group.launchers[0].pids()[0], signal.SIGKILL)
            while first.missing is None and time.monotonic() < deadline:
                time.sleep(0.002)
            monkeypatch.undo()
            monkeypatch.setattr("weft.server.replicas.MOVES_AFTER", 0.5)
            while first.busy and time.monotonic() < deadline:
                time.sleep(0.002)
            assert second.running + second.waiting == third.running + third.waiting == 2, "two each"
            assert all(len(answer.result(timeout=60)) > 0 for answer in answers)
        request = Request((1, 2, 3), SamplingParams(max_tokens=None), 900)
        assert second.engine.requests.can_run(request)
        monkeypatch.setattr(second.engine.batcher, "memory", 500)
        assert not second.engine.requests.can_run(request), "it was promised more than there is"
        monkeypatch.undo()
        back.set()
        while first.state is not State.READY and time.monotonic() < deadline + 30:
            time.sleep(0.01)


def test_who_gives_up_hands_on_what_it_has(packaged: Path, alone: LLM) -> None:
    with replicated(packaged, 1, 1) as group, ThreadPoolExecutor(2) as pool:
        first, prompts = group.services[0], ["import os\n", "class Shape:\n"]
        expected = [answer_of(alone, prompt, 600) for prompt in prompts]
        answers = [pool.submit(group.ask, prompt, 600) for prompt in prompts]
        deadline = time.monotonic() + 30
        while not all(service.running for service in group.services) and time.monotonic() < deadline:
            time.sleep(0.002)
        first._commands.put(_give_up)
        assert [answer.result(timeout=60) for answer in answers] == expected
        assert first.state is State.FAILED and group.services[1].state is State.READY


def _give_up() -> None:
    raise GivenUp("planted")


@contextmanager
def missing_machine(service: Service) -> Iterator[threading.Event]:
    """Its workers are not started again before the event is set."""
    back, workers = threading.Event(), service.engine.workers
    bring_up = workers._bring_up

    def waits(*given: Any) -> None:
        while not back.is_set():
            workers.meanwhile()
            time.sleep(0.01)
        bring_up(*given)

    workers._bring_up = waits  # type: ignore[method-assign]
    try:
        yield back
    finally:
        back.set()
