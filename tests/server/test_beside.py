"""What takes long is read beside the server: within limits of time and memory, one body hurting no other."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.server.running import NAME, Running, running
from weft.errors import Busy, Unavailable
from weft.server import beside
from weft.server.asked import Answered, Asked, Facts, unpacked
from weft.server.beside import Helper, Turns
from weft.server.child import SCHEMA, Job
from weft.server.refused import Refused

ENDLESS = (
    "{% if messages[0]['content'] == 'for ever' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif messages[0]['content'] == 'much' %}"
    "{% set n = namespace(text='a') %}{% for a in range(40) %}{% set n.text = n.text ~ n.text %}{% endfor %}"
    "{% endif %}{{ messages[0]['content'] }}"
)
MANY = {"prompt": [{}] * 1_300_000}  # 100 MB as objects


@pytest.fixture(scope="module")
def endless(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with a template that takes for ever for some."""
    directory = tmp_path_factory.mktemp("endless")
    for path in packaged.iterdir():
        if path.is_file():
            shutil.copy(path, directory)
    (directory / "chat_template.jinja").write_text(ENDLESS, "utf-8")
    return directory


@pytest.fixture(scope="module")
def server(endless: Path) -> Iterator[Running]:
    with running(endless) as there:
        yield there


def facts_of(directory: Path, vocabulary: int = 8192) -> Facts:
    return Facts(str(directory), NAME, vocabulary, 2048, (0,), {}, 64, "mean")


def chat(content: str) -> Job:
    return Job("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": content}]}).encode())


def run(helper: Helper, work: Callable[[], Awaitable[None]]) -> None:
    """`work` on a loop; the helper is closed afterwards, and nothing of it is left."""

    async def all_of_it() -> None:
        try:
            async with asyncio.timeout(60):
                await work()
        finally:
            await helper.close()

    before = set(psutil.Process().children(recursive=True))
    asyncio.run(all_of_it())
    assert set(psutil.Process().children(recursive=True)) <= before


def test_limits_end_one_body_and_no_other(endless: Path) -> None:
    helper, facts = Helper(1.0, 64), facts_of(endless)

    async def work() -> None:
        plain = await helper.read(facts, chat("hello"), "me")
        assert isinstance(plain, Asked) and unpacked(plain.prompts[0].tokens)
        for job, says in ((chat("for ever"), "longer than 1 s"), (chat("much"), "more memory"),
                          (Job("/v1/completions", json.dumps(MANY).encode()), "more memory")):  # fmt: skip
            begin = time.monotonic()
            late = asyncio.create_task(helper.read(facts, job, "me"))
            after = asyncio.create_task(helper.read(facts, chat("hello"), "me"))  # it waits its turn
            with pytest.raises(Refused, match=says):
                await late
            assert await after == plain and time.monotonic() - begin < 20

    run(helper, work)


def test_a_process_that_is_killed_is_started_again(endless: Path) -> None:
    helper, facts = Helper(30.0, 64), facts_of(endless)

    async def work() -> None:
        await helper.prepare(facts)
        assert helper._process is not None
        working = asyncio.create_task(helper.read(facts, chat("for ever"), "me"))
        await asyncio.sleep(0.3)
        os.kill(helper._process.pid, signal.SIGKILL)
        with pytest.raises(Refused, match="more than one may take"):
            await working
        assert isinstance(await helper.read(facts, chat("hello"), "me"), Asked)
        os.kill(helper._process.pid, signal.SIGKILL)
        await asyncio.sleep(0.3)  # while it has nothing to do
        assert isinstance(await helper.read(facts, chat("hello"), "me"), Asked)

    run(helper, work)


def test_who_goes_away_leaves_no_answer_for_the_next(endless: Path) -> None:
    helper, facts = Helper(30.0, 64), facts_of(endless)

    async def work() -> None:
        gone = asyncio.create_task(helper.read(facts, chat("for ever"), "me"))
        await asyncio.sleep(2.0)
        gone.cancel()
        text = Job("/tokenize", json.dumps({"prompt": "def main("}).encode())
        found = await helper.read(facts, text, "me")
        assert isinstance(found, Answered) and json.loads(found.body)["count"] == len(json.loads(found.body)["tokens"])

    run(helper, work)


def test_who_goes_away_does_not_cost_the_next_one_a_new_process(endless: Path) -> None:
    helper, facts = Helper(30.0, 512), facts_of(endless)
    long = Job("/tokenize", json.dumps({"prompt": "The for statement is used to. " * 20_000}).encode())  # some 0.3 s

    async def work() -> None:
        await helper.prepare(facts)
        assert helper._process is not None
        pid = helper._process.pid
        gone = asyncio.create_task(helper.read(facts, long, "gone"))
        await asyncio.sleep(0.05)
        gone.cancel()
        assert isinstance(await helper.read(facts, chat("hello"), "me"), Asked)
        assert helper._process is not None and helper._process.pid == pid
        gone = asyncio.create_task(helper.read(facts, chat("for ever"), "gone"))
        await asyncio.sleep(0.05)
        gone.cancel()
        begin = time.monotonic()
        assert isinstance(await helper.read(facts, chat("hello"), "me"), Asked)
        assert time.monotonic() - begin < 10 and helper._process.pid != pid

    run(helper, work)


def test_who_is_read_while_the_server_ends_hears_that(endless: Path) -> None:
    helper, facts = Helper(30.0, 64), facts_of(endless)

    async def work() -> None:
        await helper.prepare(facts)
        reading = asyncio.create_task(helper.read(facts, chat("for ever"), "me"))
        await asyncio.sleep(0.2)
        await helper.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await reading

    run(helper, work)


def test_too_many_wait_no_longer_and_a_closed_one_says_so(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "MOST_WAITING", 2)
    helper, facts = Helper(30.0, 64), facts_of(endless)

    async def work() -> None:
        first = [asyncio.create_task(helper.read(facts, chat("for ever"), "me")) for _ in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(Busy, match="2 requests wait"):
            await helper.read(facts, chat("hello"), "me")
        await helper.close()
        ended = await asyncio.gather(*first, return_exceptions=True)
        assert all(isinstance(error, Refused | Unavailable) for error in ended)
        with pytest.raises(Unavailable):
            await helper.read(facts, chat("hello"), "me")

    run(helper, work)


def test_what_does_not_start_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    helper = Helper(30.0, 64)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")

    async def work() -> None:
        with pytest.raises(Unavailable, match="log says why"):
            await helper.read(facts_of(tmp_path), chat("hello"), "me")

    run(helper, work)


def test_owners_take_turns_and_who_goes_away_leaves_the_queue() -> None:
    async def work() -> None:
        turns, order = Turns(), list[str]()

        async def one(owner: str, number: int) -> None:
            async with turns.turn(owner):
                order.append(f"{owner}{number}")
                await asyncio.sleep(0)

        async with turns.turn("first"):
            waiting = [asyncio.create_task(one("busy", number)) for number in range(4)]
            await asyncio.sleep(0)
            waiting += [asyncio.create_task(one("calm", number)) for number in range(2)]
            await asyncio.sleep(0)
            assert (turns.waiting("busy"), turns.waiting("calm"), turns.waiting()) == (4, 2, 6)
            waiting[1].cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == ["busy0", "calm0", "busy2", "calm1", "busy3"]
        assert not turns.taken and turns.waiting() == 0
        async with turns.turn("late"):
            late = asyncio.create_task(one("busy", 9))
            await asyncio.sleep(0)
        late.cancel()  # its turn has come, and it doesn't know yet
        await asyncio.gather(late, return_exceptions=True)
        assert not turns.taken

    asyncio.run(work())


def test_an_innocent_one_does_not_pay_for_what_others_left(endless: Path) -> None:
    """What one request leaves in the process is not counted against the next."""
    helper, facts = Helper(30.0, 96), facts_of(endless)

    async def work() -> None:
        for number in range(40):
            items = [{"type": "number", "minimum": i * 1.2345678 + number, "maximum": i * 9876.5} for i in range(300)]
            schema = json.dumps({"type": "array", "prefixItems": items})
            assert isinstance(await helper.read(facts, Job(SCHEMA, schema.encode()), "me"), Answered)

    run(helper, work)


def test_nothing_of_the_folder_is_run(endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "msgspec", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    helper = Helper(30.0, 64)

    async def work() -> None:
        assert isinstance(await helper.read(facts_of(endless), chat("hello"), "me"), Asked)

    run(helper, work)


def test_the_end_of_the_server_is_the_end_of_the_process_whatever_it_is_at(endless: Path) -> None:
    """The server is killed: it can't say so."""
    program = (
        "import asyncio, sys; from weft.server.beside import Helper; from tests.server.test_beside import *\n"
        "async def work():\n"
        "    helper = Helper(60.0, 64)\n"
        "    await helper.prepare(facts_of(Path(sys.argv[1])))\n"
        "    print(helper._process.pid, flush=True)\n"
        "    await helper.read(facts_of(Path(sys.argv[1])), chat('for ever'), 'me')\n"
        "asyncio.run(work())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(endless)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        parent.kill()
    child.wait(5)


def test_short_questions_wait_for_no_book(server: Running) -> None:
    """A large body, a template that takes for ever and a small request at once."""
    small = {"prompt": "def main(", "max_tokens": 1}
    large = {"prompt": "The for statement is used to iterate. " * 60_000}
    answers: dict[str, Any] = {}

    def ask(name: str, path: str, body: Any) -> None:
        with server.client() as http:
            answers[name] = http.post(path, json=body).json()

    # What is made of the whole vocabulary for schemas is there before anybody asks.
    assert "grammars" in vars(server.service.engine.requests) and server.service.kept_grammar("{}") is None
    with server.client() as http:
        http.post("/tokenize", json={"prompt": "a" * 200_000})  # both processes are there
        http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})
        asking = [
            threading.Thread(target=ask, args=("large", "/v1/completions", large)),
            threading.Thread(target=ask, args=("ever", "/v1/chat/completions", json.loads(chat("for ever").body))),
        ]
        for each in asking:
            each.start()
        time.sleep(0.2)
        begin = time.monotonic()
        for _ in range(20):
            assert http.post("/v1/completions", json=small).is_success and http.get("/health").is_success
        assert not answers and time.monotonic() - begin < 2
        for each in asking:
            each.join(60)
    assert "the context holds 2048" in answers["large"]["error"]["message"]
    assert "longer than 5 s" in answers["ever"]["error"]["message"]


def test_a_slow_schema_holds_up_nobody_and_who_goes_away_frees_the_way(server: Running) -> None:
    def slow(number: int) -> dict[str, Any]:
        patterns = {f"^p{i}.*q(a|b)*c{{{i}}}$": {"type": "string"} for i in range(600)}
        schema = {"type": "object", "patternProperties": patterns, "properties": {f"z{number}": {}}}
        return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}

    hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    with server.client() as http:
        assert http.post("/v1/chat/completions", json=hello).is_success  # its process is there
        for number in range(3):
            with pytest.raises(httpx2.TimeoutException):
                http.post("/v1/chat/completions", json=hello | {"response_format": slow(number)}, timeout=0.3)
        begin = time.monotonic()
        assert http.post("/v1/chat/completions", json=hello).is_success
        small = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["a"]}}}
        assert http.post("/v1/chat/completions", json=hello | {"response_format": small}).is_success
        assert http.get("/live").is_success
        assert time.monotonic() - begin < 4  # a new process for schemas takes the most of it
        prompts = {"prompt": ["a"] * 16, "max_tokens": 1, "response_format": slow(9)}
        answer = http.post("/v1/completions", json=prompts)
        assert answer.is_success or "longer than 5 s" in answer.json()["error"]["message"]


def test_it_is_read_alike_beside_and_on_the_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and refusals."""
    asked: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": ["def main(", "import"], "n": 2, "max_tokens": 4, "temperature": 0, "echo": True,
                             "logprobs": 2, "stop": ["x"], "logit_bias": {"70": -5}, "stop_token_ids": [9],
                             "seed": (1 << 63) - 1, "min_p": 0.01}),
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 0, "echo": True}),
        ("/v1/completions", {"prompt": [5, 9999]}), ("/v1/completions", {"prompt": "a", "n": 65}),
        ("/v1/completions", {"prompt": "a", "tempreature": 1}), ("/v1/completions", {"prompt": "a", "model": "other"}),
        ("/v1/completions", {"prompt": "\ud800"}), ("/v1/completions", [1]),
        ("/detokenize", {"tokens": [70, 71, 72]}), ("/detokenize", {"tokens": [9999]}),
        ("/tokenize", {"prompt": "häßlich 🙂"}), ("/tokenize", {}),
    ]  # fmt: skip
    with server.client() as http:

        def told() -> list[tuple[int, Any]]:
            posts = [
                http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
                for path, body in asked
            ]
            answers = [(post.status_code, post.json()) for post in posts]
            for _, answer in answers:
                for changing in ("id", "created"):
                    answer.pop(changing, None)
                answer.get("usage", {}).pop("prompt_tokens_details", None)  # the second time they are known
            return answers

        here = told()
        monkeypatch.setattr(beside, "SMALL", 0)
        assert told() == here
    assert {status for status, _ in here} == {200, 400, 404}
