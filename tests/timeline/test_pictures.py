"""SVG and HTML drawings: everything is drawn, at its place, and the page works in a real browser."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.browser import needs_browser, opened
from tests.timeline.test_timeline import TIMELINE
from weft.timeline.page import page
from weft.timeline.svg import svg
from weft.timeline.timeline import Timeline

EMPTY = Timeline((), "measured")


def rects(text: str, kind: str) -> list[dict[str, str]]:
    tree = ElementTree.fromstring(text)
    found = (element for element in tree.iter() if element.tag.endswith("rect") and "%" in element.get("x", ""))
    return [element.attrib for element in found if kind in element.get("class", "").split()]


def test_every_step_is_drawn_at_its_place() -> None:
    steps = rects(svg([TIMELINE]), "step")
    assert len(steps) == len(TIMELINE.events)
    first, second = (step for step in steps if "compute" in step["class"] and step["y"] == steps[0]["y"])
    assert (first["x"], first["width"]) == ("0.0000%", "25.0000%")
    assert (second["x"], second["width"]) == ("50.0000%", "12.5000%")


def test_what_is_exposed_is_marked() -> None:
    waits = rects(svg([TIMELINE]), "wait")
    # Rank 0 waits while its collective travels from 1 to 2 and from 2.5 to 3 s; rank 1 from 1 to 4 s.
    assert [(wait["x"], wait["width"]) for wait in waits] == [
        ("25.0000%", "25.0000%"), ("62.5000%", "12.5000%"), ("25.0000%", "75.0000%"),
    ]  # fmt: skip


def test_several_share_one_scale() -> None:
    longer = Timeline(tuple(TIMELINE.events), "predicted", "longer")
    text = svg([TIMELINE, longer])
    assert "longer · predicted · 4000.0 ms" in text and "measured · 4000.0 ms" in text
    assert len(rects(text, "step")) == 2 * len(TIMELINE.events)


@pytest.mark.parametrize("draw", [svg, page])
def test_nothing_to_draw_and_titles_from_outside(draw) -> None:
    draw([])
    assert "nothing is communicated" in draw([EMPTY])
    assert "<script>alert" not in draw([Timeline(TIMELINE.events, "measured", "<script>alert(1)</script>")])


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "timeline.html"
    path.write_text(page([TIMELINE, Timeline(TIMELINE.events, "predicted", "again")]), "utf-8")
    with opened(path) as (shown, complaints, requests):
        steps = shown.locator("svg rect.step")
        assert steps.count() == 2 * len(TIMELINE.events)
        boxes = [steps.nth(number).bounding_box() for number in range(steps.count())]
        assert all(box["width"] > 10 and box["height"] > 10 for box in boxes)
        steps.nth(0).hover()
        assert "compute L0.mlp 0:4" in shown.locator("#tip").inner_text()
        assert shown.locator("rect.same").count() == 5  # the step's collective and both on the other rank
        before = steps.nth(0).bounding_box()["width"]
        shown.locator("#zoom").fill("4")
        assert steps.nth(0).bounding_box()["width"] == pytest.approx(4 * before, rel=0.02)
        assert complaints == [] and requests == [path.as_uri()]
