"""What a grid's file comes to: benchmarks/grids.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.grids import efficiencies, hiding, planning, plans, points_of


def _run(overlap: str, plan: str, seconds: list[float], predicted: float) -> dict[str, object]:
    return {
        "tokens": 512, "tp": 2, "prompts": 1, "link": "1gbit", "wire": "exact", "balance": 1.0, "overlap": overlap,
        "plan": plan, "seconds": seconds, "median": sorted(seconds)[1], "predicted": predicted,
        "saving": 1 - seconds[1], "saving_bound": 0.5, "overlap_efficiency": None, "bound": 0.5, "above_ceiling": False,
    }  # fmt: skip


def _file(folder: Path, auto_plan: str = "iso:4 ·") -> Path:
    runs = [
        _run("serial", "serial ·", [1.0] * 4, 1.0),
        _run("iso:2", "iso:2 ·", [0.5, 0.8, 0.5, 0.8], 0.8),  # best on one half of the rounds alone
        _run("iso:3", "iso:3 ·", [0.7, 0.6, 0.7, 0.6], 0.9),
        _run("auto", auto_plan, [0.6] * 4, 0.3),
    ]
    (folder / "grid.json").write_text(json.dumps({"model": {"hidden": 64}, "runs": runs}))
    return folder / "grid.json"


def test_the_best_is_chosen_on_other_rounds_than_it_is_compared_on(tmp_path: Path) -> None:
    [point] = points_of(_file(tmp_path))
    # Chosen on the first half iso:2, which takes 0.8 on the second; on the second iso:3, which takes 0.7 on the first.
    assert point.auto_over_best() == pytest.approx((0.6 / 0.8 + 0.6 / 0.7) / 2)


def test_strategies_that_share_a_run_count_once(tmp_path: Path) -> None:
    points = list(points_of(_file(tmp_path)))
    assert "of 4 within" in "".join(planning(points)) and "at 0 it is a fixed one" in "".join(planning(points))
    points = list(points_of(_file(tmp_path, "iso:3 ·")))
    assert "of 3 within" in "".join(planning(points)) and "at 1 it is a fixed one" in "".join(planning(points))


def test_what_there_was_nothing_to_hide_for_has_no_efficiency(tmp_path: Path) -> None:
    points = list(points_of(_file(tmp_path)))
    assert len(list(plans(points))) == len(list(efficiencies(points))) == 3
    assert "efficiency none" in next(hiding(points))
