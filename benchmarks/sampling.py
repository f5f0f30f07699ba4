"""What choosing tokens takes: 16 rows of a vocabulary of 152,000, against sorting each row.

    python benchmarks/sampling.py [--rounds 15]

One thread; both in turns, medians of rounds. Every round's times go to --json. The bound printed beside them is one
softmax of every row, which any way to draw needs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from weft.execute.protocol import Choice
from weft.execute.sampler import sample

ROWS, VOCABULARY = 16, 152_000
WISHES: dict[str, tuple[str, dict[str, float]]] = {
    "temperature 1": ("peaked", {"temperature": 1.0}),
    "temperature 1, top_p 0.95": ("peaked", {"temperature": 1.0, "top_p": 0.95}),
    "temperature 0.7, top_p 0.8, top_k 20": ("peaked", {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
    "temperature 2, top_p 0.999": ("flat", {"temperature": 2.0, "top_p": 0.999}),
    "temperature 2, top_p 0.1": ("flat", {"temperature": 2.0, "top_p": 0.1}),
    "temperature 2, top_p 0.9, top_k 70000": ("flat", {"temperature": 2.0, "top_p": 0.9, "top_k": 70_000}),
}


def by_sorting(rows: Tensor, choices: list[Choice]) -> list[int]:
    """The same distribution from sorted probabilities."""
    return [_sorted_draw(row, choice) for row, choice in zip(rows, choices, strict=True)]


def _sorted_draw(logits: Tensor, choice: Choice) -> int:
    ordered, tokens = torch.sort(logits / choice.temperature, descending=True, stable=True)
    probabilities = torch.softmax(ordered.double(), dim=0)
    if choice.top_k > 0:
        probabilities[choice.top_k :] = 0
    before = probabilities.cumsum(0) - probabilities
    probabilities *= before < choice.top_p * probabilities.sum()
    heights = probabilities.cumsum(0)
    uniform = random.Random(f"{choice.seed}/{choice.index}").random()
    return int(tokens[int(torch.searchsorted(heights, uniform * heights[-1], right=True))])


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="every round's milliseconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    flat = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    kinds = {"flat": flat, "peaked": 4 * flat}
    taken: dict[str, dict[str, list[float]]] = {}
    for name, (kind, wishes) in WISHES.items():
        rows, times = kinds[kind], {"weft": [], "sorting": [], "softmax": []}
        for number in range(given.rounds + 1):
            choices = [Choice(**wishes, seed=row, index=number) for row in range(ROWS)]  # type: ignore[arg-type]
            round_ = {
                "weft": timed(lambda: sample(rows, choices)),  # noqa: B023
                "sorting": timed(lambda: by_sorting(rows, choices)),  # noqa: B023
                "softmax": timed(lambda: torch.softmax(rows, dim=1)),  # noqa: B023
            }
            if number:  # the first one warms up
                for method, milliseconds in round_.items():
                    times[method].append(milliseconds)
        taken[name] = times
        middle = {method: median(values) for method, values in times.items()}
        print(f"{kind:7}{name:40}{middle['weft']:8.1f} ms  sorting {middle['sorting']:8.1f} ms  "
              f"bound (softmax) {middle['softmax']:5.1f} ms")  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": ROWS, "vocabulary": VOCABULARY, "milliseconds": taken}))


if __name__ == "__main__":
    main()
