"""`weft plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.outlook.test_figures import LLAMA_8B
from tests.processes import weft


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


def test_text_and_page(config: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    done = weft("plan", str(config), "--hardware", "4x rtx4090", "--hardware", "2x h100", "--price",
                "rtx4090=0.35,h100=2.5", "--ttft", "1", "--html", str(page), "--details")  # fmt: skip
    for part in ("layouts beside each other", "2 replicas of tp 2", "one alone", "Best (4096 tokens",
                 "4x rtx4090, link pcie4-x16", "iso:2", "auto", "overlap pays on links up to", "GiB (weights",
                 "prices for prompts of 4,096 tokens", "within 1 s", "in time",
                 "4x rtx4090, 1024 tokens", "not measured"):  # fmt: skip
        assert part in done.stdout
    assert done.returncode == 0 and page.read_text().startswith("<!doctype html>")


def test_json(config: Path) -> None:
    """From the directory, too; one line of text would spoil it."""
    data = json.loads(weft("plan", str(config.parent), "--hardware", "2x l4", "--tokens", "512", "--json").stdout)
    assert [f["overlap"] for f in data["groups"][0]["forecasts"]] == ["serial", "iso:2", "auto"]


def test_where_no_group_fits_all_are_shown_and_what_would(config: Path) -> None:
    """What is missing on each, and one line on what to do; in columns that anyone can read."""
    groups = ("--hardware", "1x i5-8500", "--hardware", "2x i5-8500", "--tokens", "30000", "--prompts", "40")
    done = weft("plan", str(config), *groups, code=2)
    assert done.stdout.count(" missing") == 5 and [
        line for line in done.stdout.splitlines() if line.strip() == "2x i5-8500"
    ]
    assert done.stderr.startswith("weft: none of 1x i5-8500, 2x i5-8500 holds this model with 30000 tokens; what would")
    data = json.loads(weft("plan", str(config), *groups, "--json", code=2).stdout)
    assert len(data["layouts"]) == 5 and all("missing" in row["why"] for row in data["layouts"])


def test_parts_that_were_given_are_why(config: Path) -> None:
    done = weft("plan", str(config), "--hardware", "2x rtx3090", "--shares", "1,60", "--tokens", "8k", "--kv", "auto",
                "--weights", "float32", code=2)  # fmt: skip
    assert "what would fit: the same without --shares, with parts by speed" in done.stderr


def test_list() -> None:
    shown = weft("plan", "--list").stdout
    assert "rtx4090" in shown and "ethernet-2.5g" in shown and "whitepaper" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --hardware, such as --hardware '4x rtx4090'"),
        (("--hardware", "4x rtx409"), "--hardware 'rtx409' is not known; nearest: rtx4090"),
        (("--hardware", "2x l4", "--price", "l4"), "--price 'l4' is not a list of prices"),
        (("--hardware", "2x l4", "--price", "l4=-1"), "every price must be above 0"),
        (("--hardware", "2x l4", "--ttft", "-1"), "--ttft -1 is not a time"),
        (("--hardware", "2x l4", "--catalogue", "/nowhere.toml"), "can't be read"),
        (("--hardware", "2x l4", "--tokens", "0"), "--tokens 0 is not allowed"),
        (("--hardware", "1x i5-8500", "--tokens", "30000", "--prompts", "9"), "GiB are missing; what would fit"),
    ],
)
def test_bad_input(config: Path, arguments: tuple[str, ...], said: str) -> None:
    done = weft("plan", str(config), *arguments, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1
