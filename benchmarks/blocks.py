"""One sum a layer against two, and what a sum of norms costs: models of equal sizes, interleaved, on a link at balance.

`parallel` and `sequential` are one GPT-NeoX with attention and MLP beside or behind each other; `across` has norms of
queries and keys over all heads (OLMo 2), `each` of each head (Qwen 3). The link is so fast that messages of the second
model of a pair take as long as its computation.

python benchmarks/blocks.py                  [--tokens 512] [--rounds 7] [--json benchmarks/rounds/blocks.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

from models import SIZES, random_model

from weft import LLM
from weft.bench.machine import cores_of, describe
from weft.execute.results import RunOptions
from weft.links import Link
from weft.plan.planner import Plan
from weft.program.batch import Batch, Segment, one_prompt
from weft.timeline.timeline import median

PAIRS = (("parallel", "sequential"), ("across", "each"))
OVERLAPS = ("serial", "iso:2", "auto")


def main() -> None:
    """Measures, and prints a line for each model and strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all rounds there")
    given = parser.parse_args()
    rows = [row for pair in PAIRS for row in measured(pair, given.tokens, given.rounds)]
    if given.json:
        given.json.write_text(json.dumps({"tokens": given.tokens, "runs": rows}, indent=1))


def measured(pair: tuple[str, str], tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One pair: a prompt by each strategy, and one token after it; the first round warms up."""
    with ExitStack() as stack:
        llms = {name: stack.enter_context(started(name)) for name in pair}
        machine = describe(llms[pair[1]].engine.model, 1)
        rate = at_balance(llms, pair[1], tokens)
        print(f"\n{pair[0]} against {pair[1]}, {tokens} tokens, two ranks, {rate / 1e6:.0f} Mbit/s")
        batches = {"prompt": one_prompt(tokens), "token": Batch((Segment(0, tokens, 1),))}
        cases = [(what, name, o) for what in batches for o in (OVERLAPS if what == "prompt" else ("serial",))
                 for name in pair]  # fmt: skip
        plans = {case: llms[case[1]].engine.planner.like(case[2], "exact").plan(batches[case[0]]) for case in cases}
        taken = {case: list[float]() for case in cases}
        sent = dict[tuple[str, str, str], int]()
        for number in range(rounds + 1):
            for case, plan in plans.items():
                seconds, sent[case] = run(llms[case[1]], batches[case[0]], plan)
                taken[case] += [seconds] if number else []
        for case in cases:
            other = taken[case[0], pair[1], case[2]]
            yield told(case, plans[case], taken[case], other, sent[case], rate) | {"machine": machine}


def started(name: str) -> LLM:
    """Two pinned ranks; their link is free until it is set."""
    return LLM(random_model(name), tensor_parallel_size=2, num_threads=1, cores=cores_of(2, 1), transport="tcp",
               overlap="serial", max_model_len=4096)  # fmt: skip


def at_balance(llms: dict[str, LLM], of: str, tokens: int) -> float:
    """Bits a second; all are set to it, and know their costs there."""
    engine, batch = llms[of].engine, one_prompt(tokens)
    plan = engine.planner.like("serial", "exact").plan(batch)
    rate = engine.workers.balance(Link(times=1.0), batch, ids(batch), plan)
    for llm in llms.values():
        llm.engine.workers.controller.set_link(Link(rate=rate))
        llm.engine.calibrate(("exact",))
    return rate


def ids(batch: Batch) -> list[int]:
    """Random tokens."""
    random = Random(0)
    return [random.randrange(min(size.vocabulary for size in SIZES.values())) for _ in range(batch.tokens)]


def run(llm: LLM, batch: Batch, plan: Plan) -> tuple[float, int]:
    """Seconds, and bytes that a rank sends."""
    result = llm.engine.probe(batch, ids(batch), plan, RunOptions())
    return result.seconds, result.bytes_sent[0]


def told(
    case: tuple[str, str, str], plan: Plan, taken: list[float], other: list[float], sent: int, rate: float
) -> dict[str, Any]:  # fmt: skip
    """One line, and the same as data."""
    known = plan.predicted
    assert known is not None, "costs were measured"
    what, name, overlap = case
    ratio = median(a / b for a, b in zip(taken, other, strict=True))
    sums = sum(step.kind in ("reduce", "reduce_scatter") for step in plan.program)
    print(
        f"{what:6} {name:10} {overlap:6} ({plan.strategy}): {1e3 * median(taken):7.1f} ms, predicted "
        f"{1e3 * known.seconds:7.1f}, bound {1e3 * known.bound:7.1f}; {sums:3} sums, {sent / 1e6:6.2f} MB sent; "
        f"{ratio:.3f} of the other's time"
    )
    return {
        "what": what, "model": name, "overlap": overlap, "plan": str(plan.strategy), "rate": rate, "seconds": taken,
        "median": median(taken), "predicted": known.seconds, "bound": known.bound, "sums": sums, "bytes": sent,
        "of_the_other": ratio,
    }  # fmt: skip


if __name__ == "__main__":
    main()
