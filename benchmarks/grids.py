"""What files of `weft bench --json` come to, as tables and in a line each: overlap efficiency, predictions, and `auto`
against the best fixed strategy.

The best fixed one of a point is chosen on half of its rounds and compared on the others, both ways round: the same
rounds would flatter it. Reads what was measured; measures nothing.

    python benchmarks/grids.py benchmarks/rounds/grid-*.json
    python benchmarks/grids.py benchmarks/rounds/plans-*.json --plans
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from weft.program.strategy import AUTO
from weft.timeline.timeline import median

WITHIN = 0.05  # of the best fixed strategy
EFFICIENCY, FLOOR = "overlap_efficiency", "floor_efficiency"

Run = dict[str, Any]


class Point(NamedTuple):
    """What was run at one place of a grid: by strategy."""

    hidden: int
    runs: dict[str, Run]

    @property
    def serial(self) -> Run:
        """Without overlap."""
        return self.runs["serial"]

    @property
    def fixed(self) -> list[str]:
        """Strategies but `auto`."""
        return [name for name in self.runs if name != AUTO]

    def best(self, names: Iterable[str]) -> Run:
        """That of these overlapped ones which saves most."""
        return max((self.runs[name] for name in names if name != "serial"), key=lambda run: run["saving"])

    @property
    def link(self) -> str:
        """With its share of balance."""
        balance = self.serial["balance"]
        return self.serial["link"] + (f" ({balance:g})" if balance else "")

    @property
    def prompts(self) -> str:
        """Tokens, and prompts where there are several."""
        tokens, prompts = self.serial["tokens"], self.serial["prompts"]
        return f"{tokens} in {prompts}" if prompts > 1 else str(tokens)

    @property
    def once(self) -> list[Run]:
        """Each run once: strategies of one plan share theirs."""
        return list({run["plan"]: run for run in reversed(self.runs.values())}.values())

    @property
    def auto_is_fixed(self) -> bool:
        """True where `auto` came to a fixed strategy's plan: then their runs are the same."""
        return AUTO in self.runs and any(self.runs[AUTO]["plan"] == self.runs[name]["plan"] for name in self.fixed)

    def auto_over_best(self) -> float | None:
        """Seconds of `auto` over those of the best fixed one, chosen on the other rounds; None without `auto`."""
        if AUTO not in self.runs or len(self.serial["seconds"]) < 2:
            return None
        rounds = range(len(self.serial["seconds"]))
        halves = [[n for n in rounds if n % 2 == half] for half in (0, 1)]
        ratios = []
        for choose, compare in (halves, halves[::-1]):
            best = min(self.fixed, key=lambda name: self._seconds(name, choose))
            ratios.append(self._seconds(AUTO, compare) / self._seconds(best, compare))
        return sum(ratios) / 2

    def _seconds(self, name: str, rounds: Sequence[int]) -> float:
        return median(self.runs[name]["seconds"][n] for n in rounds)


def points_of(path: Path) -> Iterator[Point]:
    """A file's, in its order."""
    data = json.loads(path.read_text())
    place = ("tokens", "tp", "prompts", "link", "wire")
    for _, runs in groupby(data["runs"], key=lambda run: tuple(run[name] for name in place)):
        yield Point(data["model"]["hidden"], {run["overlap"]: run for run in runs})


def efficiencies(points: Sequence[Point]) -> Iterator[str]:
    """A row a point: what each strategy saves of what is possible."""
    names = list(dict.fromkeys(name for point in points for name in point.runs if name != "serial"))
    yield _row("hidden size, tokens", "link (x balance)", "serial", "possible", *(f"`{n}` saves" for n in names),
               "efficiency", "to floor")  # fmt: skip
    yield _row(*["---"] * (6 + len(names)))
    for point in points:
        serial, best = point.serial, point.best(point.runs)
        yield _row(
            f"{point.hidden}, {point.prompts}", point.link, f"{serial['median']:.2f} s",
            f"{best['saving_bound']:.1%}",
            *(f"{point.runs[name]['saving']:.1%}" if name in point.runs else "" for name in names),
            *("" if best.get(name) is None else f"{best[name]:.2f}" for name in (EFFICIENCY, FLOOR)),
        )  # fmt: skip


def plans(points: Sequence[Point]) -> Iterator[str]:
    """A row a point: what `auto` came to, beside the best fixed one, and predictions."""
    yield _row("hidden", "tokens", "link (x balance)", "serial, s", "possible", "`auto`", "best fixed", "auto / best",
               "serial predicted", "auto predicted")  # fmt: skip
    yield _row(*["---"] * 10)
    for point in (point for point in points if AUTO in point.runs):
        auto, serial = point.runs[AUTO], point.serial
        best = min((point.runs[name] for name in point.fixed), key=lambda run: run["median"])
        ratio = point.auto_over_best()
        yield _row(
            str(point.hidden), point.prompts, point.link, f"{serial['median']:.4f}", f"{serial['saving_bound']:.0%}",
            f"`{auto['plan'].split(' · ')[0]}` {auto['saving']:.1%}", f"`{best['overlap']}` {best['saving']:.1%}",
            "" if ratio is None else f"{ratio:.3f}",
            *(f"{_off(run):+.0%}" if run["predicted"] else "" for run in (serial, auto)),
        )  # fmt: skip


def hiding(points: Sequence[Point]) -> Iterator[str]:
    """How much of what could be hidden was."""
    best = [point.best(point.runs) for point in points]
    yield "the best strategy of each: efficiency " + _spread(best, EFFICIENCY)
    yield "the best fixed one: efficiency " + _spread(
        [point.best(point.fixed) for point in points if len(point.fixed) > 1], EFFICIENCY
    )
    yield "auto: efficiency " + _spread([point.runs[AUTO] for point in points if AUTO in point.runs], EFFICIENCY)
    above = [run for run in best if run.get("floor", 0.0) > 1.01 * run["bound"]]
    yield f"where the floor is over 1% above the bound ({len(above)} points): best to the floor " + _spread(
        above, FLOOR
    )


def planning(points: Sequence[Point]) -> Iterator[str]:
    """How right predictions and choices were."""
    errors = [abs(_off(run)) for point in points for run in point.once if run["predicted"]]
    if errors:
        right = sum(error <= 0.2 for error in errors) / len(errors)
        yield f"predicted against measured: median {median(errors):.1%}, {right:.0%} of {len(errors)} within 20%"
    ratios = [ratio for point in points if (ratio := point.auto_over_best()) is not None]
    if ratios:
        close = sum(ratio <= 1 + WITHIN for ratio in ratios)
        yield (
            f"auto over the best fixed one of the other half of the rounds: {median(ratios):.3f} in the median, "
            f"within {WITHIN:.0%} at {close} of {len(ratios)} points, worst {max(ratios):.3f}; "
            f"at {sum(point.auto_is_fixed for point in points)} it is a fixed one, with the same run"
        )
    wrong = sum(run["above_ceiling"] for point in points for run in point.runs.values())
    yield f"savings above what is possible: {wrong}"


def _spread(runs: Sequence[Run], name: str) -> str:
    values = [run[name] for run in runs if run.get(name) is not None]
    return f"{median(values):.2f} in the median, {min(values):.2f} to {max(values):.2f}" if values else "none"


def _off(run: Run) -> float:
    return float(run["predicted"] / run["median"] - 1)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plans", action="store_true", help="a row says what auto came to, not what each one saves")
    args = parser.parse_args()
    points = [point for path in args.files for point in points_of(path)]
    table, hidden = (plans(points), []) if args.plans else (efficiencies(points), list(hiding(points)))
    print("\n".join([*table, "", f"{len(points)} points", *hidden, *planning(points)]))


if __name__ == "__main__":
    main()
