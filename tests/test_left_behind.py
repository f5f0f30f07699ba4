"""Whatever becomes of tests, and of engines, nothing of them stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from weft.launch.folder import Folder, remove_leftovers
from weft.launch.keys import new_key
from weft.launch.local import LocalLauncher

REPOSITORY = Path(__file__).parents[1]


def pytest_of(name: str, *before: str) -> subprocess.Popen[str]:
    """pytest on one function of tests/leaving.py, in a process of its own, behind a command."""
    command = [
        *before,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        f"tests/leaving.py::{name}",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)


def line_of(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.split()[1:]
    raise AssertionError(f"{word} was not said")


def gone(pids: list[int], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_nothing_outlives_a_pytest_that_is_killed_and_a_start_clears_up() -> None:
    process = pytest_of("test_is_killed")
    left = [int(pid) for pid in line_of(process, "LEFT")]
    [folder] = line_of(process, "FOLDER")
    # A server, its two ranks, by now perhaps the process that reads its requests, and one rank more.
    assert len(left) in (4, 5) and all(psutil.pid_exists(pid) for pid in left) and Path(folder).is_dir()
    process.kill()
    process.wait(10)
    assert gone(left), "something still runs"
    remove_leftovers()
    assert not Path(folder).exists()
    assert process.stdout is not None
    process.stdout.close()


def test_what_a_failing_test_leaves_is_named_and_ended() -> None:
    process = pytest_of("test_leaves_a_server")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (pid := re.search(r"left behind: (\d+) .*serve", said)), said
    assert gone([int(pid[1])])


def test_commands_take_signals_that_this_process_was_told_to_ignore() -> None:
    process = pytest_of("test_is_interrupted", "sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


def test_folders_of_living_engines_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "weft-engine-no-lock").mkdir()  # being made, or not ours
    first = Folder()
    code = "import os; from weft.launch.folder import Folder; print(Folder().path, flush=True); os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ).stdout.strip()  # fmt: skip
    assert Path(killed).is_dir()
    second = Folder()
    assert not Path(killed).exists() and first.path.is_dir() and second.path.is_dir()
    first.remove()
    second.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["weft-engine-no-lock"]


def test_a_worker_ends_with_its_launcher_while_it_starts(tmp_path: Path) -> None:
    """Reading torch takes seconds, and on a busy machine many."""
    slow = tmp_path / "torch"
    slow.mkdir()
    (slow / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    launcher = LocalLauncher()
    os.environ["PYTHONPATH"], before = str(tmp_path), os.environ.get("PYTHONPATH")
    try:
        launcher.start(1, f"ipc://{tmp_path}/control", [f"{new_key().token}.ticket"])
    finally:
        del os.environ["PYTHONPATH"]
        os.environ |= {"PYTHONPATH": before} if before is not None else {}
    [pid], [child] = launcher.pids(), launcher._children
    time.sleep(1)
    assert not gone([pid], 0.2), "it waits for torch"
    assert child.stdin is not None
    child.stdin.close()
    assert gone([pid], 10)
    launcher.close()
