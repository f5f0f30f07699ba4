"""Pipelines on two ranks of one core each: what pieces, planned layers and batches in flight are worth. Interleaved.

python benchmarks/pipelines.py prompt      [--model h1024] [--tokens 2048] [--link 100mbit] [--rounds 5] [--json FILE]
    One prompt through two sections: all of it at once, in even pieces, and as planned; bubbles beside the formula.
    --prompts 8: so many, of the tokens' eighth each; as many pieces are then alike.
python benchmarks/pipelines.py throttled   [--model h1024] ...
    One rank has half of its core, by a control group (version 1; root): planned layers and pieces against even ones.
python benchmarks/pipelines.py decode      [--model h1024] [--link none,5ms] [--sequences 8] ...
    Answers to several requests: two sections against two ranks of one section, and the bound of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

from models import SIZES, random_model, smollm2

from weft import LLM, SamplingParams
from weft.bench.machine import cores_of
from weft.config import processor_name
from weft.execute.results import RunOptions
from weft.launch.local import LocalLauncher
from weft.plan.planner import Plan
from weft.program.batch import Batch, Segment, one_prompt
from weft.timeline.timeline import median

EVEN = (2, 4, 8, 16)


def opened(given: argparse.Namespace, stack: ExitStack, **options: Any) -> LLM:
    """Two pinned ranks of one thread."""
    defaults: dict[str, Any] = {
        "num_threads": 1, "cores": cores_of(2, 1), "link": given.link, "max_model_len": 2 * given.tokens,
        "weights": given.weights,
    }  # fmt: skip
    model = smollm2() if given.model == "smollm2" else random_model(given.model)
    return stack.enter_context(LLM(model, **(defaults | options)))


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            taken = runs[name]()
            if number:
                seconds[name].append(taken)
    return seconds


def of_prompts(llm: LLM, plans: dict[str, Plan], batch: Batch) -> dict[str, Callable[[], float]]:
    """Runs of a prompt by each plan."""
    ids = [Random(0).randrange(500) for _ in range(batch.tokens)]
    return {
        name: lambda plan=plan: llm.engine.probe(batch, ids, plan, RunOptions()).seconds  # type: ignore[misc]
        for name, plan in plans.items()
    }


def prompt(given: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each way, against all at once and against the best even one."""
    with ExitStack() as stack:
        llm = opened(given, stack, pipeline_parallel_size=2, recalibrate=True)
        each = given.tokens // given.prompts
        planner, batch = llm.engine.planner, Batch(tuple(Segment(i, 0, each) for i in range(given.prompts)))
        plans = {name: planner.like(name, "exact").plan(batch) for name in ("serial", *(f"pipe:{n}" for n in EVEN))}
        plans["planned"] = planner.plan(batch)
        seconds = interleaved(of_prompts(llm, plans, batch), given.rounds)
        even = min((f"pipe:{n}" for n in EVEN), key=lambda name: median(seconds[name]))
        ids = [Random(0).randrange(500) for _ in range(batch.tokens)]
        for name, plan in plans.items():
            bubble = median(_bubble(llm, batch, ids, plan) for _ in range(3))
            assert plan.predicted is not None
            pieces = len(plan.strategy.piece_cuts or ()) + 1 if plan.strategy.piece_cuts else plan.strategy.pieces
            beside = f", {1 / (pieces + 1):.1%} if pieces took alike" if name.startswith("pipe") else ""
            against = median(a / b for a, b in zip(seconds["serial"], seconds[name], strict=True))
            best = median(a / b for a, b in zip(seconds[even], seconds[name], strict=True))
            print(f"{name:8} {str(plan.strategy)[:60]:60} {median(seconds[name]):.3f} s, predicted "
                  f"{plan.predicted.seconds:.3f}, bound {plan.predicted.bound:.3f}; {against:.2f} times as fast as at "
                  f"once, {best:.2f} as {even}; bubble {bubble:.1%}{beside}")  # fmt: skip
    return {"seconds": seconds}


def _bubble(llm: LLM, batch: Batch, ids: list[int], plan: Plan) -> float:
    """The part of a run's time that a rank idles."""
    timeline = llm.engine.probe(batch, ids, plan, RunOptions(timeline=True)).timeline
    assert timeline is not None and timeline.bubble is not None
    return timeline.bubble


class Throttled(LocalLauncher):
    """Rank 1 may compute one millisecond of two."""

    group = Path("/sys/fs/cgroup/cpu/weft-half")

    def prefix(self, index: int) -> tuple[str, ...]:
        """It puts itself into the group first."""
        return ("sh", "-c", f'echo $$ > {self.group}/cgroup.procs; exec "$@"', "sh") if index == 1 else ()


def throttled(given: argparse.Namespace) -> dict[str, Any]:
    """Prints planned layers and pieces against even ones, where rank 1 has half a core."""
    Throttled.group.mkdir(exist_ok=True)
    (Throttled.group / "cpu.cfs_period_us").write_text("2000")
    (Throttled.group / "cpu.cfs_quota_us").write_text("1000")
    try:
        with ExitStack() as stack:
            batch, runs, bounds = one_prompt(given.tokens), dict[str, Callable[[], float]](), list[str]()
            for name, layers in (("even", None), ("planned", "auto")):
                launcher = Throttled()
                llm = opened(given, stack, pipeline_parallel_size=2, layers=layers, recalibrate=True, launcher=launcher)
                planner = llm.engine.planner
                plan = planner.plan(batch) if layers else planner.like("pipe:8", "exact").plan(batch)
                label = f"{name}, layers {llm.engine.config.layout.layers}, {str(plan.strategy)[:40]}"
                runs |= of_prompts(llm, {label: plan}, batch)
                assert plan.predicted is not None
                bounds.append(f"predicted {plan.predicted.seconds:.3f}, bound {plan.predicted.bound:.3f}")
            seconds = interleaved(runs, given.rounds)
    finally:
        Throttled.group.rmdir()
    even, planned = seconds.values()
    for (label, taken), bound in zip(seconds.items(), bounds, strict=True):
        print(f"{label}: {median(taken):.3f} s, {bound}")
    print(f"planned is {median(a / b for a, b in zip(even, planned, strict=True)):.2f} times as fast as even")
    return {"seconds": seconds}


def decode(given: argparse.Namespace) -> dict[str, Any]:
    """Prints tokens a second of both, and what no schedule goes above with the link's delay alone."""
    asked = SamplingParams(temperature=0.0, max_tokens=given.answer, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": [5 + n for n in range(12)]} for _ in range(given.sequences)]
    with ExitStack() as stack:
        llms = {
            "tp 2": opened(given, stack, tensor_parallel_size=2, overlap="serial"),
            "pp 2": opened(given, stack, pipeline_parallel_size=2, overlap="serial"),
        }

        def taken(llm: LLM) -> float:
            begin = time.perf_counter()
            llm.generate(prompts, asked)
            return time.perf_counter() - begin

        seconds = interleaved({name: lambda llm=llm: taken(llm) for name, llm in llms.items()}, given.rounds)  # type: ignore[misc]
        layers = sum(llms["tp 2"].engine.config.layout.layers)
        delay = llms["tp 2"].engine.config.link.delay
    count = given.sequences * given.answer
    waits = {"tp 2": 2 * layers * delay, "pp 2": delay}  # of a token's way, at least
    for name, each in seconds.items():
        bound = given.sequences / waits[name] if delay else float("inf")
        print(f"{name}: {count / median(each):.1f} tokens/s; the delay alone allows {bound:.0f}")
    times = median(a / b for a, b in zip(seconds["tp 2"], seconds["pp 2"], strict=True))
    print(f"pp 2 gives {times:.2f} times as many")
    return {"seconds": seconds}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prompt", "throttled", "decode"])
    parser.add_argument("--model", default="h1024", choices=[*SIZES, "smollm2"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--link", default="", help="as for weft generate; default: 100mbit, of decode none,5ms")
    parser.add_argument("--weights", default="auto", help="as for weft generate")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    given.link = given.link or ("none,5ms" if given.what == "decode" else "100mbit")
    found = {"prompt": prompt, "throttled": throttled, "decode": decode}[given.what](given)
    about = {"what": given.what, "model": given.model, "tokens": given.tokens, "prompts": given.prompts,
             "link": given.link, "weights": given.weights}  # fmt: skip
    print(f"{processor_name()}, {date.today()}")
    if given.json:
        head = {"processor": processor_name(), "date": str(date.today()), **about}
        given.json.write_text(json.dumps({**head, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
