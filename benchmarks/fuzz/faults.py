"""Faults that single requests bring with them, told by their seeds: in the engine's process and in workers.

Each of them is to end its own request, and no other.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from weft.completion import Completion
from weft.requests import Requests

FIRST = 1 << 40  # seeds from here on bring a fault: so many for each kind, as a completion's number is added
EACH = 1000
ENGINE = ("detokenizer", "stop text", "grammar's mask", "grammar's step", "first text")
WORKER = ("sampler", "rank raises", "rank crashes", "rank is killed", "rank crashes at once")
KINDS = ENGINE + WORKER
# A group of workers is lost over these.
RANK = frozenset({"rank raises", "rank crashes", "rank is killed", "rank crashes at once"})
AFTER = 2  # tokens
SAID = 0.2  # seconds, in which what a rank said of the batch before leaves it: else that batch counts as lost too


def seed_of(kind: str) -> int:
    """A seed that brings this fault."""
    return FIRST + EACH * KINDS.index(kind)


def kind_of(seed: int) -> str | None:
    """The fault that a seed brings."""
    at = (seed - FIRST) // EACH
    return KINDS[at] if 0 <= at < len(KINDS) else None


class Raising:
    """Something whose method raises after some calls; the rest of it is as it was."""

    def __init__(self, whole: Any, method: str, after: int = AFTER) -> None:
        self._whole, self._method, self._left = whole, method, after

    def __getattr__(self, name: str) -> Any:
        return self._raise if name == self._method else getattr(self._whole, name)

    def _raise(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise Exception(f"planted in {self._method}")
        return getattr(self._whole, self._method)(*arguments)


@contextmanager
def in_engine() -> Iterator[None]:
    """Requests with such seeds get completions that fail."""
    make: Callable[..., Completion] = Requests._completion

    def completion(requests: Requests, sequence: Any, grammar: Any) -> Completion:
        made = make(requests, sequence, grammar)
        kind = kind_of(made.seed)
        if kind == "detokenizer":
            made.detokenizer = Raising(made.detokenizer, "step")
        elif kind == "first text":
            made.detokenizer = Raising(made.detokenizer, "step", after=0)
        elif kind == "stop text":
            made.text = Raising(made.text, "grow")  # type: ignore[assignment]
        elif kind == "grammar's mask" and made.matcher is not None:
            made.matcher = Raising(made.matcher, "allowed", after=1)  # type: ignore[assignment]
        elif kind == "grammar's step" and made.matcher is not None:
            made.matcher = Raising(made.matcher, "advance", after=0)  # type: ignore[assignment]
        return made

    with patch.object(Requests, "_completion", completion):
        yield


def in_worker() -> None:
    """In a worker's process: the sampler raises, or the rank fails in one of three ways."""
    from weft.execute import sampler
    from weft.execute.rank import Worker

    draw, run = sampler.draw, Worker._run

    def drawing(logits: Any, choice: Any, *more: Any) -> Any:
        if kind_of(choice.seed) == "sampler" and choice.index >= AFTER:
            raise IndexError("planted in the sampler")
        return (yield from draw(logits, choice, *more))

    def running(worker: Any, message: Any) -> None:
        kinds = {kind_of(choice.seed) for choice in message.choices if choice.index >= AFTER}
        if "rank crashes at once" in {kind_of(choice.seed) for choice in message.choices}:
            kinds.add("rank crashes")
        if worker.rank == worker.world - 1:
            if "rank raises" in kinds:
                raise RuntimeError("planted in a rank")
            if kinds & RANK:
                time.sleep(SAID)
            if "rank crashes" in kinds:
                os._exit(3)
            if "rank is killed" in kinds:
                os.kill(os.getpid(), signal.SIGKILL)
        run(worker, message)

    sampler.draw, Worker._run = drawing, running  # type: ignore[method-assign]


COMMAND = (sys.executable, "-m", "benchmarks.fuzz.worker")
