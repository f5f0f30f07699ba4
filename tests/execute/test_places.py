"""What ranks are told of the machines that they are on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from weft import config as configs
from weft.config import EngineConfig
from weft.errors import InputError
from weft.execute.places import threads_of
from weft.execute.protocol import Hello
from weft.model.description import model_config


def hello(cores: int) -> Hello:
    return Hello(0, 0, "", "host", 0, "", "machine", 1 << 30, cores)


def test_each_machine_has_its_own_threads(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a number was given: two ranks on two machines don't share the cores of either."""
    monkeypatch.setattr(configs, "available_cores", lambda: 8)
    model = model_config(packaged)
    apart = EngineConfig.resolve(model, ranks=2, here=lambda ranks: 1)
    assert apart.threads == 8 and EngineConfig.resolve(model, ranks=2).threads == 4
    assert EngineConfig.resolve(model, ranks=4, replicas=2).threads == 1
    assert EngineConfig.resolve(model, ranks=1, here=lambda ranks: 0).threads == 8
    assert [threads_of(apart, hello(cores), near) for cores, near in ((8, 1), (16, 1), (4, 2), (1, 2))] == [
        (8, False), (16, False), (2, False), (1, True),
    ]  # fmt: skip
    given = EngineConfig.resolve(model, ranks=2, threads=3, here=lambda ranks: 1)
    assert [threads_of(given, hello(cores), 1) for cores in (8, 2)] == [(3, False), (3, True)]
    pinned = EngineConfig.resolve(model, ranks=2, cores=tuple(range(8)))
    assert threads_of(replace(pinned, threads=4), hello(2), 2) == (4, False)


def test_a_context_of_one_token_is_refused(packaged: Path) -> None:
    with pytest.raises(InputError, match="max_model_len 1 holds no prompt with an answer"):
        EngineConfig.resolve(model_config(packaged), max_length=1)
