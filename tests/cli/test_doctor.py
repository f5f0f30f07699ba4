"""`weft doctor`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import weft
from weft.cli.doctor import _tcp


def test_says_what_there_is_and_what_it_is_for() -> None:
    done = weft("doctor")
    for part in ("cores", "memory", "packed weights", "gloo", "GPU", "shaped links", "hub", "calibration"):
        assert part in done.stdout


def test_json() -> None:
    findings = json.loads(weft("doctor", "--json").stdout)["findings"]
    assert {"what", "ok", "value", "meaning"} == set(findings[0])
    assert {finding["what"] for finding in findings} >= {"cores", "packed weights", "shaped links"}


def test_what_the_system_does_to_connections(tmp_path: Path) -> None:
    assert _tcp(tmp_path) == []  # a system that doesn't say
    (tmp_path / "tcp_wmem").write_text("4096\t16384\t4194304\n")
    for slow, ok in (("1\n", False), ("0\n", True)):
        (tmp_path / "tcp_slow_start_after_idle").write_text(slow)
        pauses, buffers = _tcp(tmp_path)
        assert pauses.ok is ok and ("sysctl -w" in pauses.meaning) is not ok
        assert buffers.value == "4 MiB" and "up to 3.4 Gbit/s" in buffers.meaning


def test_help_has_examples() -> None:
    for command in ("generate", "doctor"):
        assert f"weft {command}" in weft(command, "--help").stdout
    assert "generate" in weft("--help").stdout
