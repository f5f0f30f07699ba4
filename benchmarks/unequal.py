"""Two ranks of unequal speed: shares as the planner makes them against equal ones, interleaved.

Rank 1's core is shared with a process that computes without end, so that the rank gets about half of it.

python benchmarks/unequal.py                 [--model h1024] [--tokens 512] [--link 1gbit] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from random import Random

from models import SIZES, random_model

from weft import LLM
from weft.bench.machine import cores_of
from weft.execute.results import RunOptions
from weft.program.batch import one_prompt
from weft.timeline.timeline import median


def started(model: str, link: str, shares: tuple[float, ...] | str) -> LLM:
    """Two pinned ranks."""
    return LLM(
        random_model(model), tensor_parallel_size=2, num_threads=1, cores=cores_of(2, 1), link=link,
        shares=shares, max_model_len=4096, recalibrate=True,
    )  # fmt: skip


def main() -> None:
    """Measures, and prints one line a kind of share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h1024", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--link", default="none", help="as for weft generate")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    throttle = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(throttle.pid, {cores_of(2, 1)[1]})
    try:
        with started(given.model, given.link, (1.0, 1.0)) as equal, started(given.model, given.link, "auto") as planned:
            measure({"equal": equal, "planned": planned}, given.tokens, given.rounds)
    finally:
        throttle.kill()
        throttle.wait()


def measure(llms: dict[str, LLM], tokens: int, rounds: int) -> None:
    """Interleaved; the first round warms up."""
    random, batch = Random(0), one_prompt(tokens)
    ids = [random.randrange(1000) for _ in range(tokens)]
    plans = {
        (name, o): llm.engine.planner.like(o, "exact").plan(batch)
        for name, llm in llms.items()
        for o in ("serial", "auto")
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in plans}
    for number in range(rounds + 1):
        for key, plan in plans.items():
            result = llms[key[0]].engine.probe(batch, ids, plan, RunOptions())
            if number:
                seconds[key].append(result.seconds)
    for (name, overlap), taken in seconds.items():
        shares = ",".join(f"{share:g}" for share in llms[name].engine.config.layout.shares[0])
        gain = median(a / b for a, b in zip(seconds["equal", overlap], taken, strict=True))
        known = plans[name, overlap].predicted
        print(
            f"{name:8} shares {shares:9} {overlap:6} ({plans[name, overlap].strategy}): {median(taken):.3f} s, "
            f"predicted {known.seconds if known else 0:.3f} s; {gain:.2f} times as fast as equal shares"
        )


if __name__ == "__main__":
    main()
