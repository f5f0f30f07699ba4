"""Reports: what is said of a grid, and the page in a real browser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.browser import needs_browser, opened
from tests.timeline.test_timeline import TIMELINE
from weft.bench.grid import Point
from weft.bench.plot import groups, saving_plot
from weft.bench.report import as_json, conclusion, most_to_hide, report, timelines
from weft.compare import Measured
from weft.layout import Layout

MACHINE = {"processor": "a <fast> one", "cores": 2, "gemm_gflops": 100.0, "torch": "2", "date": "2026-01-01"}
MODEL = {"name": "tiny", "layers": 2}


def measured(overlap: str, seconds: float, possible: float = 0.4) -> Measured:
    return Measured(
        overlap=overlap, wire="exact", like="exact", plan="", why=[], times_exact=1 / seconds,
        seconds=[seconds] * 3, compute_alone=0.6, network_alone=0.4, bound=0.6,
        floor=0.62, serial_median=1.0, saving=1 - seconds, saving_range=(0.9 - seconds, 1.1 - seconds),
        saving_bound=possible,
        overlap_efficiency=(1 - seconds) / possible, floor_efficiency=(1 - seconds) / 0.38,
        exposed=seconds - 0.6, bytes_on_wire=1_000_000, bytes_on_device=1_010_000, predicted=seconds * 1.1,
        timeline=replace(TIMELINE, title=overlap),
        predicted_timeline=None,
    )  # fmt: skip


def point(link: str, best: float, possible: float = 0.4) -> Point:
    variants = [
        measured("serial", 1.0, possible),
        measured("iso:2", best, possible),
        measured("tiles:4", 0.95),
    ]
    return Point(512, 2, 1, link, None, 80.0, variants, Layout.tensor(6, (1.0, 1.0)))


POINTS = [point("1gbit", 0.7), point("200mbit", 0.65), point("none", 0.9, 0.12)]


def test_conclusion_and_flags() -> None:
    line = conclusion(POINTS)
    assert (
        "overlap efficiency 0.83 in the median of 3 points (0.75 to 0.87), to the floor 0.79, saving up to 35.0%"
        in line
    )
    assert "marked !" not in line
    assert "1 saving marked ! exceed what is possible by more than 2%" in conclusion([point("1gbit", 0.5)])
    assert measured("iso:2", 0.5).above_ceiling and not measured("iso:2", 0.59).above_ceiling


def test_json_says_whether_it_is_complete() -> None:
    data = json.loads(as_json(MACHINE, MODEL, POINTS, complete=False))
    assert data["complete"] is False and len(data["runs"]) == 9 and data["machine"] == MACHINE
    assert data["runs"][1]["above_ceiling"] is False and data["runs"][1]["median"] == 0.7


def test_the_plot_needs_two_speeds_and_sorts_them() -> None:
    assert [[p.link for p in group] for group in groups(POINTS)] == [["200mbit", "1gbit"]]
    assert groups(POINTS[1:]) == []
    text = saving_plot(groups(POINTS)[0])
    assert "iso:2" in text and "possible, exact" in text and "currentColor" in text


def test_timelines_are_those_of_serial_and_the_best() -> None:
    assert most_to_hide(POINTS) is POINTS[0]
    titles = [timeline.title for timeline in timelines(POINTS[1])]
    assert titles == [f"{name}: 512 tokens, 2 ranks, link 200mbit" for name in ("serial", "iso:2")]


@needs_browser
def test_the_report_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report(MACHINE, MODEL, POINTS, complete=False), "utf-8")
    with opened(path) as (shown, complaints, requests):
        assert "a <fast> one" in shown.locator("main").inner_text()
        assert "Interrupted" in shown.locator("main").inner_text()
        assert shown.locator("table").count() == 3 and shown.locator("tr.best").count() == 3
        assert shown.locator("details[open] rect.step").first.is_visible()
        shown.locator("summary").nth(1).click()
        assert shown.locator("details").nth(1).locator("rect.step").first.is_visible()
        assert shown.locator("svg path").count() > 10  # the plot
        assert complaints == [] and requests == [path.as_uri()]


def test_nothing_measured() -> None:
    assert "nothing to hide" in report(MACHINE, MODEL, [], complete=False)
