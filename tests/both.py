"""The suite as `make test` runs it: tests of single rooms in one process, beside it those that start processes, which
mostly wait. What the first ones print comes at the end.

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
        rooms = subprocess.Popen(command(f"not processes{every}", options), stdout=log, stderr=subprocess.STDOUT)
        try:
            code = subprocess.call(command(f"processes{every}", options))
            rooms.wait()
        finally:
            rooms.terminate()
            rooms.wait()
            log.seek(0)
            print("\nrooms by themselves:", flush=True)
            sys.stdout.buffer.write(log.read())
            sys.stdout.flush()
    return code or rooms.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
