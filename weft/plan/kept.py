"""Calibrations kept in the user's cache directory, one file for each model, group and link. Knows files and costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from weft.simulate.cost import Costs


class Calibration(msgspec.Struct, frozen=True):
    """What was measured, of what (`key`), when, and how long that took in seconds."""

    key: dict[str, str]
    when: str
    seconds: float
    costs: Costs


def folder() -> Path:
    """Where calibrations are."""
    return user_cache_path("weft") / "calibrations"


def path_of(key: dict[str, str]) -> Path:
    """The file for a key."""
    return folder() / f"{hashlib.sha256(msgspec.json.encode(sorted(key.items()))).hexdigest()[:20]}.json"


def keep(key: dict[str, str], costs: Costs, seconds: float) -> str | None:
    """Writes a calibration; says in one line why that was not possible, which is no reason to stop."""
    path = path_of(key)
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(Calibration(key, when, seconds, costs)))
        fresh.replace(path)
    except OSError as error:
        return f"the calibration can't be kept in {path} ({error.strerror}); the next start measures again"
    return None


def recall(key: dict[str, str]) -> tuple[Calibration | None, str | None]:
    """The calibration for a key, if there is one; and in one line why a file that is there can't be used."""
    path = path_of(key)
    if not path.is_file():
        return None, None
    try:
        calibration = read(path)
    except ValueError:
        return None, f"the calibration in {path} can't be read: measuring again"
    if calibration.key != key:
        return None, f"the calibration in {path} is of something else: measuring again"
    return calibration, None


def read(path: Path) -> Calibration:
    """One file. Raises ValueError for anything that is no calibration."""
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    demand_sound(calibration.costs)
    return calibration


def demand_sound(costs: Costs) -> None:
    """Raises ValueError for costs that no measurement gives."""
    tables = [table for rank in costs.ranks for group in (rank.body, rank.tail) for table in group.values()]
    tables += [table for wire in costs.wires.values() for table in (*wire.sums.values(), wire.hop, wire.send)]
    for table in tables:
        if not table.sizes or len(table.sizes) != len(table.seconds) or list(table.sizes) != sorted(set(table.sizes)):
            raise ValueError("a table whose sizes don't rise")
        if not all(0 <= value < 1e6 for value in table.seconds):
            raise ValueError("a table with impossible times")
    if any(not wire.sums for wire in costs.wires.values()):
        raise ValueError("a wire without sums")
    if not costs.ranks or costs.world < 1 or costs.width < 1:
        raise ValueError("costs of no rank")


def all_kept() -> Iterator[tuple[Path, Calibration | None]]:
    """Every file that is there, newest first, with None for one that can't be read."""
    try:
        paths = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return
    for path in paths:
        try:
            yield path, read(path)
        except ValueError:
            yield path, None
