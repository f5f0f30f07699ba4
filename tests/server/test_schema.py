"""Whatever the server's own OpenAPI document allows, and what it doesn't: no 5xx, no hang."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.server.running import NAME, running
from weft.server.app import Settings

EXAMPLES = 30  # of each endpoint, beside those that cover its document


def test_no_server_error_and_no_hang(packaged: Path, tmp_path: Path) -> None:
    with running(packaged, max_model_len=24, max_num_seqs=8, settings=Settings(NAME, patience=3.0)) as server:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--mode", "all",
            "--checks", "not_a_server_error", "--max-examples", str(EXAMPLES), "--request-timeout", "30",
            "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--seed", "1", "--no-color",
            "--warnings", "off",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert re.search(r"Tested: \d\d", done.stdout), done.stdout
        server.service.check_integrity()
        assert server.service.running == server.service.waiting == 0
