"""One engine that becomes several replicas, when that was found to be better: here, and with machines that join."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console

from tests.processes import Command, free_port
from weft import workers
from weft.choosing import Apart, Decision
from weft.cli.serve import _client
from weft.cli.sites import Site, Sites
from weft.engine import Engine
from weft.errors import InputError
from weft.launch.hub import Hub
from weft.launch.keys import key_of
from weft.model.description import model_config
from weft.opening import open_engine
from weft.plan.layouts import Rating, even_layout
from weft.server.app import Settings, application
from weft.server.replicas import Replicas
from weft.server.run import in_background
from weft.server.service import Service
from weft.workers import Progress

SECRET = "a secret between us"


def found(path: Path, tp: int, pp: int, replicas: int) -> Callable[..., Decision]:
    """What is chosen, whatever is measured."""
    layers = model_config(path).layers
    apart = Apart(replicas, even_layout(layers, tp, pp), Rating(1.0, 1.0, 1.0, 1.0))
    return lambda *_: Decision(even_layout(layers, tp * pp * replicas, 1), "layout as planted", apart)


@contextmanager
def served(path: Path, sites: Sites, lines: list[str], **options: Any) -> Iterator[tuple[Replicas, str]]:
    """All that `weft serve` has but its options."""

    class Lines(Console):
        def print(self, *objects: Any, **_: Any) -> None:
            lines.append(" ".join(map(str, objects)))

    def opened(site: Site, tell: Progress, **found: Any) -> Engine:
        split = {"ranks": len_of(sites), "layout": "auto"}
        given = {"threads": 1, "max_length": 512, "progress": tell, **options, **sites.place(site)}
        return open_engine(path, **{**split, **found}, **given)

    sites.opened, sites.invited = opened, lambda: None
    client = _client(sites, 64, Lines(), "tested", may_part=True)
    assert isinstance(client, Replicas)
    with in_background(application(client, Settings("tested")), client) as url:
        client.wait()
        yield client, url


def len_of(sites: Sites) -> int:
    """Ranks before anything is divided."""
    return sites.all[0].local + sites.all[0].others


def texts(url: str, count: int) -> set[str]:
    asked = {"prompt": "def main(", "max_tokens": 8, "temperature": 0}
    answers = [httpx2.post(f"{url}/v1/completions", json=asked | {"seed": n}, timeout=60) for n in range(count)]
    return {answer.json()["choices"][0]["text"] for answer in answers}


def test_ranks_of_this_machine_are_divided(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of two sections, from four ranks; the first one's notices say why."""
    monkeypatch.setattr(workers, "chosen", found(packaged, 1, 2, 2))
    lines = list[str]()
    sites = Sites(None, 4, 1, 1, 0)
    with served(packaged, sites, lines) as (replicas, url):
        assert [len(service.engine.config.layout.sections) for service in replicas.services] == [2, 2]
        assert [service.engine.config.ranks for service in replicas.services] == [2, 2]
        assert [site.prefix for site in sites.all] == ["replica 1: ", "replica 2: "]
        configs = [service.engine.config for service in replicas.services]
        assert [(config.replicas, config.replica) for config in configs] == [(2, 0), (2, 1)]
        assert replicas.about.notices[0] == "layout as planted" and replicas.about.replicas == 2
        assert len(texts(url, 4)) == 1
        replicas.check_integrity()


def test_machines_that_joined_are_divided(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, one here: each is a replica then; a machine that stands by takes the place of either one."""
    monkeypatch.setattr(workers, "chosen", found(packaged, 1, 1, 3))
    lines, port, token = list[str](), free_port(), key_of(SECRET).token
    sites = Sites(Hub(f"127.0.0.1:{port}", SECRET), 3, 1, 1, 0)

    def machine() -> Command:
        return Command("worker", "--join", f"127.0.0.1:{port}", WEFT_TOKEN=token)

    with ExitStack() as stack:
        machines = [stack.enter_context(machine()) for _ in range(2)]
        with served(packaged, sites, lines) as (replicas, url):
            assert [site.launcher is None for site in sites.all] == [True, False, False]
            assert [service.engine.config.ranks for service in replicas.services] == [1, 1, 1]
            assert len(texts(url, 6)) == 1
            assert all(each.said.count("starting rank 0") == 1 for each in machines)
            spare = stack.enter_context(machine())
            spare.until("stands by")
            machines[1].end(signal.SIGKILL)
            spare.until("starting rank 0")
            assert len(texts(url, 6)) == 1
            assert any(line.startswith(("replica 2: the ranks are", "replica 3: the ranks are")) for line in lines)
    assert not any("Traceback" in line for line in lines)


def test_what_keeps_a_replica_from_starting_ends_the_start(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left waiting."""
    monkeypatch.setattr(workers, "chosen", found(packaged, 1, 1, 2))
    sites, opened = Sites(None, 2, 1, 1, 0), list[dict[str, Any]]()

    def refusing(site: Site, tell: Progress, **found: Any) -> Engine:
        opened.append(found)
        if len(opened) == 3:
            raise InputError("no more of them")
        split = {"ranks": 2, "layout": "auto"}
        return open_engine(packaged, **{**split, **found}, threads=1, max_length=64, **sites.place(site))

    sites.opened, sites.invited = refusing, lambda: None
    replicas = Replicas([Service(partial(sites.make, sites.all[0]))])
    sites.parted = lambda others: replicas.add([Service(partial(sites.make, site)) for site in others])
    replicas.start()
    with pytest.raises(InputError, match="no more of them"):
        replicas.wait()
    replicas.close()
    assert [each.get("may_part") for each in opened] == [True, None, False]
    assert [each.get("weights") for each in opened] == [None, "float32", "float32"], "as the first one kept them"


def test_ports_that_were_counted_stay_so_many(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several replicas would need more of them than a firewall may let through."""
    monkeypatch.setattr(workers, "chosen", found(packaged, 1, 1, 2))
    port, asked = free_port(), list[bool]()
    with closing(Hub(f"127.0.0.1:{port}", SECRET)) as hub:
        sites = Sites(hub, 2, 1, 1, port + 1)

        def opened(site: Site, tell: Progress, may_part: bool) -> Engine:
            asked.append(may_part)
            raise InputError("enough seen")

        sites.opened, sites.invited = opened, lambda: None
        with pytest.raises(InputError, match="enough seen"):
            sites.make(sites.all[0], lambda what, share: None)
    assert asked == [False]
