"""`--layout auto` against every layout, measured: two ranks of one core each over links of several speeds and lengths;
or more ranks, whose computation is then emulated by timed waits (emulated.py).

At each point the layout is chosen by cost, and each layout is started with that point's link and measured; rounds are
interleaved. The best one is found on half of the rounds and compared on the other half, both ways round.

python benchmarks/layouts.py [--model h1024] [--rates 50mbit,400mbit,none] [--delays 0,5] [--tokens 128,2048]
python benchmarks/layouts.py --ranks 4 ...
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from datetime import date
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from emulated import Emulated
from models import SIZES, random_model, smollm2
from rich.console import Console
from rich.table import Table

from weft import LLM
from weft.bench.machine import cores_of
from weft.config import processor_name
from weft.execute.results import RunOptions
from weft.plan.layouts import layouts_of
from weft.program.batch import one_prompt
from weft.timeline.timeline import median


def ways_of(ranks: int, layers: int, heads: int) -> dict[str, dict[str, Any]]:
    """Options of every layout, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for layout in layouts_of(ranks, layers, heads):
        pp = len(layout.sections)
        options = {"pipeline_parallel_size": pp, "layers": "auto"} if pp > 1 else {}
        found[str(layout)] = {"tensor_parallel_size": ranks // pp, **options}
    return found


def link_of(rate: str, delay: str) -> str:
    """As weft takes it."""
    parts = [rate if rate != "none" or float(delay) else "none", *([f"{delay}ms"] if float(delay) else [])]
    return ",".join(parts)


def point(given: argparse.Namespace, link: str, tokens: int) -> dict[str, Any]:
    """What was chosen, what was said of it, and seconds of every layout's rounds."""
    model = smollm2() if given.model == "smollm2" else random_model(given.model)
    emulated = given.ranks > 2

    def opened(**options: Any) -> LLM:
        where = {"launcher": Emulated()} if emulated else {"cores": cores_of(2, 1)}
        return LLM(model, num_threads=1, link=link, max_model_len=4096, recalibrate=True, **where, **options)

    with opened(tensor_parallel_size=given.ranks, layout="auto", optimise=f"latency:{tokens},1") as llm:
        engine = llm.engine
        tp, pp = len(engine.config.layout.shares[0]), len(engine.config.layout.sections)
        ways = ways_of(given.ranks, engine.model.layers, engine.model.heads)
        wanted = {"tensor_parallel_size": tp} | ({"pipeline_parallel_size": pp, "layers": "auto"} if pp > 1 else {})
        chosen = next(name for name, way in ways.items() if way == wanted)
        said = next(line for line in engine.notices if line.startswith("layout"))
    batch, ids = one_prompt(tokens), [Random(0).randrange(500) for _ in range(tokens)]
    with ExitStack() as stack:
        llms = {name: stack.enter_context(opened(**way)) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in llms}
        for number in range(given.rounds + 1):
            for name in list(llms) if number % 2 else list(llms)[::-1]:
                engine = llms[name].engine
                taken = engine.probe(batch, ids, engine.planner.plan(batch), RunOptions()).seconds
                seconds[name] += [taken] if number else []
    return {"link": link, "tokens": tokens, "chosen": chosen, "said": said, "seconds": seconds}


def against_best(found: dict[str, Any]) -> float:
    """What the chosen one takes of the best one, which is found on other rounds than it is compared on."""
    ratios = []
    for first in (0, 1):
        one = {name: median(each[first::2]) for name, each in found["seconds"].items()}
        other = {name: median(each[1 - first :: 2]) for name, each in found["seconds"].items()}
        ratios.append(other[found["chosen"]] / other[min(one, key=lambda name: one[name])])
    return sum(ratios) / 2


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="more than two are emulated")
    parser.add_argument("--model", choices=[*SIZES, "smollm2"], help="default: h1024; of emulated ranks light")
    parser.add_argument("--rates", default="50mbit,400mbit,none")
    parser.add_argument("--delays", default="0,5", help="milliseconds")
    parser.add_argument("--tokens", default="128,2048")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    given.model = given.model or ("h1024" if given.ranks == 2 else "light")
    points = []
    for rate, delay, tokens in product(given.rates.split(","), given.delays.split(","), given.tokens.split(",")):
        points.append(point(given, link_of(rate, delay), int(tokens)))
        print(points[-1]["said"])
        if given.json:
            head = {"processor": processor_name(), "date": str(date.today()), "model": given.model}
            head |= {"ranks": given.ranks, "emulated": given.ranks > 2}
            given.json.write_text(json.dumps({**head, "points": points}, indent=1) + "\n")
    what = "two ranks of one core" if given.ranks == 2 else f"{given.ranks} ranks, their computation EMULATED by waits"
    names = list(points[0]["seconds"])
    table = Table(title=f"layouts chosen by cost, and measured; {what}")
    for column in ("link", "tokens", *(f"{name}, s" for name in names), "chosen", "of the best"):
        table.add_column(column, justify="right" if column[-1] == "s" else "left")
    for found in points:
        times = [f"{median(found['seconds'][name]):.3f}" for name in names]
        table.add_row(found["link"], str(found["tokens"]), *times, found["chosen"], f"{against_best(found):.3f}")
    Console(width=100).print(table)
    print(f"{processor_name()}, {date.today()}")


if __name__ == "__main__":
    main()
