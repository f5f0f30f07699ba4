"""Several engines behind one server: each request where it costs least, and one that is lost hurts no other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.replicated import NAME, SLOTS, Group, answer_of, replicated
from weft.batching.params import SamplingParams
from weft.errors import InputError, Unavailable
from weft.llm import LLM
from weft.server.client import State
from weft.server.replicas import Replicas
from weft.server.service import Service
from weft.server.ticket import Wishes
from weft.workers import Progress

LONG = list(range(1000, 1000 + 192))  # six blocks of a router's


@pytest.fixture(scope="module")
def group(packaged: Path) -> Iterator[Group]:
    with replicated(packaged, 1, 1) as there:
        yield there


@pytest.fixture(scope="module")
def alone(packaged: Path) -> Iterator[LLM]:
    with LLM(packaged, num_threads=1, max_model_len=1024) as llm:
        yield llm


def test_answers_are_those_of_one(group: Group, alone: LLM) -> None:
    prompts = ["import os\n", "class Shape:\n", "def main(", "The for statement is used to", "x = [", "while True:"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: group.ask(prompt, 24), prompts))
    assert answers == [answer_of(alone, prompt, 24) for prompt in prompts]


def test_a_conversation_stays_where_its_prefix_is(group: Group) -> None:
    first, second = LONG, [token + 200 for token in LONG]
    group.ask(first)
    group.ask(second)  # to the one that was given less
    before = group.reused()
    for turn in range(3):
        group.ask([*first, *range(100 + turn, 110 + turn)])
        group.ask([*second, *range(100 + turn, 110 + turn)])
    gained = [after - earlier for after, earlier in zip(group.reused(), before, strict=True)]
    assert all(each >= 3 * (len(LONG) - 8) for each in gained), f"{gained}: both have one conversation"


def test_long_answers_are_spread_although_they_begin_alike(group: Group) -> None:
    prompt, seen = [*range(2000, 2064)], [0, 0]
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        answers = [pool.submit(group.ask, prompt, 300) for _ in range(2 * SLOTS)]
        deadline = time.monotonic() + 30
        while min(seen) < SLOTS and not all(each.done() for each in answers) and time.monotonic() < deadline:
            seen = [max(most, service.running) for most, service in zip(seen, group.services, strict=True)]
            time.sleep(0.002)
    assert len({answer.result() for answer in answers}) == 1
    assert min(seen) >= SLOTS - 1, f"{seen} of {2 * SLOTS} at a time"


def test_schemas_are_followed_wherever_they_go(group: Group) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    asked = {"model": NAME, "messages": [{"role": "user", "content": "a number"}], "max_tokens": 40, "temperature": 0,
             "response_format": form}  # fmt: skip

    def one(number: int) -> str:
        answer = httpx2.post(f"{group.url}/v1/chat/completions", json=asked | {"seed": number}, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(4) as pool:
        for text in pool.map(one, range(4)):
            assert text.lstrip().startswith('{"a"') or text.lstrip().startswith("{"), text


def test_what_one_has_no_memory_for_another_one_may(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(prompt: list[int], params: SamplingParams) -> None:
        raise InputError("3 tokens need more key/value memory than is free")

    monkeypatch.setattr(group.services[0].engine.requests, "check", too_long)
    before = group.services[1].figures
    assert all(group.ask("import ", 2, seed=number) for number in range(3))
    after = group.services[1].figures
    assert before is not None and after is not None and after.looked_up > before.looked_up
    monkeypatch.setattr(group.services[1].engine.requests, "check", too_long)
    answer = httpx2.post(f"{group.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
    assert answer.status_code == 400 and "key/value memory" in json.dumps(answer.json())


def test_metrics_and_state_are_of_all(group: Group) -> None:
    group.ask("import ")
    text = httpx2.get(f"{group.url}/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line and line[0] != "#"}
    asked = sum(service.figures.looked_up for service in group.services if service.figures)
    assert values['vllm:prefix_cache_queries_total{model_name="tested"}'] == asked > 0
    about = group.replicas.about
    assert (about.replicas, about.ranks) == (2, 1)
    assert httpx2.get(f"{group.url}/health").status_code == 200


def test_who_goes_away_frees_the_slot(group: Group) -> None:
    asked = {"prompt": "def ", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{group.url}/v1/completions", json=asked, timeout=30) as answer:
        lines = answer.iter_lines()  # kept: the stream ends with its iterator
        next(lines)
        assert group.replicas.running == 1
    deadline = time.monotonic() + 10
    while group.replicas.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert group.replicas.running == 0


def test_a_lost_rank_costs_its_replica_time_and_the_other_one_serves(packaged: Path, alone: LLM) -> None:
    with replicated(packaged, 2, 1) as group:
        prompts = ["import os\n", "class Shape:\n", "def main(", "x = ["]
        expected = [answer_of(alone, prompt, 400) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(group.ask, prompt, 400) for prompt in prompts]
            deadline = time.monotonic() + 20
            while not all(service.running for service in group.services) and time.monotonic() < deadline:
                time.sleep(0.002)
            assert all(service.running for service in group.services)
            os.kill(group.launchers[0].pids()[0], signal.SIGKILL)
            while group.services[0].state is not State.RESTARTING and time.monotonic() < deadline:
                time.sleep(0.002)
            assert group.services[0].state is State.RESTARTING
            assert group.replicas.state is State.READY, "the other one serves"
            group.ask("quick:", 2)
            assert group.services[0].state is State.RESTARTING, "and answered before that one was back"
        assert [answer.result() for answer in answers] == expected


def test_one_that_has_given_up_gets_no_requests(packaged: Path) -> None:
    with replicated(packaged, 1, 1) as group:
        service = group.services[0]
        service._commands.put(_fail)
        deadline = time.monotonic() + 10
        while service.state is not State.FAILED and time.monotonic() < deadline:
            time.sleep(0.005)
        assert service.state is State.FAILED and group.replicas.state is State.READY
        assert group.replicas.error is None
        health = httpx2.get(f"{group.url}/health")
        assert health.status_code == 200 and "replica 1 has given up: planted" in health.json()["reason"]
        figures = group.replicas.figures
        assert figures is not None and (figures.ranks, figures.slots) == (1, SLOTS), "of the one that is left"
        for _ in range(3):
            assert group.ask("import ")
        group.services[1]._commands.put(_fail)
        while group.services[1].state is not State.FAILED and time.monotonic() < deadline:
            time.sleep(0.005)
        assert group.replicas.state is State.FAILED and isinstance(group.replicas.error, ZeroDivisionError)
        answer = httpx2.post(f"{group.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
        assert answer.status_code == 503 and "given up" in json.dumps(answer.json())


def test_all_together_refuse_what_would_wait_too_long(packaged: Path) -> None:
    with replicated(packaged, 1, 1) as group:
        for service in group.services:
            service.most_waiting = 2
        slots = 2 * SLOTS
        with ThreadPoolExecutor(2 * slots) as pool:
            asked = {"prompt": "def ", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
            answers = list(
                pool.map(lambda _: httpx2.post(f"{group.url}/v1/completions", json=asked, timeout=60), range(2 * slots))
            )
        taken = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(taken) + len(refused) == 2 * slots and slots <= len(taken) <= slots + 2 + slots // 2
        assert refused and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def _fail() -> None:
    raise ZeroDivisionError("planted")


def test_what_keeps_one_from_loading_is_said_and_ends_all() -> None:
    def broken(tell: Progress) -> Any:
        raise InputError("there is no such model")

    begun = threading.Event()

    def never(tell: Progress) -> Any:
        begun.set()
        raise AssertionError("the one before it is not there")

    replicas = Replicas([Service(broken), Service(never)])
    replicas.start()
    with pytest.raises(InputError, match="no such model"):
        asyncio.run(replicas.loaded_or_failed())
    with pytest.raises(Unavailable, match="no such model"):
        asyncio.run(replicas.submit([1], SamplingParams(), Wishes()))
    replicas.close()
    assert not begun.is_set() and isinstance(replicas.error, InputError)


def test_closing_while_the_first_one_loads_waits_for_nothing() -> None:
    loading = threading.Event()

    def slow(tell: Progress) -> Any:
        loading.set()
        while True:
            tell("loading", 0.5)
            time.sleep(0.01)

    replicas = Replicas([Service(slow), Service(slow)])
    replicas.start()
    assert loading.wait(5) and replicas.state is State.LOADING
    while not replicas.reason:
        time.sleep(0.005)
    assert replicas.reason == "replica 1: loading" and replicas.loaded == 0.25
    begin = time.monotonic()
    replicas.close()
    assert time.monotonic() - begin < 5
