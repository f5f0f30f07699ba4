"""The server under load: continuous batching, overlap at balance, what HTTP adds, prefix reuse.

    python benchmarks/serving.py batching              16 clients against one at a time, packaged model
    python benchmarks/serving.py balance               prefill throughput of auto and serial on a link at balance (root)
    python benchmarks/serving.py http                  time to first token and per token, with and without HTTP
    python benchmarks/serving.py http --chats          the same of chats with tools and thoughts
    python benchmarks/serving.py prefix                first token of a prompt that shares 90% with an earlier one

Servers run in processes of their own; what is compared is up at the same time and asked in turns, and ratios are
medians over rounds. The client shares the machine's cores with server and ranks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import accumulate
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from models import SIZES, random_model
from rich.console import Console
from rich.table import Table

from weft import LLM, SamplingParams
from weft.batching.request import Request
from weft.bench.machine import cores_of
from weft.config import processor_name
from weft.engine import Engine
from weft.hub import PACKAGED
from weft.model.description import model_config
from weft.server.app import Settings, application
from weft.server.asked import Asked, Facts, unpacked
from weft.server.reading import Reader, parsed
from weft.server.run import bound, serve
from weft.server.service import Service
from weft.timeline.timeline import median

STREAMS = 16  # of batching
HTTP_STREAMS, LATE = 32, 40  # that run, and that come meanwhile for one token each
BEGUN, GAPS = 30, (0.06, 0.14)  # tokens after which late ones come, and seconds between them
TEMPLATE = (  # thoughts, and tools as Hermes has them
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools> call as <tool_call>{}</tool_call> "
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|><think>\n"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": {
        "type": "object", "required": ["a", "b"], "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    }}} for name in ("add", "look_up")
]  # fmt: skip


def serve_here(options: dict[str, Any]) -> None:
    """The body of a server's process: prints its port; ends with SIGTERM."""
    service = Service(lambda tell: LLM(**options, token_interval=0.2).engine)
    service.metrics.named("model")
    listening = bound("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    serve(application(service, Settings("model")), service, listening, 1.0, lambda: print("ready", flush=True))


@contextmanager
def server(**options: Any) -> Iterator[int]:
    """A server in a process of its own; its port."""
    command = [sys.executable, __file__, "serve", json.dumps(options, default=str)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        port = int(child.stdout.readline())
        assert child.stdout.readline().strip() == "ready", "the server did not start"
        yield port
    finally:
        child.terminate()
        child.wait(30)


@dataclass
class Answer:
    """When each piece of a streamed answer came, in seconds from when it was asked for; its text and usage."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Question:
    """A request whose answer is streamed."""

    path: str
    body: dict[str, Any]


def completion(prompt: Sequence[int], tokens: int) -> Question:
    """Greedy, to its full length."""
    asked = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return Question("/v1/completions", asked | {"stream_options": {"include_usage": True}})


def conversation(prompt: Sequence[int], tokens: int) -> Question:
    """The same of a conversation with tools; `prompt`: what its words are drawn by."""
    words = " ".join(f"w{token % 100}" for token in prompt[:8])
    asked = {"messages": [{"role": "user", "content": words}], "tools": TOOLS, "max_tokens": tokens, "temperature": 0}
    more = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return Question("/v1/chat/completions", asked | more)


class Connection:
    """One that is kept for the next question, as clients do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, question: Question, answer: Answer) -> Answer:
        """One, with as little on the client's side as possible; `answer` is filled in as it comes."""
        body, begin = json.dumps(question.body).encode(), time.perf_counter()
        if self._open is None:
            self._open = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        reader, writer = self._open
        head = f"POST {question.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        last = b""
        while (line := await reader.readline()) != b"0\r\n":
            assert line, "the server closed the connection before its answer was over"
            if line.startswith(b"data: {"):
                if b'"usage"' in line:
                    last = line
                elif b'"role"' not in line:  # a conversation's opening is no token
                    answer.times.append(time.perf_counter() - begin)
        await reader.readline()
        usage = json.loads(last[6:])["usage"]
        answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        return answer

    def close(self) -> None:
        """Nothing more is asked."""
        if self._open is not None:
            self._open[1].close()


async def ask(port: int, question: Question, answer: Answer | None = None) -> Answer:
    """One, on a connection of its own."""
    with closing(Connection(port)) as connection:
        return await connection.ask(question, answer or Answer())


async def load(port: int, prompts: Sequence[Sequence[int]], tokens: int, clients: int) -> tuple[float, list[Answer]]:
    """Seconds until `clients` clients have had all prompts answered."""
    left, answers = list(prompts), list[Answer]()

    async def client() -> None:
        while left:
            answers.append(await ask(port, completion(left.pop(), tokens)))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - begin, answers


def prompts_of(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random tokens: no prompt begins like another."""
    draw = random.Random(seed)
    return [[draw.randrange(1, vocabulary) for _ in range(length)] for _ in range(count)]


def batching(given: argparse.Namespace) -> Table:
    """Output tokens a second."""
    table = Table("round", "one at a time, tokens/s", f"{STREAMS} at once, tokens/s", "ratio")
    ratios = []
    with server(model=PACKAGED, num_threads=2) as port:
        for number in range(given.rounds + 1):
            rates = []
            for clients in (1, STREAMS):
                prompts = prompts_of(STREAMS, 32, 4096, 100 * number + clients)
                seconds, answers = asyncio.run(load(port, prompts, 64, clients))
                rates.append(sum(answer.tokens for answer in answers) / seconds)
            if number:  # the first one warms up
                ratios.append(rates[1] / rates[0])
                table.add_row(str(number), *(f"{rate:.0f}" for rate in rates), f"{ratios[-1]:.2f}")
    table.add_row("median", "", "", f"{median(ratios):.2f}  (wanted 3)")
    return table


def balance(given: argparse.Namespace) -> Table:
    """Prompt tokens a second, of auto and of serial."""
    model = random_model(given.model)
    vocabulary, cores = SIZES[given.model].vocabulary, cores_of(2, 1)
    common = {"model": model, "tensor_parallel_size": 2, "num_threads": 1, "cores": cores, "max_model_len": 4096}
    with LLM(**common, overlap="serial", link="1x") as llm:
        link = str(llm.engine.workers.controller.link)
    table = Table("round", "serial, tokens/s", "auto, tokens/s", "ratio", title=f"link {link}, {given.model}")
    ratios = []
    with server(**common, overlap="serial", link=link) as serial, server(**common, overlap="auto", link=link) as auto:
        for number in range(given.rounds + 1):
            rates = []
            for port in (serial, auto):
                prompts = prompts_of(given.clients, given.tokens, vocabulary, number)
                seconds, answers = asyncio.run(load(port, prompts, 1, given.clients))
                rates.append(sum(answer.prompt_tokens for answer in answers) / seconds)
            if number:
                ratios.append(rates[1] / rates[0])
                table.add_row(str(number), *(f"{rate:.0f}" for rate in rates), f"{ratios[-1]:.2f}")
    table.add_row("median", "", "", f"{median(ratios):.2f}  (wanted 1.3; no schedule exceeds 2)")
    return table


class Direct:
    """The same load without HTTP: requests are read and added between steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        facts = Facts(
            str(engine.path), "model", engine.model.vocabulary, engine.config.max_length,
            tuple(engine.requests.end_ids), {}, engine.model.hidden, "mean",
        )  # fmt: skip
        self.reader = Reader(facts, engine.tokenizer)

    def read(self, question: Question) -> tuple[list[int], SamplingParams]:
        """A question's prompt, and how it is to be continued."""
        asked = self.reader.read(parsed(question.path, json.dumps(question.body).encode()))
        assert isinstance(asked, Asked)
        return unpacked(asked.prompts[0].tokens), SamplingParams(**asked.params)

    def step(self, questions: list[Question]) -> float:
        """See `step_over_http`."""
        requests = [self.engine.add(*self.read(question)) for question in questions]
        times = list[float]()
        while not self.engine.batcher.idle:
            self.engine.step()
            if requests[0].sequences[0].produced > len(times):
                times.append(time.perf_counter())
        for request in requests:
            self.engine.requests.settle(request)
        return (times[-1] - times[0]) / (len(times) - 1)

    def first(self, questions: list[Question], late: list[Question], gaps: list[float]) -> float:
        """See `first_over_http`."""
        engine, streams = self.engine, [self.engine.add(*self.read(question)) for question in questions]
        coming, taken = list(late), list[float]()
        waited, due = deque[tuple[float, Request]](), list[float]()
        while len(taken) < len(late):
            now = time.perf_counter()
            while due and due[0] <= now:
                waited.append((due.pop(0), engine.add(*self.read(coming.pop(0)))))
            engine.step()
            now = time.perf_counter()
            if coming and not due and streams[0].sequences[0].produced >= BEGUN:
                due = [now + after for after in accumulate(gaps)]
            while waited and waited[0][1].finished:
                begin, done = waited.popleft()
                taken.append(now - begin)
                engine.requests.settle(done)
        for request in streams:
            engine.forget([s for s in request.sequences if not s.finish_reason])
            engine.requests.settle(request)
        return mean(taken)


async def step_over_http(port: int, questions: list[Question]) -> float:
    """Seconds of a step while all are answered."""
    answer, *_ = await asyncio.gather(*(ask(port, question) for question in questions))
    return (answer.times[-1] - answer.times[0]) / (answer.tokens - 1)


async def first_over_http(port: int, questions: list[Question], late: list[Question], gaps: list[float]) -> float:
    """Seconds to the first token of those that come late, so long one after the other, while all others run."""
    answers, taken = [Answer() for _ in questions], list[float]()
    tasks = [asyncio.create_task(ask(port, *pair)) for pair in zip(questions, answers, strict=True)]
    while len(answers[0].times) < BEGUN:
        await asyncio.sleep(0.005)

    free = [Connection(port)]

    async def one(question: Question, after: float) -> None:
        await asyncio.sleep(after)
        connection = free.pop() if free else Connection(port)
        taken.append((await connection.ask(question, Answer())).times[0])
        free.append(connection)

    await asyncio.gather(*(one(question, after) for question, after in zip(late, accumulate(gaps), strict=True)))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for connection in free:
        connection.close()
    return mean(taken)


def _in_turns(number: int, *ways: Callable[[], float]) -> list[float]:
    """What each gives; who comes first changes with the round."""
    order = range(len(ways)) if number % 2 else range(len(ways))[::-1]
    found = {at: ways[at]() for at in order}
    return [found[at] for at in range(len(ways))]


def _http_round(
    number: int, port: int, direct: Direct, question: Callable[[Sequence[int], int], Question]
) -> list[list[float]]:  # fmt: skip
    """Seconds to a first token and of a step, each with HTTP and without."""
    draw = random.Random(number)
    gaps = [draw.uniform(*GAPS) for _ in range(LATE)]
    prompts = prompts_of(HTTP_STREAMS + LATE, 32, 4096, number)
    short, long = ([question(prompt, length) for prompt in prompts[:HTTP_STREAMS]] for length in (200, 1500))
    late = [question(prompt, 1) for prompt in prompts[HTTP_STREAMS:]]
    return [
        _in_turns(number, lambda: asyncio.run(first_over_http(port, long, late, gaps)),
                  lambda: direct.first(long, late, gaps)),
        _in_turns(number, lambda: asyncio.run(step_over_http(port, short)), lambda: direct.step(short)),
    ]  # fmt: skip


def http(given: argparse.Namespace) -> Table:
    """Seconds to the first token beside 32 streams, and between tokens of 32, with HTTP and without."""
    table = Table("round", "first token: HTTP, ms", "direct, ms", "a step of 32: HTTP, ms", "direct, ms")
    question, rounds, folder = (conversation if given.chats else completion), [], PACKAGED
    with TemporaryDirectory() as made:
        if given.chats:
            folder = Path(made) / "model"
            shutil.copytree(PACKAGED, folder)
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        common = {"model": folder, "num_threads": 1, "cores": cores_of(2, 1)[:1], "max_num_seqs": HTTP_STREAMS + 4}
        with server(**common) as port, LLM(**common, token_interval=0.2) as llm:
            direct = Direct(llm.engine)
            for number in range(given.rounds + 1):
                measured = _http_round(number, port, direct, question)
                if number:
                    rounds.append(measured)
                    table.add_row(str(number), *(f"{value * 1e3:.2f}" for pair in measured for value in pair))
    to_first, a_step = (median([each[at][0] - each[at][1] for each in rounds]) * 1e3 for at in (0, 1))
    table.add_row("added", f"{to_first:.2f}  (wanted 3)", "", f"{a_step:.2f}")
    table.add_row("a token", "", "", f"{a_step / HTTP_STREAMS:.3f}  (wanted 0.05)")
    if given.json:
        record = {"chats": given.chats, "streams": HTTP_STREAMS, "processor": processor_name(),
                  "date": str(date.today()), "rounds": rounds, "first_ms": to_first, "step_ms": a_step}  # fmt: skip
        Path(given.json).write_text(json.dumps(record) + "\n")
    return table


def prefix(given: argparse.Namespace) -> Table:
    """Seconds to the first token of new prompts, and of prompts that share 90% with one before."""
    table = Table("model", "tokens", "new, ms", "90% shared, ms", "ratio", title="medians of rounds")
    for name, length in (("packaged", 512), ("packaged", 1500), ("h1024", 512), ("h1024", 2048)):
        model = PACKAGED if name == "packaged" else random_model(name)
        vocabulary = model_config(model).vocabulary
        pairs = []
        with server(model=model, num_threads=2, max_model_len=2049 if name != "packaged" else None) as port:
            for number in range(given.rounds + 1):
                new, other = prompts_of(2, length, vocabulary, number)
                cut = length * 9 // 10
                asked = (new, new[:cut] + other[cut:])
                pairs.append([asyncio.run(ask(port, completion(prompt, 1))).times[0] for prompt in asked])
        kept = pairs[1:]  # the first one warms up
        ratio = median([whole / rest for whole, rest in kept])
        times = [f"{median(column) * 1e3:.1f}" for column in zip(*kept, strict=True)]
        table.add_row(name, str(length), *times, f"{ratio:.1f}  (wanted 5)")
    return table


MEASURES = {"batching": batching, "balance": balance, "http": http, "prefix": prefix}


def main() -> None:
    """Measures one of them and prints it, with the machine."""
    if sys.argv[1:2] == ["serve"]:
        options = json.loads(sys.argv[2])
        serve_here({**options, "cores": tuple(options["cores"]) if options.get("cores") else None})
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="h1024", choices=SIZES, help="for balance")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt, for balance")
    parser.add_argument("--clients", type=int, default=8, help="for balance")
    parser.add_argument("--chats", action="store_true", help="for http: conversations with tools and thoughts")
    parser.add_argument("--json", metavar="FILE", help="for http: the rounds")
    given = parser.parse_args()
    console = Console()
    console.print(MEASURES[given.what](given))
    console.print(f"{processor_name()}, {date.today()}, Python {platform.python_version()}", style="dim")


if __name__ == "__main__":
    main()
