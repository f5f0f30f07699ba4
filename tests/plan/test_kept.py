"""Calibrations as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulate.costs import costs
from weft.plan import kept

KEY = {"model": "llama 1x2", "ranks": "1,1", "link": "loopback"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_round_trip() -> None:
    assert kept.recall(KEY) == (None, None)
    assert kept.keep(KEY, costs(), 3.5) is None
    found, why = kept.recall(KEY)
    assert found is not None and found.costs == costs() and found.seconds == 3.5 and why is None
    assert kept.recall(KEY | {"link": "another"}) == (None, None)
    assert [calibration for _, calibration in kept.all_kept()] == [found]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', "\x00\xff"])
def test_corrupt(text: str) -> None:
    kept.keep(KEY, costs(), 1.0)
    kept.path_of(KEY).write_text(text)
    found, why = kept.recall(KEY)
    assert found is None and why is not None and why.endswith("can't be read: measuring again")
    assert [calibration for _, calibration in kept.all_kept()] == [None]


def test_impossible_numbers_are_corrupt() -> None:
    kept.keep(KEY, costs().scaled(-1.0, 1.0), 1.0)
    assert kept.recall(KEY)[1] is not None


def test_foreign() -> None:
    kept.keep(KEY, costs(), 1.0)
    other = KEY | {"ranks": "2,1"}
    kept.path_of(KEY).rename(kept.path_of(other))
    found, why = kept.recall(other)
    assert found is None and why is not None and "is of something else: measuring again" in why


def test_a_place_that_can_not_be_written_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    why = kept.keep(KEY, costs(), 1.0)
    assert why is not None and "the next start measures again" in why
    assert kept.recall(KEY) == (None, None) and list(kept.all_kept()) == []
