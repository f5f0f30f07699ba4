"""One process of two threads: weft, with weights in several formats, against transformers and llama.cpp.

    python benchmarks/peers/alone.py                         SmolLM2-135M, a Llama of 483 M parameters, the packaged
    python benchmarks/peers/alone.py --models 483m --rounds 9 --json alone.json
    python benchmarks/peers/alone.py --models smollm2 --weights auto

All are loaded, then take turns in every round; figures are medians of rounds, ratios medians of per-round ratios.
transformers computes in float32 and runs as fast as it goes: a plain forward with a cache, logits of the last token
only, no generate() around it. llama.cpp reads the same GGUF files, with the same threads and prompts; it comes from the
wheel `xllamacpp`, in an environment of its own that is made on first use. Weft's times are what a caller waits for:
engine, messages and worker. Memory is that of weft's rank, the engine being in this process, and of llama.cpp's
process, what is shared counted in parts. The bound: bytes of weights that a token reads (a table of which it looks up
one row left out), over what the machine reads a second right before or right after, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from models import as_gguf, place, random_model, smollm2
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from weft import LLM, SamplingParams
from weft.bench.machine import describe
from weft.execute.results import RunOptions
from weft.hub import PACKAGED
from weft.program.batch import one_prompt
from weft.timeline.timeline import median

DECODED = 48
WHEEL = "xllamacpp==2026.10.11549"
READ = 1 << 30  # bytes, of which the rate of reading is measured: more than any cache holds


class Contestant(Protocol):
    """Something that answers."""

    def prefill(self, tokens: list[int]) -> float:
        """Seconds until the first token."""
        ...

    def decode(self, tokens: list[int]) -> float:
        """Seconds of each token after it."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Weft:
    """One rank, as a caller sees it."""

    def __init__(self, model: Path, threads: int, weights: str) -> None:
        self.llm = LLM(
            model, num_threads=threads, weights=weights, enable_prefix_caching=False, max_num_seqs=1, max_model_len=1024
        )
        loaded = self.llm.engine.workers.started
        self.bytes, self.pids = loaded.loaded[0].weights - _table(self.llm), [loaded.hellos[0].pid]
        self.overheads: list[float] = []

    def prefill(self, tokens: list[int]) -> float:
        """See `Contestant`."""
        engine = self.llm.engine
        batch = one_prompt(len(tokens))
        plan = engine.planner.plan(batch)
        begin = time.perf_counter()
        engine.probe(batch, tokens, plan, RunOptions())
        return time.perf_counter() - begin

    def decode(self, tokens: list[int]) -> float:
        """See `Contestant`."""
        engine = self.llm.engine
        request = engine.add(tokens, SamplingParams(temperature=0.0, max_tokens=DECODED, ignore_eos=True))
        engine.step()
        begin = time.perf_counter()
        while not engine.batcher.idle:
            engine.step()
            assert engine.last_turn is not None
            self.overheads.append(engine.last_turn.wall - engine.last_turn.run)
        seconds = time.perf_counter() - begin
        engine.requests.settle(request)
        return seconds / (DECODED - 1)

    def close(self) -> None:
        """See `Contestant`."""
        self.llm.close()


def _table(llm: LLM) -> int:
    """Bytes of an embedding that isn't the head too."""
    model, kinds = llm.engine.model, llm.engine.workers.started.loaded[0].kinds
    few = any(kind in kinds for kind in ("int8", "int4"))
    if model.tied_embeddings and not few:
        return 0
    return model.vocabulary * (model.hidden + 4 if few else model.hidden * (2 if "bfloat16" in kinds else 4))


class Transformers:
    """In this process."""

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        where = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
        self.model = AutoModelForCausalLM.from_pretrained(
            where[0], dtype=torch.float32, attn_implementation="sdpa", **where[1]
        ).eval()
        self.pids = [os.getpid()]

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        """See `Contestant`."""
        ids = torch.tensor([tokens])
        begin = time.perf_counter()
        int(self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - begin

    @torch.inference_mode()
    def decode(self, tokens: list[int]) -> float:
        """See `Contestant`."""
        out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        cache, token = out.cache, int(out.logits[0, -1].argmax())
        begin = time.perf_counter()
        for _ in range(DECODED - 1):
            out = self.model(torch.tensor([[token]]), cache=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
        return (time.perf_counter() - begin) / (DECODED - 1)

    def close(self) -> None:
        """See `Contestant`."""


class LlamaCpp:
    """In a process of its own."""

    def __init__(self, model: Path, threads: int) -> None:
        self.child = subprocess.Popen(
            [_environment(), str(Path(__file__).with_name("llama.py")), str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.told, self.pids = self._answer()["ready"], [self.child.pid]

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("llama.cpp ended")

    def _ask(self, tokens: list[int], follow: int) -> Any:
        assert self.child.stdin is not None
        print(json.dumps({"ids": tokens, "follow": follow}), file=self.child.stdin, flush=True)
        return self._answer()

    def prefill(self, tokens: list[int]) -> float:
        """See `Contestant`."""
        return float(self._ask(tokens, 1)["prompt"])

    def decode(self, tokens: list[int]) -> float:
        """See `Contestant`."""
        return float(self._ask(tokens, DECODED)["token"])

    def close(self) -> None:
        """See `Contestant`."""
        self.child.kill()
        self.child.communicate()


def _environment() -> str:
    """The Python that has llama.cpp."""
    folder = place("llama.cpp")
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", WHEEL], check=True)
        (folder / "ready").touch()
    return str(python)


class Reader:
    """Reads memory, and nothing else."""

    def __init__(self, threads: int) -> None:
        self.threads, self.numbers, self.ones = threads, torch.ones(READ // 4096, 1024), torch.ones(1024)

    def rate(self) -> float:
        """Bytes a second that so many threads read now, the best of some."""
        torch.set_num_threads(self.threads)

        def seconds(read: Callable[[], object]) -> float:
            begin = time.perf_counter()
            read()
            return time.perf_counter() - begin

        return READ / min(seconds(read) for read in (self.numbers.sum, lambda: self.numbers @ self.ones) for _ in "ab")


def memory(pids: list[int]) -> int:
    """Bytes of processes and of those that they started."""
    processes = [psutil.Process(pid) for pid in pids]
    processes += [child for process in processes for child in process.children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes)


def files_of(name: str) -> dict[str, Path]:
    """Of a model: what transformers and weft read as floats, and GGUF files by their kind."""
    if name == "smollm2":
        return {"": smollm2(), "Q4_1": smollm2()}
    if name == "packaged":
        return {"": PACKAGED}
    return {"": random_model(name), **{kind: as_gguf(name, kind) for kind in ("Q8_0", "Q4_0")}}


def contest(name: str, weights: list[str], threads: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """All of a model's contestants."""
    files, found = files_of(name), list[dict[str, Any]]()
    ids = torch.randint(1, 4000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with ExitStack() as stack:
        makers: dict[str, Callable[[], Any]] = {"transformers, float32": lambda: Transformers(files[""], threads)}
        for kind, path in files.items():
            for each in weights if not kind else ["auto"] if "auto" in weights else []:
                if not (each == "auto" and not kind):
                    makers[f"weft, {each}{' of ' + kind if kind else ''}"] = lambda p=path, w=each: Weft(p, threads, w)
            if kind:
                makers[f"llama.cpp, {kind}"] = lambda p=path: LlamaCpp(p, threads)
        there: dict[str, Any] = {}
        for who, make in makers.items():
            there[who] = make()
            stack.callback(there[who].close)
        taken: dict[str, list[dict[str, float]]] = {who: [] for who in there}
        reader = Reader(threads)
        for _ in range(rounds + 1):  # the first one warms up and doesn't count
            for who, one in there.items():
                seconds = {"prefill": one.prefill(ids)}
                before = reader.rate()  # neighbours on the machine change it by half within seconds
                seconds["decode"] = one.decode(ids[:128])
                taken[who].append(seconds | {"read": max(before, reader.rate())})
        for who, one in there.items():
            held = memory(one.pids) if who.startswith(("weft", "llama")) else 0
            read = getattr(one, "bytes", 0)
            found.append({
                "model": name, "who": who, "rounds": taken[who][1:], "memory": held, "weights": read,
                "told": getattr(one, "told", ""), "engine": median(getattr(one, "overheads", [0.0])),
            })  # fmt: skip
    return found


def show(found: list[dict[str, Any]], title: str) -> None:
    """One model's table."""
    table = Table(title=title)
    names = ("", "prefill ms", "decode ms", "transformers' prefill", "decode", "llama.cpp's prefill", "decode",
             "of read rate", "memory MB")  # fmt: skip
    for column in names:
        table.add_column(column, justify="right" if column else "left")
    base = found[0]["rounds"]
    for one in found:
        kind = one["who"].rpartition(" of ")[2] if " of " in one["who"] else ""
        rival = next((each["rounds"] for each in found if kind and each["who"] == f"llama.cpp, {kind}"), None)
        cells = [f"{median(r[what] for r in one['rounds']) * 1e3:.1f}" for what in ("prefill", "decode")]
        for other in (base, rival):
            cells += [_times(one["rounds"], other, what) if other else "" for what in ("prefill", "decode")]
        reached = [one["weights"] / each["decode"] / each["read"] for each in one["rounds"]]
        cells += [
            f"{median(reached):.0%}" if one["weights"] else "",
            f"{one['memory'] / 1e6:.0f}" if one["memory"] else "",
        ]
        table.add_row(one["who"], *cells)
    Console(width=130).print(table)
    for told in {one["told"] for one in found if one["told"]}:
        print(told)


def _times(mine: list[dict[str, float]], other: list[dict[str, float]], what: str) -> str:
    return f"{median(b[what] / a[what] for a, b in zip(mine, other, strict=True)):.2f}x"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--models", default="smollm2,483m,packaged", help="sizes of benchmarks/models.py, or packaged")
    parser.add_argument("--weights", default="float32,int8,auto", help="formats of weft's weights")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in given.models.split(","):
        found = contest(name, given.weights.split(","), given.threads, given.rounds, given.tokens)
        show(
            found, f"{name}, {given.threads} threads, {given.tokens} tokens of prompt; medians of {given.rounds} rounds"
        )
        results += found
    from weft.model.description import model_config

    machine = describe(model_config(PACKAGED), given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "results": results}) + "\n")


if __name__ == "__main__":
    main()
