"""How much of the communication does overlap hide? Two ranks of one thread over a shaped link.

    python benchmarks/overlap.py --model h2048         as in the README: about five minutes, as root
    python benchmarks/overlap.py --json overlap.json   at hidden size 1024, with every round kept

Finds the link speed at which communication takes as long as computation (balance), then measures serial and each
cutting there, with network at half and at twice the computation. Rounds are interleaved; each figure is a median
of per-round ratios. The bound is measured in the same rounds: computation alone, and the same messages alone.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from models import random_llama
from rich.console import Console
from rich.table import Table

from weft.compare import Comparison, compare
from weft.launch.namespaces import NamespaceLauncher
from weft.llm import LLM

OVERLAPS = ["iso:2", "iso:3", "iso:4", "iso:2/4", "tiles:4"]


def balance_rate(llm: LLM, tokens: list[int], launcher: NamespaceLauncher) -> float:
    """Bits a second at which this prompt's messages alone take as long as its computation alone."""
    guess = 400e6
    for _ in range(2):  # the second time from close by: fixed costs of a message are in it then
        launcher.shape(f"{guess / 1e6:.1f}mbit")
        measured = compare(llm.engine, tokens, ["iso:2"], rounds=2)
        guess *= measured.network_alone / measured.compute_alone
    return guess


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h1024", help="a size of benchmarks/models.py")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--overlap", default=",".join(OVERLAPS))
    parser.add_argument("--network", default="0.5,1,2", help="network time as multiples of compute time")
    parser.add_argument("--timelines", type=Path, help="save each strategy's fastest timeline below this folder")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokens = torch.randint(0, 8192, (given.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    launcher, results = NamespaceLauncher("400mbit"), {}
    with LLM(random_llama(given.model), tensor_parallel_size=2, num_threads=1, cores=(0, 1), launcher=launcher) as llm:
        rate = balance_rate(llm, tokens, launcher)
        for factor in map(float, given.network.split(",")):
            link = f"{rate / factor / 1e6:.1f}mbit"
            launcher.shape(link)
            comparison = compare(llm.engine, tokens, given.overlap.split(","), given.rounds)
            results[link] = comparison
            show(comparison, f"{given.model}, {given.tokens} tokens, {link}, network about {factor:g} x compute")
            if given.timelines:
                given.timelines.mkdir(exist_ok=True)
                for measured in comparison.strategies:
                    name = f"{link}-{measured.overlap.replace('/', '-').replace(':', '')}.json"
                    measured.timeline.save(given.timelines / name)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {date.today()}")
    if given.json:
        plain = {link: {"rounds": [asdict(r) for r in c.rounds]} for link, c in results.items()}
        given.json.write_text(json.dumps({"model": given.model, "tokens": given.tokens, "links": plain}) + "\n")


def show(comparison: Comparison, title: str) -> None:
    """One link's table."""
    c = comparison
    table = Table(title=title, caption=f"compute alone {c.compute_alone:.3f} s, network alone {c.network_alone:.3f} s, "
                  f"bound {c.bound:.3f} s, serial {c.serial:.3f} s; medians of {len(c.rounds)} rounds")  # fmt: skip
    for column in ("overlap", "seconds", "saving", "possible", "efficiency", "MB on the wire"):
        table.add_column(column, justify="left" if column == "overlap" else "right")
    for measured in c.strategies:
        efficiency = f"{measured.overlap_efficiency:.2f}" if measured.overlap_efficiency is not None else "–"
        if measured.median < 0.98 * c.bound:
            efficiency += " !"  # faster than possible: the machine drifted between the runs, measure again
        table.add_row(
            measured.overlap, f"{measured.median:.3f}", f"{measured.saving:.1%}", f"{measured.saving_bound:.1%}",
            efficiency, f"{measured.bytes_on_wire / 1e6:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
