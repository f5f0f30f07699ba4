"""What a prompt and the tokens after it were predicted to take, and took, over links of several kinds.

    python benchmarks/tokens.py [--models packaged,h1024] [--links "none;200mbit,shared"] [--rounds 3] [--json FILE]

Each round starts an engine of two ranks for each link, calibrates it anew, asks what a prompt and a greedy token after
it will take, and then answers such a prompt. `program`: what the ranks ran for the token, which is what is predicted;
`token`: all that a user waits for, the engine's own work and the choice of the token included. Corrections that the
planner learns from batches are not used. Random models: models.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from datetime import date
from pathlib import Path
from statistics import median

from decoding import WARM
from models import SIZES, random_model
from rich.console import Console
from rich.table import Table

from weft.batching.params import SamplingParams
from weft.config import available_cores, processor_name
from weft.engine import Engine
from weft.opening import open_engine
from weft.program.batch import Batch, Segment, one_prompt

PROMPT, ANSWER = 300, 64  # tokens
LINKS = "none;1x;200mbit;200mbit,shared;20mbit,1ms;none,5ms"
FIGURES = ("prompt predicted", "prompt", "token predicted", "program", "token")


def answered(engine: Engine) -> dict[str, float]:
    """Seconds of one request, predicted before it, and as they came."""
    token = Batch((Segment(0, PROMPT + ANSWER // 2, 1),))
    predicted = [engine.planner.plan(batch).predicted for batch in (one_prompt(PROMPT), token)]
    ids = [n * 13 % engine.model.vocabulary for n in range(PROMPT)]
    engine.add(ids, SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True))
    programs, walls = [], []
    while not engine.batcher.idle:
        engine.step()
        assert engine.last_turn is not None
        programs.append(engine.last_turn.result.seconds)
        walls.append(engine.last_turn.wall)
    assert predicted[0] is not None and predicted[1] is not None, "there is more than one rank"
    values = predicted[0].seconds, programs[0], predicted[1].seconds, median(programs[WARM:]), median(walls[WARM:])
    return dict(zip(FIGURES, values, strict=True))


def measure(model: str, link: str) -> dict[str, float]:
    """One round on this link."""
    directory = None if model == "packaged" else random_model(model)
    engine = open_engine(
        directory, ranks=2, threads=1, link=link, max_length=512, max_sequences=4, recalibrate=True, prefixes=False
    )
    with closing(engine):
        return answered(engine)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="packaged", help=f"packaged, {', '.join(SIZES)}")
    parser.add_argument("--links", default=LINKS, help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="every round")
    given = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in range(given.rounds):
        for model in given.models.split(","):
            for link in given.links.split(";"):
                rounds.setdefault(f"{model}, {link}", []).append(measure(model, link))
                print(f"round {number}: {model}, {link}: {rounds[f'{model}, {link}'][-1]}", file=sys.stderr)
    table = Table(
        "model and link", *FIGURES[:2], "off", *FIGURES[2:4], "off", FIGURES[4], title="ms, medians of rounds"
    )
    for name, taken in rounds.items():
        cells = {figure: f"{median(each[figure] for each in taken) * 1e3:.3g}" for figure in FIGURES}
        off = [f"{median(each[a] / each[b] for each in taken) - 1:+.0%}" for a, b in (FIGURES[:2], FIGURES[2:4])]
        values = [cells[figure] for figure in FIGURES]
        table.add_row(name, *values[:2], off[0], *values[2:4], off[1], values[4])
    Console(width=110).print(table)
    where = {"processor": processor_name(), "cores": available_cores(), "date": str(date.today())}
    Console().print(", ".join(map(str, where.values())))
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": where, "rounds": rounds}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
