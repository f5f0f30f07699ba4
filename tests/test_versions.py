"""The lock: what it holds, and how it is compared."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.versions import differences, locked

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize("name", ["run", "dev"])
def test_every_dependency_is_locked_within_its_range(name: str) -> None:
    lines = (REPOSITORY / "locks" / f"{name}.txt").read_text("utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(each.specifier).startswith("==") for each in pinned)
    wanted = PROJECT["dependencies"] + (PROJECT["optional-dependencies"]["dev"] if name == "dev" else [])
    for each in map(Requirement, wanted):
        versions = [p.specifier for p in pinned if canonicalize_name(p.name) == canonicalize_name(each.name)]
        assert versions and all(each.specifier.contains(str(v).removeprefix("==")) for v in versions), each.name


def test_both_locks_agree_and_make_installs_the_torch_that_they_name() -> None:
    run, dev = (
        locked((REPOSITORY / "locks" / f"{name}.txt").read_text("utf-8").splitlines()) for name in ("run", "dev")
    )
    assert run.items() <= dev.items()
    assert f"TORCH := torch=={run['torch']}" in (REPOSITORY / "Makefile").read_text("utf-8")


def test_what_differs() -> None:
    lock = locked(["# made by", "A_b==1.0", "c==2.0 ; python_version < '3'", "d==1", "torch==2.13.0"])
    assert lock == {"a-b": "1.0", "d": "1", "torch": "2.13.0"}
    found = differences(lock, {"a-b": "1.1", "e": "3", "torch": "2.13.0+cpu", "pip": "99"})
    assert found == [("a-b", "1.0", "1.1"), ("d", "1", "-"), ("e", "-", "3")]
