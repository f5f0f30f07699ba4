"""Timelines as files: the form follows the name, and what can't be read or written is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.timeline.test_timeline import TIMELINE
from weft.errors import InputError
from weft.timeline.files import demand_form, demand_writable, read_timeline, timelines_as, write


def test_forms(tmp_path: Path) -> None:
    for name, begins in (("t.json", '{"traceEvents"'), ("t.svg", "<svg"), ("t.html", "<!doctype html>")):
        path = tmp_path / name
        demand_form(path, "--out")
        write(path, timelines_as(path, [TIMELINE]))
        assert path.read_text().startswith(begins)
    assert read_timeline(tmp_path / "t.json") == TIMELINE


def test_other_forms_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"--out t.png: give a name that ends in one of .json \(read back.*\.svg"):
        demand_form(Path("t.png"), "--out")


def test_what_can_not_be_written(tmp_path: Path) -> None:
    demand_writable(tmp_path / "new.json", "--json")
    assert not (tmp_path / "new.json").exists()
    with pytest.raises(InputError, match=r"--json .*can't be written \(No such file or directory\)"):
        demand_writable(tmp_path / "nowhere" / "new.json", "--json")
    with pytest.raises(InputError, match=r"can't be written \(Is a directory\)"):
        write(tmp_path, "text")


def test_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(InputError, match=r"/dev/full can't be written \(No space left on device\)"):
        write(Path("/dev/full"), "text")


def test_what_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("other.json", "not a timeline"), ("binary.json", "not text"), ("none.json", "No such file")):
        with pytest.raises(InputError, match=rf"{name}.*{reason}"):
            read_timeline(tmp_path / name)
