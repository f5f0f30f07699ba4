"""Whether programs grow: with the number of layers, or with traffic.

    python benchmarks/programs.py [--batches 1500] [--json FILE]

Planning: a batch whose shape was not seen, on costs of a link at balance, where the search has most to do. A form's
start: what a worker does with one that it hasn't seen, from the message to the first step. Memory: private memory of
the engine and its workers after each third of so many batches of mixed lengths, of a random model of 32 layers on two
ranks, with `auto`; the first third warms up. The engine's own part of a step, of one request that decodes on two
ranks: what a step takes beyond the slowest rank's program and choice of tokens, in the median; and the engine's
processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil
from models import random_model

from weft import LLM, SamplingParams
from weft.execute import protocol as p
from weft.execute.results import RunOptions
from weft.model.blueprint import Blueprint
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.shares import tensor_shares
from weft.outlook.figures import shard_of
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.steps import Program
from weft.program.strategy import Strategy
from weft.simulate.hardware import costs_of, parse_hardware

LAYERS = (8, 80)
FORMS = ("serial", "iso:4", "iso:4+ahead", "iso:4+rs")


def blueprint() -> Blueprint:
    """A model's, of which the number of layers is changed."""
    return blueprint_of(model_config(random_model("483m")))


def planning(layers: int) -> list[float]:
    """Milliseconds for each of many prompts of different lengths, at the start of which nothing is known of them."""
    shards = [shard_of(blueprint(), share) for share in tensor_shares(blueprint(), (1.0, 1.0))]
    costs = costs_of(parse_hardware("2x rtx4090"), shards, ("exact",))
    planner = Planner(blueprint().outline.of(layers), "auto", "exact", costs=costs)
    planner.plan(one_prompt(499))
    taken = []
    for tokens in range(500, 1500, 5):
        begin = time.perf_counter()
        planner.plan(one_prompt(tokens))
        taken.append((time.perf_counter() - begin) * 1e3)
    return taken


def starting(layers: int, strategy: str) -> float:
    """Milliseconds until a worker can run a form that it hasn't seen; the best of many."""
    from weft.execute.executor import prepare

    outline, batch = blueprint().outline.of(layers), one_prompt(1024)
    program = build(Strategy.parse(strategy), outline, batch)
    message = p.encode(p.Run(1, 0, program.form, list(program.offsets), [], [], [], "exact"))
    best = float("inf")
    for _ in range(100):
        begin = time.perf_counter()
        run = p.decode_to_worker(message)
        assert isinstance(run, p.Run) and run.form is not None
        prepare.__wrapped__(outline, Program(run.form, tuple(run.offsets)).form, 0)
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


def traffic(batches: int) -> tuple[list[dict[str, float]], float, float]:
    """MiB of each process after each third of the batches; milliseconds of the engine's own part of a step, and of its
    processor."""
    random, memory = Random(0), []
    with LLM(random_model("deep"), tensor_parallel_size=2, num_threads=1, max_model_len=1024) as llm:
        engine = llm.engine
        for number in range(batches):
            lengths = [random.choice((1, 1, 1, 7, 60, 300)) + random.randrange(40) for _ in range(random.randint(1, 4))]
            batch = Batch(tuple(Segment(slot, 0, length) for slot, length in enumerate(lengths)))
            tokens = [random.randrange(engine.model.vocabulary) for _ in range(batch.tokens)]
            engine.probe(batch, tokens, engine.planner.plan(batch), RunOptions())
            if (number + 1) % (batches // 3) == 0:
                memory.append(_memory())
        own, begin = [], time.process_time()
        request = engine.add([5] * 10, SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True))
        while not engine.batcher.idle:
            engine.step()
            turn = engine.last_turn
            assert turn is not None
            own.append((turn.wall - turn.run) * 1e3)
        processor = (time.process_time() - begin) / request.sequences[0].produced * 1e3
    return memory, median(own), processor


def _memory() -> dict[str, float]:
    engine = psutil.Process()
    workers = [child for child in engine.children(recursive=True) if "weft.execute.worker" in child.cmdline()]
    named = {"engine": engine, **{f"worker {rank}": worker for rank, worker in enumerate(workers)}}
    return {name: process.memory_full_info().uss / 2**20 for name, process in named.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--json", type=Path, help="everything that was measured")
    given = parser.parse_args()
    found: dict[str, Any] = {"planning": {layers: planning(layers) for layers in LAYERS}}
    for layers, taken in found["planning"].items():
        print(f"planning an unseen batch, {layers:2d} layers: {median(taken):.2f} ms (limit 2)")
    found["starting"] = {f"{form}, {layers} layers": starting(layers, form) for form in FORMS for layers in LAYERS}
    for what, ms in found["starting"].items():
        print(f"a form's start on a worker, {what}: {ms:.3f} ms (limit 0.2)")
    found["memory"], found["own"], found["processor"] = traffic(given.batches)
    for name, begin in found["memory"][0].items():
        ends = ", ".join(f"{after[name]:.1f}" for after in found["memory"])
        print(f"{name}: {ends} MiB; grows by {found['memory'][-1][name] - begin:+.1f} (limit 2)")
    own, processor = found["own"], found["processor"]
    print(f"the engine's own part of a step: {own:.3f} ms (limit 0.3); of its processor {processor:.3f} ms")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
