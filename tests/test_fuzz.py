"""The fuzz of the service, a minute of it; and whether it finds faults that are known."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.fuzz.run import Fuzz
from benchmarks.fuzz.worker import PLANT
from tests.planted import ENGINE, WORKERS

SEED = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


LOST = {"byte-level": "rank crashes", "byte-fallback": "rank is killed", "metaspace": "rank raises"}


@pytest.mark.parametrize("kind", LOST)
def test_every_request_gets_what_it_gets_alone_or_an_error_of_its_own(folder: Path, kind: str) -> None:
    result = Fuzz(kind, folder, SEED, cases=100, ranks_lost=(LOST[kind],)).run(seconds=15)
    assert not result.wrong
    assert result.asked["whole"] > 30 and result.asked["stream"] > 30 and result.asked["cancelled"] > 5
    assert result.asked["foreign"] > 5 and result.asked["vectors"] > 2
    assert result.asked["fault"] > 5 and result.asked["malformed"] > 5 and result.restarts > 0
    assert result.reused > 0.02


def demand(said: str, kind: str, folder: Path, lost: tuple[str, ...] = ()) -> None:
    """A short fuzz must find something, and for the right reason; a busy machine gets a second one."""
    wrong: list[str] = []
    for seed in (SEED, SEED + 1):
        wrong += Fuzz(kind, folder, seed, cases=100, ranks_lost=lost, enough=5, patience=15).run(seconds=20).wrong
        if any(re.search(said, line) for line in wrong):
            return
    raise AssertionError(f"not found, but {wrong[:3]}")


def one_of(planted: Iterable[str]) -> list[object]:
    """The first; the others look for as long again each, in `make test-all`."""
    first, *others = planted
    return [first, *(pytest.param(name, marks=pytest.mark.grid) for name in others)]


@pytest.mark.parametrize("name", one_of(ENGINE))
def test_finds_what_is_planted_in_the_engine(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, kind, said, lost = ENGINE[name]
    plant(monkeypatch)
    demand(said, kind, folder, lost)


@pytest.mark.parametrize("name", one_of(WORKERS))
def test_finds_what_is_planted_in_workers(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, said = WORKERS[name]
    monkeypatch.setenv(PLANT, f"tests.planted:{name.split('_', maxsplit=1)[0]}_in_worker")
    demand(said, kind, folder)
