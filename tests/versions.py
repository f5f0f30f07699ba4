"""What is installed here, against what is locked: `python -m tests.versions locks/dev.txt`, for `make test-newest`."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = {"pip", "setuptools", "weft"}  # not what weft runs on


def locked(lines: list[str]) -> dict[str, str]:
    """Versions by name, of those that this Python and system call for."""
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [each for each in wanted if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in here}


def differences(lock: dict[str, str], installed: dict[str, str]) -> list[tuple[str, str, str]]:
    """Name, locked, installed; a dash where there is none. A local version (2.13.0+cpu) is the one that it is of."""
    names = sorted((lock.keys() | installed.keys()) - TOOLS)
    rows = [(name, lock.get(name, "-"), installed.get(name, "-").partition("+")[0]) for name in names]
    return [row for row in rows if row[1] != row[2]]


def main(path: str) -> None:
    """Prints a table."""
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}
    rows = differences(locked(Path(path).read_text("utf-8").splitlines()), installed)
    print(f"{len(rows)} of {len(installed)} packages are not what {path} says{':' if rows else ''}")
    for name, was, now in rows:
        print(f"  {name:28} locked {was:16} here {now}")


if __name__ == "__main__":
    main(sys.argv[1])
