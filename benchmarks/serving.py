"""The server under load: continuous batching, overlap at balance, what HTTP adds, prefix reuse.

    python benchmarks/serving.py batching              16 clients against one at a time, packaged model
    python benchmarks/serving.py balance               prefill throughput of auto and serial on a link at balance (root)
    python benchmarks/serving.py http                  time to first token and per token, with and without HTTP
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
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
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
from weft.server.run import bound, serve
from weft.server.service import Service
from weft.timeline.timeline import median

STREAMS = 16


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


async def ask(port: int, prompt: Sequence[int], tokens: int) -> Answer:
    """One streamed completion, with as little on the client's side as possible."""
    asked = {
        "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    answer, begin = Answer(), time.perf_counter()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    last = b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if b'"usage"' in line:
                last = line
            else:
                answer.times.append(time.perf_counter() - begin)
    writer.close()
    usage = json.loads(last[6:])["usage"]
    answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    return answer


async def load(port: int, prompts: Sequence[Sequence[int]], tokens: int, clients: int) -> tuple[float, list[Answer]]:
    """Seconds until `clients` clients have had all prompts answered."""
    left, answers = list(prompts), list[Answer]()

    async def client() -> None:
        while left:
            answers.append(await ask(port, left.pop(), tokens))

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
    """The same load without HTTP: prompts are added between steps, as the server does it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def measure(self, prompts: list[list[int]], tokens: int, late: list[int], after: float) -> tuple[float, float]:
        """Seconds to the first token of one that comes late, and seconds a step while all run."""
        engine = self.engine
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        requests = [engine.add(prompt, params) for prompt in prompts]
        arrived: list[float] = []
        timer = threading.Timer(after, lambda: arrived.append(time.perf_counter()))
        timer.start()
        last: Request | None = None
        times: list[float] = []
        while len(times) < tokens // 3:
            if arrived and last is None:
                last = engine.add(late, params)
            engine.step()
            if last is not None and last.sequences[0].produced > len(times):
                times.append(time.perf_counter() - arrived[0])
        for request in [*requests, *([last] if last else [])]:
            engine.forget([s for s in request.sequences if not s.finish_reason])
            engine.requests.settle(request)
        return times[0], (times[-1] - times[1]) / (len(times) - 2)


async def over_http(
    port: int, prompts: list[list[int]], tokens: int, late: list[int], after: float
) -> tuple[float, float]:
    """The same by the server."""
    tasks = [asyncio.create_task(ask(port, prompt, tokens)) for prompt in prompts]
    await asyncio.sleep(after)
    last = await ask(port, late, tokens // 3)
    await asyncio.gather(*tasks)
    return last.times[0], (last.times[-1] - last.times[1]) / (len(last.times) - 2)


def http(given: argparse.Namespace) -> Table:
    """Seconds to the first token with 15 streams running, and between tokens of 16, with HTTP and without."""
    table = Table("round", "first token: HTTP, ms", "direct, ms", "a step of 16: HTTP, ms", "direct, ms")
    common = {"model": PACKAGED, "num_threads": 1, "cores": cores_of(2, 1)[:1], "enable_prefix_caching": False}
    added_first, added_step = [], []
    with server(**common) as port, LLM(**common, token_interval=0.2) as llm:
        direct = Direct(llm.engine)
        for number in range(given.rounds + 1):
            *prompts, late = prompts_of(STREAMS, 32, 4096, number)
            after = random.Random(number).uniform(0.25, 0.35)
            first, step = asyncio.run(over_http(port, prompts, 300, late, after))
            first_alone, step_alone = direct.measure(prompts, 300, late, after)
            if number:
                added_first.append(first - first_alone)
                added_step.append(step - step_alone)
                table.add_row(str(number), *(f"{value * 1e3:.2f}" for value in (first, first_alone, step, step_alone)))
    a_step = median(added_step)
    table.add_row("added", f"{median(added_first) * 1e3:.2f}  (wanted 5)", "", f"{a_step * 1e3:.2f}")
    table.add_row("a token", "", "", f"{a_step / STREAMS * 1e3:.3f}  (wanted 0.2)")
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
                pairs.append([asyncio.run(ask(port, prompt, 1)).times[0] for prompt in asked])
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
    given = parser.parse_args()
    console = Console()
    console.print(MEASURES[given.what](given))
    console.print(f"{processor_name()}, {date.today()}, Python {platform.python_version()}", style="dim")


if __name__ == "__main__":
    main()
