"""Where `weft serve`'s replicas have their ranks, here and on machines that join; and how one engine becomes several,
where `--layout auto` finds that better. Knows options, launchers and engines; knows nothing of HTTP."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import TaskID

from weft.choosing import Apart
from weft.config import ModelConfig
from weft.engine import Engine
from weft.errors import InputError
from weft.hub import locate
from weft.launch.hub import Hub
from weft.launch.joined import JoinedLauncher
from weft.launch.launcher import TOKEN_VARIABLE
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.opening import GIVEN
from weft.plan.layouts import LATENCY
from weft.program.strategy import AUTO
from weft.workers import Progress

FOR_OTHERS = "--rank-ports, --local-ranks, --check-content and --plain-data"


@dataclass(eq=False)
class Site:
    """Of one replica: ranks on this machine, ranks elsewhere and how those are started; what its lines begin with."""

    local: int
    others: int
    launcher: JoinedLauncher | None
    prefix: str = ""
    told: Callable[[str], None] = lambda line: None
    task: TaskID | None = None  # on the terminal, while it starts

    def become(self, other: Site) -> None:
        """Takes its ranks, and goes on telling whom it told."""
        self.local, self.others, self.prefix = other.local, other.others, other.prefix
        self.launcher = other.launcher
        self.tells(self.told)

    def tells(self, told: Callable[[str], None]) -> None:
        """Whom its launcher tells what goes on."""
        self.told = told
        if self.launcher is not None:
            self.launcher.told = told


def joining(
    address: str | None, ranks: int | Literal["auto"], replicas: int, local: int, ports: int, others: bool
) -> AbstractContextManager[Hub | None]:  # fmt: skip
    """The hub at which other machines join, if they do; closed at the end. `others`: one more option was given that is
    for machines that join alone. Raises `InputError` for what doesn't go together."""
    if address is None:
        if ports or local != 1 or others:
            raise InputError(f"{FOR_OTHERS} are for ranks on other machines: give --join-address too")
        return nullcontext()
    if ranks == "auto":
        raise InputError("--tp auto is for one machine; with --join-address give the number of ranks, as in --tp 2")
    if not 0 <= local < ranks * replicas:
        raise InputError(
            f"--local-ranks {local} of {ranks * replicas} leaves no rank for another machine; give --tp, --pp or "
            "--replicas more"
        )
    return closing(Hub(address, os.environ.get(TOKEN_VARIABLE)))


class Sites:
    """All replicas' sites, of `ranks` ranks each; this machine's `local` ones go to the first. `ports`: that ranks use
    here, if machines join at a hub. `invited` is called before the first engine is opened; `opened` opens the engine of
    a site; `parted` is told of replicas that are added."""

    def __init__(self, hub: Hub | None, ranks: int | Literal["auto"], replicas: int, local: int, ports: int) -> None:
        self.hub, self._local, self._ports = hub, local, ports
        self.split: dict[str, Any] = {}  # options of `open_engine` that were found here
        self.invited: Callable[[], None]
        self.opened: Callable[..., Engine]
        self.parted: Callable[[list[Site]], None] = lambda sites: None
        self.all = list(self._of(1 if ranks == "auto" else ranks, replicas))

    def _of(self, ranks: int, replicas: int) -> Iterator[Site]:
        """So many replicas of so many ranks."""
        local = self._local if self.hub is not None else ranks * replicas
        ports = self._ports
        for number in range(1, replicas + 1):
            here = min(local, ranks)
            launcher, local = None, local - here
            if self.hub is not None and here < ranks:
                launcher = JoinedLauncher(self.hub, here, ports)
                ports += here + 1 if ports else 0
            yield Site(here, ranks - here, launcher, f"replica {number}: " if replicas > 1 else "")

    def make(self, site: Site, tell: Progress) -> Engine:
        """The engine of a site; of the first of several, where these are found to be better than one."""
        if site is self.all[0]:
            self.invited()
        may_part = not self.split and len(self.all) == 1 and not self._ports  # whose number somebody has thought of
        engine = self.opened(site, tell, **self.split, may_part=may_part)
        decision = engine.workers.decision
        if decision is None or decision.apart is None:
            return engine
        try:
            own, *others = self._part(engine, decision.apart)
        finally:
            engine.close()
        self.all += others
        site.become(own)
        self.parted(others)
        engine = self.opened(site, tell, **self.split)
        engine.notices.insert(0, decision.line)
        return engine

    def _part(self, engine: Engine, apart: Apart) -> list[Site]:
        """Sites of the replicas that take an engine's place, and keep weights as it does; they are in the hub before
        it has left."""
        layout, sections = apart.layout, len(apart.layout.sections)
        self.split = {
            "ranks": layout.world // sections, "sections": sections, "layers": AUTO if sections > 1 else None,
            "layout": GIVEN, "optimise": LATENCY, "weights": engine.config.weights,
        }  # fmt: skip
        return list(self._of(layout.world, apart.replicas))

    def place(self, site: Site) -> dict[str, Any]:
        """Options of its engine that say where it is, among those that have ranks on this machine."""
        here = [each for each in self.all if each.local]
        return {
            "launcher": site.launcher, "replicas": len(here) if site.local else 1,
            "replica": here.index(site) if site.local else 0,
        }  # fmt: skip

    def invite(self, out: Console, model: str | None, demand: Callable[[ModelConfig], object]) -> None:
        """Says what to run on other machines, if some are to join; nobody is invited to what can't run. `demand` raises
        `InputError` where options don't go with the model."""
        if self.hub is None:
            return
        config = model_config(locate(model))
        blueprint_of(config)
        demand(config)
        at_the_hub = model is not None and not Path(model).exists()
        named = f" {shlex.quote(model)}" if model is not None and at_the_hub else ""
        command = f"{TOKEN_VARIABLE}={self.hub.token} weft worker --join {shlex.quote(self.hub.address)}{named}"
        others = sum(site.others for site in self.all)
        out.print(f"on {others} other machine{'s' if others > 1 else ''}, run:")
        out.print(f"  {command}", markup=False, soft_wrap=True)
        if model is not None and not at_the_hub:
            out.print(
                "with where the model is behind it, if it is elsewhere there; without the model it comes from here"
            )
