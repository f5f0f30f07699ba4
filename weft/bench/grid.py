"""`weft bench`: measures a grid of tokens, ranks, links, strategies and wires, point by point.

Knows engines, launchers and comparisons; knows nothing of how results are shown. What is measured stays measured:
an interruption ends the grid, and the rounds until then are its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from weft.bench.machine import cores_of, prefill_flops
from weft.compare import Comparing, Measured, Variant
from weft.config import ModelConfig, available_cores, demand_way, laid_out, positive
from weft.engine import Engine
from weft.errors import InputError
from weft.launch.namespaces import NamespaceLauncher
from weft.layout import Layout
from weft.links import NO_LINK, Link
from weft.opening import open_engine
from weft.plan.calibrate import MOST
from weft.program.batch import Batch, Segment
from weft.program.strategy import AUTO, Strategy, canonical
from weft.wires import needed

FEW_SLOTS = 16  # sequences that calibration likes to have


@dataclass(frozen=True)
class Grid:
    """What to measure: every combination. `prompts`: that a batch's tokens are divided over, `mixed`: at random.
    `weights`: what weights are kept in. `ranks`: of each of the `sections` of a pipeline, `layers`: that each of these
    has."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    links: tuple[Link, ...]
    overlaps: tuple[str, ...]
    wires: tuple[str, ...]
    prompts: int = 1
    mixed: bool = False
    rounds: int = 5
    threads: int | None = None
    shares: tuple[float, ...] | None = None
    transport: str = "auto"
    weights: str = "auto"
    sections: int = 1
    layers: tuple[int, ...] | None = None

    def demand(self, model: ModelConfig) -> None:
        """Raises `InputError` for what can't be measured with this model on this machine, before anything starts."""
        for name, number in (("--prompts", self.prompts), ("--rounds", self.rounds), ("--threads", self.threads)):
            positive(number, name)
        for tokens in self.tokens:
            positive(tokens, "--tokens")
            if tokens > model.max_length * self.prompts:
                raise InputError(
                    f"--tokens {tokens} is more than the model's context of {model.max_length}"
                    + (f" for each of {self.prompts} prompts" if self.prompts > 1 else "")
                )
            if tokens < self.prompts:
                raise InputError(f"--tokens {tokens} can't be divided over {self.prompts} prompts")
        for ranks in self.ranks:
            laid_out(model.layers, ranks, self.sections, self.layers, self.shares)
            self._demand_cores(ranks)
        for link in self.links:
            demand_way(self.transport, link)
        if self.shaped and any(link.paced for link in self.links):
            raise InputError("--link: paced links and shaped ones can't be measured in one run; write shaped: with all")
        for overlap in self.overlaps:
            if overlap != AUTO and Strategy.parse(overlap).requests and self.prompts == 1:
                raise InputError(f"--overlap {overlap} cuts between prompts, and there is one; give --prompts 2")

    def _demand_cores(self, ranks: int) -> None:
        world = ranks * self.sections
        threads, asked = (
            self.threads_of(world),
            f"--tp {ranks}" + (f" --pp {self.sections}" if self.sections > 1 else ""),
        )
        if world * threads > available_cores():
            raise InputError(
                f"{asked} with {threads} thread{'s' if threads > 1 else ''} a rank needs {world * threads} "
                f"cores, and {available_cores()} are there: ranks that share cores measure each other"
            )

    def threads_of(self, world: int) -> int:
        """Of each of so many ranks."""
        return self.threads or max(1, available_cores() // world)

    @property
    def variants(self) -> list[Variant]:
        """Strategies on wires."""
        return [Variant(canonical(overlap), wire) for wire in self.wires for overlap in self.overlaps]

    @property
    def wires_needed(self) -> tuple[str, ...]:
        """All on which anything travels, serial with all sums exact included where wires are chosen."""
        chosen = ("exact",) if any(variant.like != variant.wire for variant in self.variants) else ()
        return tuple(dict.fromkeys([*chosen, *(each for wire in self.wires for each in needed(wire))]))

    @property
    def shaped(self) -> bool:
        """True if links are, by the kernel."""
        return any(link.shaped for link in self.links)

    @property
    def emulated(self) -> bool:
        """True if there is a link that is not as it is."""
        return not all(link.free for link in self.links)


@dataclass(frozen=True)
class Point:
    """One place of the grid and what was measured there. `balance`: the link's speed over the balance speed;
    `ranks`: all of the `layout`."""

    tokens: int
    ranks: int
    prompts: int
    link: str
    balance: float | None
    gflops: float
    measured: list[Measured]
    layout: Layout

    @property
    def best(self) -> Measured:
        """The fastest variant but serial, if there is another."""
        others = [m for m in self.measured if m.overlap != "serial"] or self.measured
        return min(others, key=lambda m: m.median)

    def serial(self, wire: str) -> Measured:
        """Serial on this wire."""
        return next(m for m in self.measured if m.overlap == "serial" and m.wire == wire)

    def as_json(self) -> Iterator[dict[str, Any]]:
        """One entry a variant, times in seconds."""
        for measured in self.measured:
            plain = {name: value for name, value in asdict(measured).items() if "timeline" not in name}
            yield {
                "tokens": self.tokens, "ranks": self.ranks, "tp": len(self.layout.shares[0]),
                "pp": len(self.layout.layers), "layers": list(self.layout.layers), "prompts": self.prompts,
                "link": self.link, "balance": self.balance, "gflops": round(self.gflops, 1),
                **plain, "median": measured.median, "above_ceiling": measured.above_ceiling,
            }  # fmt: skip


class Bench:
    """A grid under measurement; `points` grows. `watch(done, all, text)` is called before everything that takes time.

    `done` and `all` are tokens that were and will be computed.
    """

    def __init__(
        self, path: Path, model: ModelConfig, grid: Grid, watch: Callable[[int, int, str], None],
        kept: Callable[[Sequence[Point]], None] = lambda points: None,
    ) -> None:  # fmt: skip
        grid.demand(model)
        self.path, self.model, self.grid, self.watch, self.kept = path, model, grid, watch, kept
        self.points: list[Point] = []
        self._done = 0

    def run(self) -> None:
        """Measures all points; `kept` is called after each. Whatever ends it early, `points` holds what there is."""
        for ranks in self.grid.ranks:
            with self._started(ranks) as (engine, launcher):
                for tokens in self.grid.tokens:
                    batch, ids = self._batch(tokens)
                    rate = self._balance(engine, batch, ids)
                    for link in self._links(ranks):
                        self._point(engine, launcher, batch, ids, link, rate)

    def _links(self, ranks: int) -> Sequence[Link]:
        return self.grid.links if ranks * self.grid.sections > 1 else (NO_LINK,)

    @contextmanager
    def _started(self, ranks: int) -> Iterator[tuple[Engine, NamespaceLauncher | None]]:
        grid = self.grid
        world = ranks * grid.sections
        threads = grid.threads_of(world)
        self.watch(self._done, self._all, f"starting {world} rank{'s' if world > 1 else ''}")
        launcher = NamespaceLauncher() if grid.shaped and world > 1 else None
        length = min(self.model.max_length, max(grid.tokens) + MOST)
        engine = open_engine(
            self.path, ranks=ranks, sections=grid.sections, layers=grid.layers, threads=threads,
            launcher=launcher, shares=grid.shares,
            cores=cores_of(world, threads) if grid.emulated and world > 1 else None,
            transport="tcp" if grid.emulated and grid.transport == "auto" else grid.transport, max_length=length,
            overlap="serial", max_sequences=max(grid.prompts, FEW_SLOTS), prefixes=False, weights=grid.weights,
        )  # fmt: skip
        with closing(engine):
            yield engine, launcher

    def _batch(self, tokens: int) -> tuple[Batch, list[int]]:
        """As many prompts as asked for, with random ids; of like lengths, or of any if mixed ones were asked for."""
        random, prompts = Random(0), self.grid.prompts
        if self.grid.mixed:
            edges = [0, *sorted(random.sample(range(1, tokens), prompts - 1)), tokens]
        else:
            edges = [tokens * i // prompts for i in range(prompts + 1)]
        segments = (Segment(i, 0, stop - start) for i, (start, stop) in enumerate(pairwise(edges)))
        return Batch(tuple(segments)), [random.randrange(self.model.vocabulary) for _ in range(tokens)]

    def _balance(self, engine: Engine, batch: Batch, ids: list[int]) -> float | None:
        times = next((link for link in self.grid.links if link.times is not None), None)
        if times is None or engine.config.ranks == 1:
            return None
        self.watch(self._done, self._all, f"{batch.tokens} tokens: looking for the balance")
        plan = engine.planner.like("serial", "exact").plan(batch)
        return engine.workers.balance(times, batch, ids, plan)

    def _point(
        self, engine: Engine, launcher: NamespaceLauncher | None, batch: Batch, ids: list[int], link: Link,
        rate: float | None,
    ) -> None:  # fmt: skip
        grid, ranks = self.grid, engine.config.ranks
        there = link if link.times is None or rate is None else link.at(rate * link.times)
        text = "none, by TCP" if there.free and grid.emulated else str(there)
        if grid.emulated and ranks > 1:
            engine.workers.controller.set_link(there)
        if ranks > 1:
            self.watch(self._done, self._all, f"{batch.tokens} tokens, {ranks} ranks, link {text}: measuring costs")
            engine.calibrate(grid.wires_needed)
        comparing = Comparing(engine, batch, ids, grid.variants, launcher.sent if launcher else None)
        try:
            for number in range(grid.rounds + 1):
                what = f"round {number} of {grid.rounds}" if number else "warming up"
                self.watch(self._done, self._all, f"{batch.tokens} tokens, {ranks} ranks, link {text}: {what}")
                comparing.round()
                self._done += batch.tokens
        finally:
            if comparing.rounds:
                measured = comparing.result()
                flops = prefill_flops(self.model, batch.tokens) * max(engine.config.layout.parts)  # the largest rank's
                gflops = flops / measured[0].compute_alone / 1e9
                layout = engine.config.layout
                point = Point(batch.tokens, ranks, grid.prompts, text, link.times, gflops, measured, layout)
                self.points.append(point)
                self.kept(self.points)

    @property
    def _all(self) -> int:
        rounds = sum(len(self._links(ranks)) for ranks in self.grid.ranks) * (self.grid.rounds + 1)
        return sum(self.grid.tokens) * rounds
