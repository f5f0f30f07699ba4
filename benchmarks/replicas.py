"""Two replicas of one rank against two ranks of one engine, under load: predicted for many loads, measured for one of
each kind.

A kind is what most of the time goes into: long prompts with an answer of one token, short prompts with long answers, or
both. So many requests run at a time as the load says; each one begins when one ends. Rounds are interleaved.

python benchmarks/replicas.py [--model h1024] [--link 400mbit] [--rounds 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

from models import SIZES, random_model, smollm2
from rich.console import Console
from rich.table import Table

from weft import LLM, SamplingParams
from weft.bench.machine import cores_of
from weft.calibration import messages_measured
from weft.choosing import replicated
from weft.config import processor_name
from weft.plan.layouts import Workload, rate
from weft.timeline.timeline import median

KINDS = {"prompts": (1024, 1), "both": (256, 32), "answers": (16, 64)}
AT_A_TIME = (2, 4, 16)
MEASURED = 4  # requests at a time
WAVES = 4  # times as many requests as that
TP, REPLICAS = "tp 2", "2 replicas"


def predicted(llm: LLM, load: Workload) -> dict[str, float]:
    """Requests a second, from what the two ranks of one engine measured."""
    engine = llm.engine
    workers = engine.workers
    sums = messages_measured(workers.probe, engine.model, engine.config, workers.controller.machines)
    each = next(replicated(engine.planner, engine.model, engine.config, workers.started.hellos, sums, load))
    return {TP: rate(engine.planner, load).requests, REPLICAS: each.rating.requests}


def requests(load: Workload, count: int) -> list[tuple[Any, SamplingParams]]:
    """Prompts of random tokens, so that nothing is shared; answers of half to one and a half of the load's length, so
    that requests don't end together, and of that length in the mean."""
    chosen = Random(0)
    lengths = [max(1, round(load.answer * (0.5 + (n + 0.5) / count))) for n in range(count)]
    chosen.shuffle(lengths)
    return [
        (
            {"prompt_token_ids": [chosen.randrange(500) for _ in range(load.prompt)]},
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True),
        )
        for length in lengths
    ]


def taken(llms: list[LLM], load: Workload) -> float:
    """Seconds until so many times as many requests as run at a time are done, by engines that run at the same time."""
    asked = requests(load, WAVES * load.requests)
    parts = [list(zip(*asked[number :: len(llms)], strict=True)) for number in range(len(llms))]
    threads = [Thread(target=llm.generate, args=map(list, part)) for llm, part in zip(llms, parts, strict=True)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def opened(given: argparse.Namespace, stack: ExitStack, ranks: int, cores: list[int]) -> LLM:
    """Of pinned ranks of one thread."""
    model = smollm2() if given.model == "smollm2" else random_model(given.model)
    link = given.link if ranks > 1 else "none"
    return stack.enter_context(
        LLM(
            model, tensor_parallel_size=ranks, num_threads=1, cores=cores, link=link, max_model_len=2048,
            max_num_seqs=given.measured * ranks // 2, enable_prefix_caching=False, recalibrate=ranks > 1,
        )
    )  # fmt: skip


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Predictions of the sweep, and rounds of one load of each kind."""
    cores = cores_of(2, 1)
    with ExitStack() as stack:
        together = opened(given, stack, 2, cores)
        sweep = [
            {"kind": kind, "at a time": count, **predicted(together, Workload(*tokens, count))}
            for kind, tokens in KINDS.items()
            for count in AT_A_TIME
        ]
        apart = [opened(given, stack, 1, [core]) for core in cores]
        ways = {TP: [together], REPLICAS: apart}
        rounds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in ways} for kind in KINDS}
        for number in range(given.rounds + 1):
            for kind, tokens in KINDS.items():
                load = Workload(*tokens, given.measured)
                for name in list(ways) if number % 2 else list(ways)[::-1]:
                    seconds = taken(ways[name], load)
                    rounds[kind][name] += [seconds] if number else []
    return {"predicted": sweep, "at a time": given.measured, "seconds": rounds}


def show(found: dict[str, Any], link: str) -> None:
    """One table: what was predicted, and what was measured where it was."""
    table = Table(title=f"requests a second of two ranks of one core, link {link}")
    for column in ("load", "at a time", f"{TP}, predicted", f"{REPLICAS}, predicted", TP, REPLICAS, "winner"):
        table.add_column(column, justify="left" if column in ("load", "winner") else "right")
    for row in found["predicted"]:
        kind, count = row["kind"], row["at a time"]
        cells, best = [f"{row[TP]:.3g}", f"{row[REPLICAS]:.3g}"], max((TP, REPLICAS), key=lambda name: row[name])
        said = best
        if count == found["at a time"]:
            seconds = {name: median(each) for name, each in found["seconds"][kind].items()}
            cells += [f"{WAVES * count / seconds[name]:.3g}" for name in (TP, REPLICAS)]
            said += ", as measured" if min(seconds, key=lambda name: seconds[name]) == best else ", not as measured"
        else:
            cells += ["", ""]
        table.add_row(f"{kind}: {KINDS[kind][0]} + {KINDS[kind][1]}", str(count), *cells, said)
    Console(width=110).print(table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h1024", choices=[*SIZES, "smollm2"])
    parser.add_argument("--link", default="400mbit", help="as for weft generate, between the two ranks of one engine")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--measured", type=int, default=MEASURED, choices=AT_A_TIME, help="requests at a time")
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    found = measured(given)
    show(found, given.link)
    print(f"{processor_name()}, {date.today()}")
    if given.json:
        head = {"processor": processor_name(), "date": str(date.today()), "model": given.model, "link": given.link}
        given.json.write_text(json.dumps({**head, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
