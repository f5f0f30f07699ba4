"""What `--reproducible` costs: the same prompt with and without it, interleaved.

python benchmarks/reproducible.py            two models, prefill and decode, one rank of two threads
"""

from __future__ import annotations

import argparse
from datetime import date

import torch
from models import random_model
from rich.console import Console
from rich.table import Table
from single import Weft

from weft.hub import PACKAGED
from weft.timeline.timeline import median


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    table = Table(title=f"one rank, {given.threads} threads, {given.tokens} tokens; medians of {given.rounds} rounds")
    for column in ("model", "what", "plain ms", "reproducible ms", "times as long"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    tokens = torch.randint(1, 4000, (given.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, path in (("483m", random_model("483m")), ("packaged", PACKAGED)):
        plain, exact = Weft(path, given.threads), Weft(path, given.threads, reproducible=True)
        for what in ("prefill", "decode"):
            pairs = [(getattr(plain, what)(tokens), getattr(exact, what)(tokens)) for _ in range(given.rounds + 1)][1:]
            times = median(a for a, _ in pairs) * 1e3, median(b for _, b in pairs) * 1e3
            ratio = median(b / a for a, b in pairs)
            table.add_row(name, what, f"{times[0]:.2f}", f"{times[1]:.2f}", f"{ratio:.2f}")
        plain.llm.close()
        exact.llm.close()
    Console(width=110).print(table)
    print(f"torch {torch.__version__}, {date.today()}")


if __name__ == "__main__":
    main()
