"""Replicas behind a server, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from weft.batching.params import SamplingParams
from weft.launch.local import LocalLauncher
from weft.llm import LLM
from weft.server.app import Settings, application
from weft.server.lately import Live
from weft.server.metrics import Metrics
from weft.server.replicas import Replicas
from weft.server.run import in_background
from weft.server.service import Service
from weft.workers import Progress

NAME, SLOTS = "tested", 4


class Group:
    """Two replicas, their launchers, and a client."""

    def __init__(self, path: Path, sizes: tuple[int, ...], **options: Any) -> None:
        self.launchers = [LocalLauncher() for _ in sizes]
        metrics, live = Metrics(), Live()
        metrics.named(NAME)
        given = {
            "num_threads": 1, "overlap": "serial", "token_interval": 0.2, "max_num_seqs": SLOTS, "max_model_len": 1024,
            **options,
        }  # fmt: skip

        def make(number: int, tell: Progress) -> Any:
            own = {"tensor_parallel_size": sizes[number], "launcher": self.launchers[number]}
            return LLM(path, progress=tell, **given, **own).engine

        self.services = [
            Service(lambda tell, number=number: make(number, tell), metrics=metrics, live=live)  # type: ignore[misc]
            for number in range(len(sizes))
        ]
        self.replicas = Replicas(self.services)
        self.url = ""

    def ask(self, prompt: str | list[int], tokens: int = 8, **more: Any) -> str:
        """A whole answer's text."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        answer = httpx2.post(f"{self.url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def reused(self) -> list[int]:
        """Tokens of prompts that were not computed again, of each."""
        return [service.figures.reused if service.figures else 0 for service in self.services]


@contextmanager
def replicated(path: Path, *sizes: int, **options: Any) -> Iterator[Group]:
    group = Group(path, sizes, **options)
    with in_background(application(group.replicas, Settings(NAME)), group.replicas) as group.url:
        group.replicas.wait()
        yield group
        group.replicas.check_integrity()
        assert group.replicas.running == group.replicas.waiting == 0


def answer_of(llm: LLM, prompt: str | list[int], tokens: int) -> str:
    given = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return llm.generate(prompt, given)[0].outputs[0].text
