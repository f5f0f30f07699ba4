"""`weft doctor`."""

from __future__ import annotations

import json

from tests.processes import weft


def test_says_what_there_is_and_what_it_is_for() -> None:
    done = weft("doctor")
    for part in ("cores", "memory", "packed weights", "gloo", "GPU", "shaped links", "hub", "calibration"):
        assert part in done.stdout


def test_json() -> None:
    findings = json.loads(weft("doctor", "--json").stdout)["findings"]
    assert {"what", "ok", "value", "meaning"} == set(findings[0])
    assert {finding["what"] for finding in findings} >= {"cores", "packed weights", "shaped links"}


def test_help_has_examples() -> None:
    for command in ("generate", "doctor"):
        assert f"weft {command}" in weft(command, "--help").stdout
    assert "generate" in weft("--help").stdout
