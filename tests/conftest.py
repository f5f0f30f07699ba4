"""Fixtures for every room. Rooms without torch must not pay for it: torch is imported inside fixtures only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="weft-tests-")  # calibrations of test models are nobody's
os.environ["XDG_CACHE_HOME"] = _CACHE.name


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
