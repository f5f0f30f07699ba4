"""Does a second rank make decoding slower? Two ranks of one thread against one rank of two threads, in turns.

    python benchmarks/decoding.py [--models packaged,h1024,483m] [--weights int8] [--rounds 7] [--json FILE]
    python benchmarks/decoding.py --models 483m --weights int8 --link 200mbit --wire auto:int8
    python benchmarks/decoding.py --two-shot [--ranks 4] [--link 100mbit,5ms]

With --two-shot: sums by the algorithm that the planner takes against sums by two-shot alone, over a link.

All engines of a model are up at once, and each round every one decodes the same prompt, in every second round the other
way round. Beside the ratio stand the terms of its bound, from the same round: what a pass of one token computes and
what its sums take, each alone, and how much longer than both together the pass takes. Random models: models.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

from models import SIZES, random_model
from rich.console import Console
from rich.table import Table

from weft.batching.params import SamplingParams
from weft.config import available_cores, processor_name
from weft.engine import Engine
from weft.execute.results import RunOptions
from weft.opening import open_engine
from weft.plan.planner import Plan
from weft.program.batch import one_prompt

WARM = 2  # turns that are not counted: the prompt, and the first that was not sent off ahead


def decode(engine: Engine, tokens: int) -> float:
    """Seconds of a token, after the first ones."""
    engine.add([5 + n for n in range(12)], SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
    for _ in range(WARM):
        engine.step()
    begin, turns = time.perf_counter(), 0
    while not engine.batcher.idle:
        engine.step()
        turns += 1
    return (time.perf_counter() - begin) / turns


def terms(engine: Engine) -> tuple[float, float]:
    """Seconds that a pass of one token computes, and that its messages take, each alone."""
    batch = one_prompt(1)
    plan = engine.planner.plan(batch)

    def alone(scope: str) -> float:
        return median(engine.probe(batch, [7], plan, RunOptions(scope)).seconds for _ in range(15))

    return alone("compute"), alone("network")


def measure(model: str, given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round."""
    directory = None if model == "packaged" else random_model(model)
    rounds: dict[str, list[float]] = {name: [] for name in ("one rank", "two ranks", "compute", "sums")}
    with ExitStack() as stack:

        def opened(ranks: int) -> Engine:
            engine = open_engine(
                directory, ranks=ranks, threads=2 // ranks, overlap="serial", max_length=512, max_sequences=4,
                transport=given.transport, weights=given.weights,
                **({"link": given.link, "wire": given.wire} if ranks > 1 else {}),
            )  # fmt: skip
            return stack.enter_context(closing(engine))

        engines = {"one rank": opened(1), "two ranks": opened(2)}
        for number in range(given.rounds + 1):
            names = list(engines) if number % 2 else list(engines)[::-1]
            taken = {name: decode(engines[name], given.tokens) for name in names}
            taken["compute"], taken["sums"] = terms(engines["two ranks"])
            for name, seconds in taken.items() if number else ():
                rounds[name].append(seconds)
            print(f"{model}, round {number}: {taken}", file=sys.stderr)
    return rounds


def measure_algorithms(model: str, given: argparse.Namespace) -> None:
    """Prints what a token takes by the planner's sums and by two-shot ones, in turns."""
    directory = None if model == "packaged" else random_model(model)
    seconds: dict[str, list[float]] = {"chosen": [], "two-shot": []}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                closing(
                    open_engine(
                        directory, ranks=given.ranks, threads=1, max_length=512, max_sequences=4, link=given.link
                    )
                )
            )
            for name in seconds
        }
        plan = engines["chosen"].planner.plan  # the same but for its sums
        engines["two-shot"].planner.plan = lambda batch: by_two_shot(plan(batch))  # type: ignore[method-assign]
        taken = {step.algorithm for block in engines["chosen"].planner.plan(one_prompt(1)).program.form.blocks
                 for step in block.steps if step.algorithm}  # fmt: skip
        for number in range(given.rounds + 1):
            names = list(engines) if number % 2 else list(engines)[::-1]
            for name in names:
                each = decode(engines[name], given.tokens)
                seconds[name] += [each] if number else []
    ratio = median(a / b for a, b in zip(*seconds.values(), strict=True))
    chosen, two_shot = (median(each) * 1e3 for each in seconds.values())
    print(f"{model}, {given.ranks} ranks, {given.link}: {chosen:.1f} ms a token by {', '.join(sorted(taken))}, "
          f"{two_shot:.1f} by two-shot: {ratio:.2f}; rounds {seconds}; {processor_name()}, {date.today()}")  # fmt: skip


def by_two_shot(plan: Plan) -> Plan:
    """The same plan with other sums."""
    return replace(plan, program=plan.program.summed_by(lambda _: "two-shot"))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="packaged,h1024,483m", help=f"packaged, {', '.join(SIZES)}")
    parser.add_argument("--transport", default="auto", help="auto, shm, tcp, gloo")
    parser.add_argument("--weights", default="auto", help="what weights are kept in")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="that are decoded in each round")
    parser.add_argument("--json", type=Path, help="every round's seconds")
    parser.add_argument("--two-shot", action="store_true", help="the planner's sums against two-shot ones")
    parser.add_argument("--ranks", type=int, default=4, help="with --two-shot")
    parser.add_argument("--link", default="none", help="between ranks; with --two-shot 100mbit,5ms if not given")
    parser.add_argument("--wire", default="exact", help="of two ranks' sums")
    given = parser.parse_args()
    if given.two_shot:
        given.link = "100mbit,5ms" if given.link == "none" else given.link
        for model in given.models.split(","):
            measure_algorithms(model, given)
        return
    if available_cores() < 2:
        sys.exit("two ranks of one thread need two cores")
    measured = {model: measure(model, given) for model in given.models.split(",")}
    table = Table(title=f"decoding, ms a token; medians of {given.rounds} rounds in turns, {given.transport}")
    for column in ("", "one rank of 2", "two of 1", "as fast", "compute alone", "sums alone", "of both"):
        table.add_column(column, justify="left" if not column else "right")
    for model, rounds in measured.items():
        one, two, compute, sums = rounds.values()
        speed = median(a / b for a, b in zip(one, two, strict=True))
        floor = median(t / (c + s) for t, c, s in zip(two, compute, sums, strict=True))
        times = [f"{median(each) * 1e3:.2f}" for each in (one, two)]
        alone = [f"{median(each) * 1e3:.2f}" for each in (compute, sums)]
        table.add_row(model, *times, f"{speed:.2f}", *alone, f"{floor:.2f}")
    Console(width=100).print(table)
    print(f"{processor_name()}, {date.today()}")
    if given.json:
        head = {"processor": processor_name(), "date": str(date.today()), "transport": given.transport}
        given.json.write_text(json.dumps({**head, "seconds": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
