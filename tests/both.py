"""The suite as `make test` runs it: two halves, one beside the other. One has rooms by themselves and engines, the
other one commands, servers and machines that join, which mostly wait. What the first one prints comes at the end.

python -m tests.both [--all] [options of pytest]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile


def command(selected: str, options: list[str]) -> list[str]:
    """Pytest's, for some of the tests."""
    return [sys.executable, "-m", "pytest", "-q", "-m", selected, *options]


def main(options: list[str]) -> int:
    """The exit code: the first that isn't 0."""
    every = "" if "--all" in options else " and not grid"
    options = [option for option in options if option != "--all"]
    with tempfile.TemporaryFile() as log:
        first = subprocess.Popen(command(f"not second{every}", options), stdout=log, stderr=subprocess.STDOUT)
        try:
            code = subprocess.call(command(f"second{every}", options))
            first.wait()
        finally:
            first.terminate()
            first.wait()
            log.seek(0)
            print("\nrooms and engines:", flush=True)
            sys.stdout.buffer.write(log.read())
            sys.stdout.flush()
    return code or first.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
