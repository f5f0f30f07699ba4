"""Grids: what is asked for, what can't be, and a real one measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.bench.grid import Bench, Grid
from weft.config import available_cores
from weft.errors import InputError
from weft.links import NO_LINK, Link
from weft.model.description import model_config


def grid(**changes: object) -> Grid:
    given = {"tokens": (64,), "ranks": (2,), "links": (NO_LINK,), "overlaps": ("iso:2",), "wires": ("exact",)}
    return Grid(**{**given, "threads": 1, "rounds": 2, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tokens": (0,)}, "--tokens 0 is not allowed"),
        ({"tokens": (-5,)}, "--tokens -5 is not allowed"),
        ({"tokens": (5000,)}, "--tokens 5000 is more than the model's context of 2048"),
        ({"tokens": (3,), "prompts": 4}, "--tokens 3 can't be divided over 4 prompts"),
        ({"ranks": (0,)}, "--tp 0 is not allowed"),
        ({"ranks": (available_cores() + 1,)}, "ranks that share cores measure each other"),
        ({"threads": available_cores()}, f"needs {2 * available_cores()} cores, and {available_cores()} are there"),
        ({"rounds": 0}, "--rounds 0 is not allowed"),
        ({"prompts": 0}, "--prompts 0 is not allowed"),
        (
            {"links": (Link(rate=1e8), Link(rate=1e8, shaped=True))},
            "paced links and shaped ones can't be measured in one",
        ),
        ({"overlaps": ("magic",)}, "'magic' is not a strategy"),
        ({"overlaps": ("requests:2",)}, "cuts between prompts, and there is one; give --prompts 2"),
    ],
)
def test_what_can_not_be_measured(packaged: Path, changes: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=line):
        grid(**changes).demand(model_config(packaged))


def test_a_grid(packaged: Path) -> None:
    said: list[tuple[int, int, str]] = []
    kept: list[int] = []
    bench = Bench(
        packaged, model_config(packaged), grid(tokens=(32, 64), ranks=(1, 2), wires=("exact", "bf16")),
        lambda *what: said.append(what), lambda points: kept.append(len(points)),
    )  # fmt: skip
    bench.run()
    assert [(point.ranks, point.tokens) for point in bench.points] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    assert kept == [1, 2, 3, 4]
    assert [(m.overlap, m.wire) for m in bench.points[2].measured] == [
        ("serial", "exact"), ("serial", "bf16"), ("iso:2", "exact"), ("iso:2", "bf16"),
    ]  # fmt: skip
    assert all(done <= everything for done, everything, _ in said) and "2 ranks, link none: round 2 of 2" in said[-1][2]
    runs = list(bench.points[3].as_json())
    design = {
        "tokens", "tp", "link", "overlap", "wire", "plan", "seconds", "median", "compute_alone", "network_alone",
        "bound", "serial_median", "saving", "saving_bound", "overlap_efficiency", "exposed", "bytes_on_wire",
        "predicted",
    }  # fmt: skip
    assert design <= set(runs[0]) and len(runs[0]["seconds"]) == 2
    assert runs[0]["bytes_on_wire"] > 1.9 * runs[1]["bytes_on_wire"] > 0


def test_an_interruption_keeps_what_was_measured(packaged: Path) -> None:
    def watch(done: int, everything: int, text: str) -> None:
        if text.endswith("round 2 of 2"):
            raise KeyboardInterrupt

    bench = Bench(packaged, model_config(packaged), grid(), watch)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert [len(point.measured[0].seconds) for point in bench.points] == [1]


def test_prompts_divide_the_tokens(packaged: Path) -> None:
    config = model_config(packaged)
    bench = Bench(packaged, config, grid(prompts=3, overlaps=("requests:3",), rounds=1), lambda *what: None)
    bench.run()
    assert "attention 0:21 21:42 42:64" in bench.points[0].best.plan


def test_prompts_of_any_length_and_predictions(packaged: Path) -> None:
    """Mixed lengths are the same on every run; every variant is predicted, `auto` too."""
    config = model_config(packaged)
    asked = grid(tokens=(200,), prompts=4, mixed=True, overlaps=("requests:4", "auto"), rounds=1)
    plans = set()
    for _ in range(2):
        bench = Bench(packaged, config, asked, lambda *what: None)
        bench.run()
        plans.add(bench.points[0].measured[1].plan)
    [plan] = plans
    assert plan.startswith("requests:4") and "0:50 50:100" not in plan
    runs = list(bench.points[0].as_json())
    assert [run["overlap"] for run in runs] == ["serial", "requests:4", "auto"]
    assert all(0 < run["predicted"] < 10 for run in runs)
