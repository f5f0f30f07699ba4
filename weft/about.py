"""What others may know of an engine: what it runs, and how it stands. Read from any thread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weft.engine import Engine


@dataclass(frozen=True)
class About:
    """What doesn't change. `max_length`: tokens of prompt and answer; `width`: numbers of an
    embedding; `ranks`: of each of the `replicas`, in a `layout`."""

    path: Path
    vocabulary: int
    width: int
    max_length: int
    end_ids: tuple[int, ...]
    ranks: int
    notices: tuple[str, ...]
    layout: str
    replicas: int = 1

    @classmethod
    def of(cls, engine: Engine) -> About:
        """Of an engine that has started."""
        config, ends = engine.config, tuple(sorted(engine.requests.end_ids))
        return cls(
            engine.path, engine.model.vocabulary, engine.model.hidden, config.max_length, ends, config.ranks,
            tuple(engine.notices), config.layout.describe(),
        )  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """How it stands, on so many `ranks` and `slots`: sequences, the part of key/value memory that is used, tokens of
    prompts that were looked up among prefixes and found there, sequences that had to wait again, losses of workers."""

    running: int
    waiting: int
    memory: float
    looked_up: int
    reused: int
    preempted: int
    restarts: int
    ranks: int
    slots: int

    @classmethod
    def of(cls, engine: Engine) -> Figures:
        """Of an engine, now."""
        batcher, counts = engine.batcher, engine.batcher.counts
        return cls(
            len(batcher.running), len(batcher.waiting), batcher.used / max(1, batcher.memory), counts.looked_up,
            counts.reused, counts.preempted, engine.workers.restarts.total, engine.config.ranks,
            engine.config.max_sequences,
        )  # fmt: skip
