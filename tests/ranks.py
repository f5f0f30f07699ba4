"""Ranks as threads of the test's process: the real executor, lanes and transport, without processes to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.execute.programs import lagging
from weft.cache.slabs import Slabs
from weft.execute.draws import Slice
from weft.execute.executor import Executor, Result, Scope
from weft.execute.lanes import ThreadLanes
from weft.layout import Layout
from weft.model.decoder import Decoder
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.kernels.choice import Kernels
from weft.model.opening import open_model
from weft.model.rope import ropes_for
from weft.model.shares import shares_of
from weft.model.weights import load
from weft.parallel.allreduce import gather_columns
from weft.parallel.codec import codec_named
from weft.parallel.direct import Direct
from weft.parallel.gloo import Gloo
from weft.parallel.group import Group
from weft.parallel.handshake import new_key, pair_key
from weft.parallel.mesh import Mesh
from weft.parallel.tls import Identity
from weft.parallel.transport import Transport
from weft.program.batch import Batch, Segment
from weft.program.build import build
from weft.program.check import check
from weft.program.steps import Program
from weft.program.strategy import Strategy
from weft.wires import WIRES

T = TypeVar("T")
SECONDS = 60.0
LOSSY = [(wire, shares) for wire in WIRES[1:] for shares in ((1.0, 1.0), (1.0, 2.0, 1.0))]  # and of how many ranks


class Threads:
    """One persistent thread a rank; `each(work)` runs `work(rank)` on all of them and returns the answers. Ranks that
    wait for each other for ever fail a test, and end with the process."""

    def __init__(self, world: int) -> None:
        self.queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(world)]
        for rank, queue in enumerate(self.queues):
            threading.Thread(target=self._run, args=(rank, queue), name=f"rank-{rank}", daemon=True).start()

    @staticmethod
    def _run(rank: int, queue: SimpleQueue[Any]) -> None:
        while (asked := queue.get()) is not None:
            future, work = asked
            try:
                future.set_result(work(rank))
            except BaseException as error:
                future.set_exception(error)
            del asked, future, work  # what they hold would stay until the next one

    def each(self, work: Callable[[int], T]) -> list[T]:
        futures: list[Future[T]] = [Future() for _ in self.queues]
        for future, queue in zip(futures, self.queues, strict=True):
            queue.put((future, work))
        return [future.result(timeout=SECONDS) for future in futures]

    def close(self) -> None:
        for queue in self.queues:
            queue.put(None)


def meshes(threads: Threads, memory: bool = True, address: str = "127.0.0.1", secured: bool = False) -> list[Mesh]:
    """One a thread, joined; `memory`: ranks share theirs, else they talk over TCP, `secured` by TLS."""
    world, group = len(threads.queues), new_key()
    own = [Identity() if secured else None for _ in range(world)]
    made = [Mesh(address, identity=identity) for identity in own]
    places = [mesh.place if memory else mesh.place._replace(name="") for mesh in made]
    shown = [identity.certificate if identity else b"" for identity in own]
    keys = [[pair_key(group, rank, other) for other in range(world)] for rank in range(world)]
    threads.each(lambda r: made[r].join(r, places, keys[r], certificates=shown))
    return made


@contextmanager
def grouped(world: int, way: str = "shm") -> Iterator[tuple[Threads, list[Group]]]:
    """Threads, and the group of each, by a transport; nothing of it is left."""
    threads, transports = Threads(world), list[Transport]()
    try:
        if way == "gloo":
            store = dist.HashStore()
            transports += [Gloo(rank, store) for rank in range(world)]
        else:
            transports += [Direct(mesh) for mesh in meshes(threads, way == "shm", secured=way == "tls")]
        yield threads, threads.each(lambda rank: Group(transports[rank], range(world)))
    finally:
        for transport in transports:
            transport.close()
        threads.close()


class Ranks:
    """A model split over some ranks; with `times`, so many groups of such ranks, the last of which has the vocabulary:
    what a program with steps for some ranks goes through. `layers`: how many each of several sections has, whose ranks
    are one each, or those of `shares`, a section's after the other's."""

    def __init__(
        self, directory: Path, shares: Sequence[float] | Sequence[Sequence[float]], exact_rows: bool = False,
        slots: int = 4, lags: Sequence[int] = (0, 0), times: int = 1, layers: Sequence[int] = (),
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        self.config = model_config(directory)
        self.blueprint = blueprint_of(self.config)
        self.outline = lagging(self.blueprint.outline, *lags) if any(lags) else self.blueprint.outline
        self.layout = (
            Layout(tuple(layers), tuple(map(tuple, shares))) if layers else Layout.tensor(self.config.layers, shares)
        )
        self.shares = shares_of(self.blueprint, self.layout)
        self.world = world = self.layout.world * times
        self.widths = [len(share.ranges["vocabulary"]) if share.ends else 0 for share in self.shares]
        self.widths = [0] * (world - len(self.widths)) + self.widths
        self.threads, self.broken = Threads(world), False  # by a run that failed: ranks may wait for each other then
        self.transports = [Direct(mesh) for mesh in meshes(self.threads)] if world > 1 else []

        def rank(r: int) -> tuple[Decoder, Executor, Slabs]:
            share = self.shares[r % len(self.shares)]
            weights = load(open_model(directory, self.config), self.blueprint, share, kernels=Kernels(exact_rows))
            ropes = ropes_for(self.config, self.blueprint)
            decoder = Decoder(self.blueprint, share, weights, ropes, exact_rows)
            group = Group(self.transports[r] if world > 1 else None, range(world))
            executor = Executor(decoder, self.outline, group, ThreadLanes(torch.no_grad), Slice.of(r, self.widths))
            heads = len(share.kv_heads)
            slabs = Slabs(slots, len(share.layers), heads, self.config.max_length, self.config.head_dim)
            return decoder, executor, slabs

        self.parts = self.threads.each(rank)

    def plan(self, batch: Batch, strategy: str, granule: int = 1) -> Program:
        """The checked program of a strategy."""
        program = build(Strategy.parse(strategy), self.outline, batch, granule, self.layout)
        check(program, self.outline, batch, self.world)
        return program

    def run(
        self, batch: Batch, tokens: Sequence[int], program: Program | str, wire: str = "exact",
        scope: Scope = Scope.BOTH,
    ) -> list[Result]:  # fmt: skip
        """One forward pass on all ranks; asserts that their hidden states agree after every collective."""
        chosen = self.plan(batch, program) if isinstance(program, str) else program

        def rank(r: int) -> Result:
            decoder, executor, slabs = self.parts[r]
            forward = decoder.begin(batch, tokens, slabs)
            result = executor.run(chosen, forward, codec_named(wire), scope, checksums=True)
            if result.logits is None:
                return result
            ends = self.layout.sections[-1].ranks if self.layout.several else ()
            widths = [self.widths[each] for each in ends or range(self.world)]
            return replace(result, logits=gather_columns(executor.group.on("whole", ends), result.logits, widths))

        try:
            results = self.threads.each(rank)
        except BaseException:
            self.broken = True
            raise
        if self.layout.several:  # the rank that has all columns
            results = [*results[self.layout.leader :], *results[: self.layout.leader]]
        seen: dict[int, int] = {}
        for result in results:
            for number, checksum in result.checksums.items():
                assert seen.setdefault(number, checksum) == checksum, "ranks differ after a collective"
        return results

    def logits(self, prompts: Sequence[Sequence[int]], program: Program | str, wire: str = "exact") -> Any:
        """Logits [prompts, vocabulary] of a batch of new prompts."""
        segments = tuple(Segment(slot, 0, len(prompt)) for slot, prompt in enumerate(prompts))
        flat = [token for prompt in prompts for token in prompt]
        return self.run(Batch(segments), flat, program, wire)[0].logits

    def greedy(self, prompts: Sequence[Sequence[int]], program: str, tokens: int) -> tuple[Any, list[list[int]]]:
        """Logits after the prompts, and the greedy tokens that follow each."""
        first = logits = self.logits(prompts, program)
        lengths, outputs = [len(prompt) for prompt in prompts], [[] for _ in prompts]
        for step in range(tokens):
            new = logits.argmax(dim=1).tolist()
            for output, token in zip(outputs, new, strict=True):
                output.append(token)
            if step < tokens - 1:
                segments = tuple(Segment(slot, length + step, 1) for slot, length in enumerate(lengths))
                logits = self.run(Batch(segments), new, program)[0].logits
        return first, outputs

    def check_integrity(self) -> None:
        """Of every rank's key/value memory."""
        for _, _, slabs in self.parts:
            slabs.check_integrity()

    def close(self) -> None:
        self.threads.each(lambda r: self.parts[r][1].lanes.close())
        for transport in self.transports:
            transport.close()
        self.threads.close()
