"""Is a paced link the link that it says? The same prompt over one, and over one that the kernel shapes, in turns.

    python benchmarks/pacing.py [--model h1024] [--tokens 1024] [--times 0.5,1,2] [--rounds 5] [--json FILE]

Two ranks of one thread and core each. Speeds are multiples of balance, found over the paced link, the same for both.
Both groups are up at once; every round runs serial, iso:2 and the messages alone over each, in every second round the
other way round. The ratio is the median of the rounds' ratios. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack, closing
from datetime import date
from pathlib import Path
from statistics import median

from models import SIZES, random_model
from rich.console import Console
from rich.table import Table

from weft.bench.machine import cores_of
from weft.config import processor_name
from weft.engine import Engine
from weft.execute.results import RunOptions
from weft.links import Link
from weft.opening import open_engine
from weft.program.batch import one_prompt

WORKS = {"serial": ("serial", "both"), "iso:2": ("iso:2", "both"), "messages alone": ("serial", "network")}


def seconds(engine: Engine, ids: list[int], work: str) -> float:
    """Of one pass."""
    overlap, scope = WORKS[work]
    batch = one_prompt(len(ids))
    plan = engine.planner.like(overlap, "exact").plan(batch)
    return engine.probe(batch, ids, plan, RunOptions(scope)).seconds


Rounds = dict[str, dict[str, list[tuple[float, float]]]]  # by link and work: paced, shaped


def measure(given: argparse.Namespace) -> Rounds:
    """Seconds of every round."""
    rounds: Rounds = {}
    ids = [7 + 13 * place % 1000 for place in range(given.tokens)]
    with ExitStack() as stack:

        def opened(link: str) -> Engine:
            engine = open_engine(
                random_model(given.model), ranks=2, threads=1, cores=cores_of(2, 1), overlap="serial", link=link,
                max_length=given.tokens + 8, max_sequences=1, prefixes=False,
            )  # fmt: skip
            return stack.enter_context(closing(engine))

        engines = {"paced": opened("1x"), "shaped": opened("shaped:1gbit")}
        rate = engines["paced"].workers.controller.link.rate
        assert rate is not None
        for times in map(float, given.times.split(",")):
            here = rounds.setdefault(str(Link(rate * times)), {work: [] for work in WORKS})
            for name, engine in engines.items():
                engine.workers.controller.set_link(Link(rate * times, shaped=name == "shaped"))
            for number in range(given.rounds + 1):
                a_round(engines, ids, number, here if number else {work: [] for work in WORKS})
    return rounds


def a_round(
    engines: dict[str, Engine], ids: list[int], number: int, kept: dict[str, list[tuple[float, float]]]
) -> None:
    """All works over both links."""
    for work in WORKS:
        names = list(engines) if number % 2 else list(engines)[::-1]
        taken = {name: seconds(engines[name], ids, work) for name in names}
        kept[work].append((taken["paced"], taken["shaped"]))
        print(f"round {number}, {work}: {taken}", file=sys.stderr)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h1024", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--times", default="0.5,1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    rounds = measure(given)
    table = Table(title=f"{given.model}, {given.tokens} tokens; medians of {given.rounds} rounds in turns")
    for column in ("link", "", "paced, s", "shaped, s", "ratio"):
        table.add_column(column, justify="right" if column in ("paced, s", "shaped, s", "ratio") else "left")
    for link, works in rounds.items():
        for work, pairs in works.items():
            paced, shaped = (median(pair[side] for pair in pairs) for side in (0, 1))
            table.add_row(link, work, f"{paced:.3f}", f"{shaped:.3f}", f"{median(a / b for a, b in pairs):.3f}")
    Console(width=100).print(table)
    print(f"{processor_name()}, {date.today()}")
    if given.json:
        head = {"processor": processor_name(), "date": str(date.today()), "model": given.model, "tokens": given.tokens}
        given.json.write_text(json.dumps({**head, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
