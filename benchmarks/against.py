"""This checkout against another one, measurement by measurement in turns.

    python benchmarks/against.py /path/to/the/other/checkout [--rounds 5] [--only "one rank"] [--json FILE]

Each checkout has its own .venv. Every round starts a fresh process of each for every measurement, in every second round
the other way round; the table has medians of rounds and the median of the rounds' ratios (below 1: this one takes
less). Random models are those of models.py. As root, a sample of `weft bench`'s grid over paced links of its own is
among them. Stop everything else first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from models import random_model

HERE = Path(__file__).parent.parent
MEASURE = """
import json, statistics, sys, time
from weft import LLM, SamplingParams
model, ranks, overlap, what, tokens = json.loads(sys.argv[1])
prompt = {"prompt_token_ids": [(7 * i) % 1000 + 5 for i in range(tokens)]}
answer = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
one = SamplingParams(temperature=0.0, max_tokens=1)
drawn = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=100, ignore_eos=True, seed=1)
with LLM(model, tensor_parallel_size=ranks, num_threads=1, overlap=overlap, enable_prefix_caching=False) as llm:
    work = {
        "prefill": lambda: llm.generate([prompt], one), "decode": lambda: llm.generate([prompt], answer),
        "drawn": lambda: llm.generate([prompt], drawn), "batch": lambda: llm.generate([prompt] * 16, answer),
    }[what]
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
print(min(taken[1:]))
"""
# What is measured: model (None: the packaged one), ranks, strategy, what, tokens of the prompt.
CASES: dict[str, tuple[str | None, int, str, str, int]] = {
    "prefill of 1000, one rank": (None, 1, "serial", "prefill", 1000),
    "prefill of 1000, two ranks, serial": (None, 2, "serial", "prefill", 1000),
    "prefill of 1000, two ranks, iso:2": (None, 2, "iso:2", "prefill", 1000),
    "prefill of 512, h1024, two ranks, auto": ("h1024", 2, "auto", "prefill", 512),
    "100 tokens, one rank": (None, 1, "serial", "decode", 10),
    "100 tokens, two ranks": (None, 2, "serial", "decode", 10),
    "100 tokens, two ranks, auto": (None, 2, "auto", "decode", 10),
    "100 tokens drawn, two ranks, 32000 logits": ("483m", 2, "serial", "drawn", 10),
    "16 x 100 tokens, one rank": (None, 1, "serial", "batch", 10),
    "16 x 100 tokens, two ranks": (None, 2, "serial", "batch", 10),
}
GRID = ["--tokens", "512", "--link", "500mbit,2gbit", "--overlap", "iso:2,auto", "--threads", "1", "--rounds", "3"]


def grid(checkout: Path) -> dict[str, float]:
    """Seconds of each point of the bench's sampled grid, in one checkout."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "grid.json"
        command = [str(checkout / ".venv/bin/weft"), "bench", str(random_model("h1024")), *GRID, "--json", str(file)]
        run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=900, check=False)
        if run.returncode:
            raise SystemExit(f"{checkout}: {run.stderr[-2000:]}")
        points = json.loads(file.read_text())["runs"]
    return {f"grid: 512 tokens, h1024, {each['link']}, {each['overlap']}": each["median"] for each in points}


def seconds(checkout: Path, case: tuple[str | None, int, str, str, int]) -> float:
    """Of one case in one checkout: the best of three after one that warms up."""
    name, *rest = case
    given = json.dumps([str(random_model(name)) if name else None, *rest])
    command = [str(checkout / ".venv/bin/python"), "-c", MEASURE, given]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=600, check=False)
    if run.returncode:
        raise SystemExit(f"{checkout}: {run.stderr[-2000:]}")
    return float(run.stdout.split()[-1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="the cases whose names hold this; grid: the bench's")
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if given.only in name}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(given.rounds):
        sides = (given.other, HERE) if number % 2 == 0 else (HERE, given.other)  # drift has both signs
        for name, case in cases.items():
            taken = {checkout: seconds(checkout, case) for checkout in sides}
            rounds[name].append((taken[given.other], taken[HERE]))
            print(f"round {number + 1}: {name}: {rounds[name][-1]}", file=sys.stderr)
        if given.only in ("", "grid") and os.geteuid() == 0:
            points = {checkout: grid(checkout) for checkout in sides}
            for name, now in points[HERE].items():
                rounds.setdefault(name, []).append((points[given.other][name], now))
                print(f"round {number + 1}: {name}: {rounds[name][-1]}", file=sys.stderr)
    print("| | before, ms | now, ms | ratio |\n|---|---|---|---|")
    for name, pairs in rounds.items():
        before, now = (median(pair[side] for pair in pairs) * 1e3 for side in (0, 1))
        print(f"| {name} | {before:.0f} | {now:.0f} | {median(b / a for a, b in pairs):.2f} |")
    if given.json:
        given.json.write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
