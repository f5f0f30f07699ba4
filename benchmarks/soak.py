"""The server under everything at once, and whether every request still gets exactly what it gets alone.

    python benchmarks/soak.py                                 2,000 requests of 32 clients, a rank lost every 30 s
    python benchmarks/soak.py --requests 100000 --seconds 120 --json soak.json

Requests are of mixed length, most of them streamed; 10% are cancelled on the way and 10% are malformed; ranks are
killed and stopped in turn. Before it, every prompt is answered alone, greedily and without prefix reuse. At the end
slots and prefixes are checked, and memory is compared with that of the first half. Exits with 1 if anything that was
promised didn't hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft import LLM, SamplingParams
from weft.config import processor_name
from weft.hub import PACKAGED
from weft.launch.local import LocalLauncher
from weft.server.app import Settings, application
from weft.server.run import in_background
from weft.server.service import Service
from weft.timeline.timeline import median

MALFORMED: tuple[Any, ...] = (
    b"{", b"", b"[1, 2", {"prompt": ""}, {"prompt": [1, 1 << 30]}, {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "max_tokens": -1}, {"prompt": "a", "unknown": 1}, {"prompt": [5] * 5000}, {"messages": []},
    {"prompt": "a", "n": 10**6}, {"prompt": "a", "stop": [""]}, {"prompt": "a", "model": "another"},
    {"prompt": "a", "response_format": {"type": "json_schema"}},
)  # fmt: skip
FLAT = 1.1  # times the memory of the first half may be taken in the second,
SLACK = 24 << 20  # and so many bytes


@dataclass(frozen=True)
class Case:
    """A request and what it gets alone."""

    prompt: tuple[int, ...]
    tokens: int
    text: str


@dataclass
class Tally:
    """What happened."""

    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # ranks, by how
    memory: list[tuple[float, int, int]] = field(default_factory=list)  # when, engine, largest worker


def cases(count: int, options: dict[str, Any], seed: int) -> list[Case]:
    """Prompts of all lengths, a third of them with a beginning that others have too, and their answers alone."""
    draw = random.Random(seed)
    with LLM(PACKAGED, enable_prefix_caching=False, **options) as llm:
        vocabulary = llm.engine.model.vocabulary
        shared = [[draw.randrange(1, vocabulary) for _ in range(length)] for length in (100, 300, 700)]
        found = []
        for number in range(count):
            length = int(draw.choice((8, 30, 100, 300, 900)) * draw.uniform(0.5, 1.5))
            begin = draw.choice(shared) if number % 3 == 0 else []
            prompt = (begin + [draw.randrange(1, vocabulary) for _ in range(length)])[:1800]
            tokens = draw.choice((1, 8, 16, 32, 64))
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            [output] = llm.generate({"prompt_token_ids": prompt}, params)
            found.append(Case(tuple(prompt), tokens, output.outputs[0].text))
    return found


class Soak:
    """All clients, and who harms the ranks."""

    def __init__(self, given: argparse.Namespace, known: list[Case], service: Service, launcher: LocalLauncher) -> None:
        self.given, self.known, self.service, self.launcher = given, known, service, launcher
        self.tally = Tally()
        self.draw = random.Random(given.seed + 1)
        self.begin = time.monotonic()
        self.left = given.requests

    @property
    def over(self) -> bool:
        """True when enough was asked."""
        return self.left <= 0 or (self.given.seconds and time.monotonic() - self.begin > self.given.seconds)

    async def run(self, url: str, watch: Any) -> None:
        """Until all requests are answered."""
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
            others = [asyncio.create_task(task) for task in (self._harm(), self._look(watch))]
            await asyncio.gather(*(self._client(http) for _ in range(self.given.clients)))
            for task in others:
                task.cancel()

    async def _client(self, http: httpx2.AsyncClient) -> None:
        while not self.over:
            self.left -= 1
            kind = self.draw.choices(("stream", "whole", "cancelled", "malformed"), (56, 24, 10, 10))[0]
            case = self.draw.choice(self.known)
            try:
                await getattr(self, f"_{kind}")(http, case)
            except Exception as error:  # whatever it is, the promise was broken
                self.tally.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            self.tally.asked[kind] += 1

    def _body(self, case: Case, **more: Any) -> dict[str, Any]:
        asked = {"prompt": list(case.prompt), "max_tokens": case.tokens, "temperature": 0, "ignore_eos": True}
        return asked | more

    async def _whole(self, http: httpx2.AsyncClient, case: Case) -> None:
        answer = (await http.post("/v1/completions", json=self._body(case))).json()
        self._compare(case, answer["choices"][0]["text"], answer["usage"]["completion_tokens"])

    async def _stream(self, http: httpx2.AsyncClient, case: Case) -> None:
        body = self._body(case, stream=True, stream_options={"include_usage": True})
        pieces, begin, tokens = [], time.perf_counter(), 0
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                tokens = event.get("usage", {}).get("completion_tokens", 0)
                pieces += [choice["text"] for choice in event["choices"]]
                if len(pieces) == 1:
                    self.tally.first.append(time.perf_counter() - begin)
        self._compare(case, "".join(pieces), tokens)

    async def _cancelled(self, http: httpx2.AsyncClient, case: Case) -> None:
        body = self._body(case, stream=True, max_tokens=200)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.draw.uniform(0.01, 1.0)):
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        pass

    async def _malformed(self, http: httpx2.AsyncClient, _: Case) -> None:
        body = self.draw.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        if not 400 <= answer.status_code < 500 or "message" not in answer.json()["error"]:
            self.tally.wrong.append(f"malformed {content[:60]!r} got {answer.status_code}: {answer.text[:100]}")

    def _compare(self, case: Case, text: str, tokens: int) -> None:
        self.tally.tokens += tokens
        if text != case.text or tokens != case.tokens:
            what = f"{text[:80]!r} instead of {case.text[:80]!r}"
            self.tally.wrong.append(f"{len(case.prompt)} tokens: {tokens} of {case.tokens} tokens, {what}")

    async def _harm(self) -> None:
        """Ends a rank, or stops it, every so often."""
        while True:
            await asyncio.sleep(self.given.kill_every)
            number = self.draw.choice((signal.SIGKILL, signal.SIGSTOP))
            pids = self.launcher.pids()
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(self.draw.choice(pids), number)
                self.tally.lost[number.name] += 1

    async def _look(self, watch: Any) -> None:
        """Memory and progress, every second."""
        while True:
            workers = [0]
            for pid in self.launcher.pids():
                with suppress(psutil.Error):
                    workers.append(psutil.Process(pid).memory_full_info().uss)
            own = psutil.Process().memory_full_info().uss
            self.tally.memory.append((time.monotonic() - self.begin, own, max(workers)))
            watch(sum(self.tally.asked.values()))
            await asyncio.sleep(1)


def flat(tally: Tally) -> tuple[bool, list[str]]:
    """Whether memory of the last quarter is that of the second one; a line for engine and workers."""
    half, lines, fine = len(tally.memory) // 2, [], True
    for column, name in ((1, "engine"), (2, "largest worker")):
        values = [entry[column] for entry in tally.memory]
        before, after = median(values[half // 2 : half] or values), median(values[half + half // 2 :] or values)
        fine = fine and after <= FLAT * before + SLACK
        lines.append(f"{name} {before / 2**20:.0f} -> {after / 2**20:.0f} MiB")
    return fine, lines


def report(soak: Soak, service: Service, seconds: float) -> tuple[dict[str, Any], bool]:
    """What happened, and whether everything held."""
    tally, ordered = soak.tally, sorted(soak.tally.first)
    steady, memory = flat(tally)
    idle = service.running == service.waiting == 0
    service.check_integrity()
    counts = service.engine.batcher.counts
    restarts = service.engine.workers.restarts.total
    result = {
        "requests": sum(tally.asked.values()), **tally.asked, "wrong": len(tally.wrong), "seconds": round(seconds, 1),
        "ranks lost": dict(tally.lost), "restarts": restarts, "output tokens/s": tally.tokens / seconds,
        "first token, median s": median(ordered), "first token, 99% s": ordered[int(0.99 * len(ordered))],
        "prefix hits": counts.reused / max(1, counts.looked_up), "preempted": counts.preempted,
        "memory": "; ".join(memory), "memory flat": steady, "slots free at the end": idle, "integrity": True,
    }  # fmt: skip
    return result, not tally.wrong and steady and idle and sum(tally.lost.values()) <= restarts


def main() -> int:
    """Soaks, prints a table, and says by its exit code whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=None, help="ends earlier, after this time")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--overlap", default="iso:2")
    parser.add_argument("--cases", type=int, default=200, help="distinct requests")
    parser.add_argument("--reproducible", action="store_true")
    parser.add_argument("--memory", type=int, default=8000, help="tokens; so few that some wait again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    console = Console(stderr=True)
    options = {
        "tensor_parallel_size": given.tp, "num_threads": 1, "overlap": given.overlap,
        "reproducible": given.reproducible,
    }  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("answering each alone", total=None)
        known = cases(given.cases, options, given.seed)
        launcher = LocalLauncher()
        # In this process, so that its slots can be looked at.
        service = Service(lambda tell: LLM(PACKAGED, launcher=launcher, token_interval=0.2, **options).engine)
        service.metrics.named("soak")
        with in_background(application(service, Settings("soak")), service) as url:
            service.wait()
            bar.update(task, description="soaking", total=given.requests if not given.seconds else None)
            soak = Soak(given, known, service, launcher)
            begin = time.perf_counter()
            asyncio.run(soak.run(url, lambda done: bar.update(task, completed=done)))
            result, held = report(soak, service, time.perf_counter() - begin)
    table = Table("soak", "", title=f"{processor_name()}, {date.today()}, Python {platform.python_version()}")
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    console.print(table)
    for line in soak.tally.wrong[:20]:
        console.print(line, style="red", markup=False)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))
    console.print("[green]all held[/]" if held else "[red]something did not hold[/]")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
