"""The fuzz of broken model files, for a while; and whether it finds faults that are known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.fuzz.files import fuzz
from benchmarks.fuzz.planted import PLANTED


def test_broken_files_are_refused_by_a_line_or_read_rightly(tmp_path: Path) -> None:
    counts, wrong = fuzz(tmp_path, seconds=15, seed=21)
    assert not wrong
    assert counts["refused"] > 200 and counts["read"] > 20


@pytest.mark.grid
def test_for_two_minutes(tmp_path: Path) -> None:
    counts, wrong = fuzz(tmp_path, seconds=120, seed=22)
    assert not wrong and counts["refused"] > 1000


@pytest.mark.parametrize("name", PLANTED)
def test_finds_what_is_planted(name: str, tmp_path: Path) -> None:
    _, wrong = fuzz(tmp_path, seconds=90, seed=1, plant=name, enough=1)
    assert wrong and re.search(PLANTED[name], wrong[0]), wrong
