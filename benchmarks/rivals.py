"""Are the rivals of ISO honest? `tiles` and `requests` against the same schedules written by hand.

    python benchmarks/rivals.py                  two one-core ranks, h1024, link at 430 Mbit/s
    python benchmarks/rivals.py --link 860mbit --rounds 9

A schedule by hand is a loop over the layers, as an engine that knew nothing but this one technique would have it: no
program, no checks, no planner, a plain thread pool for messages. Both run in the same two processes on the same
weights, one after the other in every round; the ratio is the median of per-round ratios. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from models import random_model
from rich.console import Console
from rich.table import Table

from weft.bench.machine import describe
from weft.cache.slabs import Slabs
from weft.execute.executor import Executor
from weft.execute.lanes import ThreadLanes
from weft.execute.process import keep_freed_memory
from weft.execute.sampler import likeliest
from weft.launch.namespaces import NamespaceLauncher
from weft.links import Link
from weft.model.decoder import Decoder
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.forward import Extent, Forward
from weft.model.opening import open_model
from weft.model.rope import ropes_for
from weft.model.shares import tensor_shares
from weft.model.weights import load
from weft.parallel.allreduce import all_reduce, swap
from weft.parallel.codec import codec_named
from weft.parallel.direct import Direct
from weft.parallel.group import Group
from weft.parallel.listening import Place
from weft.parallel.mesh import Mesh
from weft.program.batch import Batch, Rows, Segment
from weft.program.build import build
from weft.program.strategy import Strategy
from weft.timeline.timeline import median

EXACT = codec_named("exact")
PORT, KEY = 29412, b"inside the namespaces, where nobody else is"


class ByHand:
    """A rank's forward pass in two techniques, each written out."""

    def __init__(self, decoder: Decoder, group: Group, vocabulary: list[int]) -> None:
        self.decoder, self.group, self.vocabulary = decoder, group, vocabulary
        self.pool = ThreadPoolExecutor(1)

    def tiles(self, forward: Forward, count: int) -> torch.Tensor:
        """Every stage whole; its last projection in tiles, each summed while the next one is computed."""
        tokens = forward.batch.tokens
        whole = extent(0, tokens)
        hidden = self._embed(forward)
        edges = [round(tokens * i / count) for i in range(count + 1)]
        for stage in self._layers():
            features = stage.body(forward, whole, stage.enter(forward, whole, hidden))
            sums = []
            for start, stop in pairwise(edges):
                partial = stage.tail(forward, extent(start, stop), features)
                sums.append((start, stop, partial, self.pool.submit(self._sum, partial)))
            for start, stop, partial, under_way in sums:
                under_way.result()
                hidden[start:stop] += partial
        return self._logits(forward, hidden)

    def requests(self, forward: Forward) -> torch.Tensor:
        """Stage after stage, one sequence after the other: one's sum travels while the other one computes."""
        hidden = self._embed(forward)
        sums: dict[Rows, tuple[torch.Tensor, Future[torch.Tensor]]] = {}
        for stage in self._layers():
            for rows in forward.batch.spans:
                mine = hidden[rows.start : rows.stop]
                if rows in sums:
                    partial, under_way = sums[rows]
                    under_way.result()
                    mine += partial
                here = extent(*rows)
                partial = stage.tail(forward, here, stage.body(forward, here, stage.enter(forward, here, mine)))
                sums[rows] = partial, self.pool.submit(self._sum, partial)
        for rows, (partial, under_way) in sums.items():
            under_way.result()
            hidden[rows.start : rows.stop] += partial
        return self._logits(forward, hidden)

    @torch.inference_mode()
    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        return all_reduce(self.group, EXACT, partial)

    def _layers(self) -> list:  # type: ignore[type-arg]
        return [stage for (_, layer), stage in self.decoder.stages.items() if layer is not None]

    def _embed(self, forward: Forward) -> torch.Tensor:
        embed = self.decoder.stages["embed", None]
        return embed.body(forward, extent(0, forward.batch.tokens), torch.empty(0))

    def _logits(self, forward: Forward, hidden: torch.Tensor) -> torch.Tensor:
        head, batch = self.decoder.stages["head", None], forward.batch
        wanted = extent(0, len(batch.wanted_rows))
        logits = head.tail(forward, wanted, head.enter(forward, wanted, hidden[list(batch.wanted_rows)]))
        swap(self.group, likeliest(logits, sum(self.vocabulary[: self.group.rank])))
        return logits


def extent(start: int, stop: int) -> Extent:
    """Rows of which all leave."""
    return Extent(Rows(start, stop), Rows(start, stop))


@torch.inference_mode()
def rank(given: argparse.Namespace) -> None:
    """One of the two: measures and leaves its seconds in a file."""
    number = int(given.address.rpartition(".")[2]) - 1  # its place in the namespaces' subnet
    os.sched_setaffinity(0, {number})
    torch.set_num_threads(1)
    model = random_model(given.model)
    config = model_config(model)
    blueprint = blueprint_of(config)
    shares = tensor_shares(blueprint, (1.0, 1.0))
    weights = load(open_model(model, config), blueprint, shares[number])
    decoder = Decoder(blueprint, shares[number], weights, ropes_for(config, blueprint))
    mesh = Mesh(given.address, PORT)
    subnet = given.address.rpartition(".")[0]
    mesh.join(number, [Place(f"{subnet}.{place}", PORT, "") for place in (1, 2)], [KEY, KEY])
    group = Group(Direct(mesh), range(2))
    vocabulary = [len(share.ranges["vocabulary"]) for share in shares]
    slabs = Slabs(2, config.layers, len(shares[number].kv_heads), given.tokens, config.head_dim, torch.float32, "cpu")
    outline = replace(blueprint.outline, narrows=False)  # as by hand: all rows go through all layers
    executor = Executor(decoder, outline, group, ThreadLanes(torch.inference_mode), vocabulary)
    hand = ByHand(decoder, group, vocabulary)
    keep_freed_memory()
    ids = torch.randint(0, config.vocabulary, (given.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    half = given.tokens // 2
    pair = Batch((Segment(0, 0, half), Segment(1, 0, given.tokens - half)))
    cases = {
        "tiles:4": (Batch((Segment(0, 0, given.tokens),)), lambda forward: hand.tiles(forward, 4)),
        "requests:2": (pair, hand.requests),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(given.rounds + 1):
        for name, (batch, written) in cases.items():
            program = build(Strategy.parse(name), outline, batch)
            times, logits = [], []
            for run in (lambda f, p=program: executor.run(p, f, EXACT).logits, written):
                group.barrier()
                begin = time.perf_counter()
                logits.append(run(decoder.begin(batch, ids, slabs)))
                times.append(time.perf_counter() - begin)
            assert torch.equal(*logits), f"{name}: not the same logits"
            seconds[name].append((times[0], times[1]))
    Path(f"{given.join}.{number}").write_text(json.dumps({name: pairs[1:] for name, pairs in seconds.items()}))


def main() -> None:
    """Starts the ranks and prints what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h1024", help="a size of benchmarks/models.py")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--link", default="430mbit")
    parser.add_argument("--join", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)  # each is in a network of its own: PORT is free
    given = parser.parse_args()
    if given.join:
        rank(given)
        return
    model = random_model(given.model)
    options = [f"--{name}={getattr(given, name)}" for name in ("model", "tokens", "rounds", "link")]
    launcher, out = (
        NamespaceLauncher(Link.parse(given.link).rate),
        Path(tempfile.mkdtemp(prefix="weft-rivals-")) / "seconds",
    )
    launcher.command = (sys.executable, __file__, *options)  # this file's ranks instead of weft's workers
    try:
        launcher.start(1, str(out), ["", ""])
        while len(dead := launcher.dead()) < 2:
            time.sleep(0.1)
        if not Path(f"{out}.0").is_file():
            sys.exit("; ".join(dead))
    finally:
        launcher.stop()
    both = [json.loads(Path(f"{out}.{number}").read_text()) for number in range(2)]
    table = Table(title=f"{given.model}, {given.tokens} tokens, link {given.link}; medians of {given.rounds} rounds")
    for column in ("", "weft's program, s", "by hand, s", "of it"):
        table.add_column(column, justify="left" if not column else "right")
    for name in both[0]:
        pairs = [
            tuple(map(max, zip(*of_ranks, strict=True))) for of_ranks in zip(*(b[name] for b in both), strict=True)
        ]
        ratio = median(a / b for a, b in pairs)
        table.add_row(name, f"{median(a for a, _ in pairs):.3f}", f"{median(b for _, b in pairs):.3f}", f"{ratio:.2f}")
    Console(width=100).print(table)
    machine = describe(model_config(model), 1)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
