"""Fixtures for every room. Rooms without torch must not pay for it: torch is imported inside fixtures only."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guardian import Guardian

# Commands that tests start are to take signals as they do for users, whatever this process was told to ignore: a
# handler that does nothing, unlike "ignore", is not passed on to them.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)
signal.pthread_sigmask(signal.SIG_SETMASK, ())

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="weft-tests-")  # calibrations of test models are nobody's
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "128"  # as workers have it; read with the first product
_GUARDIAN = Guardian(Path(_CACHE.name))


FIRST = {
    "batching", "bench", "cache", "compiled", "execute", "formats", "model", "outlook", "parallel", "plan", "program",
    "simulate", "speech", "timeline", "test_choosing.py", "test_detokenizer.py", "test_fuzz.py", "test_fuzz_files.py",
    "test_grammar.py", "test_grids.py", "test_hub.py", "test_links.py", "test_llm.py", "test_real.py", "test_rooms.py",
    "test_routing.py", "test_soak.py", "test_text.py", "test_toys.py", "test_versions.py",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks one half of the suite: what mostly waits for commands, servers and machines that join. The other half,
    rooms by themselves and engines, may run at the same time (tests/both.py)."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] not in FIRST:
            item.add_marker("second")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What tests have left running is a failure of theirs, and ends with them."""
    for line in _GUARDIAN.end():
        print(f"\nleft behind: {line}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """A test draws what it drew the last time, whatever runs before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Tiny random models of every family, made by transformers; see tests/tiny.py."""
    from tests.tiny import Checkpoints

    yield Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def packaged() -> Path:
    """The model in the package."""
    from weft.hub import PACKAGED

    return PACKAGED


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many torch, and what is compiled, compute with."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
