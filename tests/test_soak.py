"""A short soak: streams, cancellations, malformed requests and lost ranks at once; see benchmarks/soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.timeout(240)
def test_every_request_gets_what_it_gets_alone(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [
        sys.executable, str(SOAK), "--requests", "100000", "--seconds", "75", "--kill-every", "21", "--cases", "40",
        "--json", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["wrong"] == 0 and result["restarts"] >= 3 and result["stream"] > 100
    assert result["cancelled"] > 10 and result["malformed"] > 10
    assert result["prefix hits"] > 0.1 and result["memory flat"]
