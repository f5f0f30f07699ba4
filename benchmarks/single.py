"""One rank against transformers (sdpa) on the same model, threads and machine: prefill, decode, engine overhead.

    python benchmarks/single.py                  a Llama of 483 M parameters and the model in the package
    python benchmarks/single.py --rounds 9 --json single.json

Rounds are interleaved (weft, transformers, weft, …); each ratio is the median of per-round ratios. transformers
runs as fast as it goes: a plain forward with a cache, logits of the last token only, no generate() around it.
Weft's times are what a caller waits for: engine, messages and worker.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from models import random_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from weft import LLM, SamplingParams
from weft.execute.results import RunOptions
from weft.hub import PACKAGED
from weft.program.batch import one_prompt
from weft.timeline.timeline import median

DECODED = 48


class Weft:
    """One rank, as a caller sees it."""

    def __init__(self, model: Path, threads: int, reproducible: bool = False) -> None:
        self.llm = LLM(model, num_threads=threads, reproducible=reproducible, enable_prefix_caching=False)
        self.overheads: list[float] = []

    def prefill(self, tokens: list[int]) -> float:
        """Seconds until the logits of the last token are sampled."""
        engine = self.llm.engine
        batch = one_prompt(len(tokens))
        plan = engine.planner.plan(batch)
        begin = time.perf_counter()
        engine.probe(batch, tokens, plan, RunOptions())
        return time.perf_counter() - begin

    def decode(self, tokens: list[int]) -> float:
        """Seconds a token, after the first one."""
        engine = self.llm.engine
        params = SamplingParams(temperature=0.0, max_tokens=DECODED, ignore_eos=True)
        request = engine.add(tokens, params)
        engine.step()
        begin = time.perf_counter()
        while not engine.batcher.idle:
            engine.step()
            assert engine.last_turn is not None
            self.overheads.append(engine.last_turn.wall - engine.last_turn.run)
        seconds = time.perf_counter() - begin
        engine.requests.settle(request)
        return seconds / (DECODED - 1)


class Transformers:
    """The same in this process."""

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        """Seconds until the last token's logits are there."""
        ids = torch.tensor([tokens])
        begin = time.perf_counter()
        int(self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - begin

    @torch.inference_mode()
    def decode(self, tokens: list[int]) -> float:
        """Seconds a token, after the first one."""
        out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        cache, token = out.cache, int(out.logits[0, -1].argmax())
        begin = time.perf_counter()
        for _ in range(DECODED - 1):
            out = self.model(torch.tensor([[token]]), cache=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
        return (time.perf_counter() - begin) / (DECODED - 1)


def interleaved(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> list[tuple[float, float]]:
    """Pairs of seconds; the first pair warms up and doesn't count."""
    return [(ours(), theirs()) for _ in range(rounds + 1)][1:]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--models", default="483m,packaged", help="sizes of benchmarks/models.py, or packaged")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    title = f"one rank, {given.threads} threads, float32, {given.tokens} tokens of prompt; medians of {given.rounds}"
    table, results = Table(title=title), []
    for column in ("model", "what", "weft ms", "transformers ms", "times as fast", "lowest", "highest"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    for name in given.models.split(","):
        path = PACKAGED if name == "packaged" else random_model(name)
        ours, theirs = Weft(path, given.threads), Transformers(path, given.threads)
        tokens = torch.randint(1, 4000, (given.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        for what in ("prefill", "decode"):
            prompt = tokens if what == "prefill" else tokens[:128]
            mine, other = getattr(ours, what), getattr(theirs, what)
            pairs = interleaved(lambda f=mine, p=prompt: f(p), lambda f=other, p=prompt: f(p), given.rounds)
            ratios = [b / a for a, b in pairs]
            row = [median(a for a, _ in pairs), median(b for _, b in pairs), median(ratios), min(ratios), max(ratios)]
            table.add_row(name, what, f"{row[0] * 1e3:.2f}", f"{row[1] * 1e3:.2f}", *(f"{r:.2f}" for r in row[2:]))
            results.append({"model": name, "what": what, "seconds": pairs, "ratio": row[2]})
        overhead = median(ours.overheads)
        table.add_row(name, "engine's own part of a step", f"{overhead * 1e3:.2f}", "", "", "", "")
        results.append({"model": name, "what": "overhead", "seconds": overhead})
        ours.llm.close()
    Console(width=120).print(table)
    print(f"{platform.machine()}, torch {torch.__version__}, {date.today()}")
    if given.json:
        given.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
