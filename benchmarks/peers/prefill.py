"""The same prefill by weft and by Hugging Face transformers: model, threads, cores and shaped link are the same.

    python benchmarks/peers/prefill.py                           483 M parameters, 512 tokens, unshaped and balance
    python benchmarks/peers/prefill.py --link none,200mbit --rounds 7 --json peers.json
    python benchmarks/peers/prefill.py --shared --link 200mbit   both directions in 200 Mbit/s

Six contestants, one after the other in every round, all kept loaded: weft on two ranks of one thread, serial,
overlapped, and as it plans itself where sums may travel as int8; transformers with tp_plan="auto" (torchrun, gloo) on
two ranks of one thread in the same two network namespaces, behind the same link; weft and transformers on one process
of two threads. Needs root and iproute2. The greedy tokens must agree where sums are exact. Figures are medians, ratios
medians of per-round ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from models import random_model
from rich.console import Console
from rich.table import Table

from weft import LLM
from weft.balance import balance
from weft.bench.machine import describe
from weft.execute.results import RunOptions
from weft.launch.namespaces import NamespaceLauncher
from weft.links import links_of
from weft.program.batch import one_prompt
from weft.timeline.timeline import median
from weft.wires import needed

RANK = Path(__file__).with_name("rank.py")
CHOSEN = "auto:int8"
PORT = 29411  # inside the namespaces, where nothing else listens


class Weft:
    """A loaded engine, one strategy and one wire. Seconds are those of the slowest rank's program."""

    def __init__(self, llm: LLM, overlap: str, wire: str = "exact") -> None:
        self.engine, self.overlap, self.wire = llm.engine, overlap, wire

    def prefill(self, ids: list[int]) -> tuple[float, int]:
        """Seconds and the token that follows."""
        batch = one_prompt(len(ids))
        plan = self.engine.planner.like(self.overlap, self.wire).plan(batch)
        result = self.engine.probe(batch, ids, plan, RunOptions())
        return result.seconds, result.chosen[0].token


class Transformers:
    """Its processes, each in a namespace of `launcher` or, without one, a single one where this process is."""

    def __init__(self, model: Path, launcher: NamespaceLauncher | None) -> None:
        path = Path(tempfile.mkdtemp(prefix="weft-peers-")) / "control"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(1.0)
        count = 2 if launcher else 1
        self.children = [
            subprocess.Popen(_command(model, path, launcher, rank), start_new_session=True) for rank in range(count)
        ]
        self.ranks = [self._accept(listener).makefile("rw") for _ in range(count)]
        for rank in self.ranks:
            assert json.loads(rank.readline())["ready"]
        listener.close()

    def _accept(self, listener: socket.socket) -> socket.socket:
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if any(child.poll() is not None for child in self.children):
                    self.ranks = []
                    self.close()
                    sys.exit("transformers ended while it loaded the model; is weft[peers] installed?")

    def prefill(self, ids: list[int]) -> tuple[float, int]:
        """Seconds of the slowest rank and the token that follows."""
        for rank in self.ranks:
            print(json.dumps(ids), file=rank, flush=True)
        answers = [json.loads(rank.readline()) for rank in self.ranks]
        return max(answer["seconds"] for answer in answers), answers[0]["token"]

    def close(self) -> None:
        """Ends the processes: ranks when nobody talks to them any more, torchrun's agents now."""
        for rank in self.ranks:
            rank.close()
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _command(model: Path, path: Path, launcher: NamespaceLauncher | None, rank: int) -> list[str]:
    common = ["--model", str(model), "--socket", str(path)]
    if launcher is None:
        return ["env", "OMP_NUM_THREADS=2", sys.executable, str(RANK), *common, "--cores", "0,1"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
    torchrun += [f"--master-addr={launcher.data_address(0)}", f"--master-port={PORT}"]
    environment = ["env", "OMP_NUM_THREADS=1", f"GLOO_SOCKET_IFNAME={launcher.interface(rank)}"]
    return [*launcher.prefix(rank), *environment, sys.executable, *torchrun, str(RANK), *common, "--cores", str(rank)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="483m", help="a size of benchmarks/models.py")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--link", default="none,1x", help="as for weft bench")
    parser.add_argument("--overlap", default="iso:2/4")
    parser.add_argument("--shared", action="store_true", help="both directions share the link's rate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, results = random_model(given.model), []
    ids = torch.randint(1, 8000, (given.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with ExitStack() as stack:
        launcher = NamespaceLauncher(shared=given.shared)
        options = {"max_model_len": given.tokens + 1, "max_num_seqs": 1, "enable_prefix_caching": False}
        split = LLM(model, tensor_parallel_size=2, num_threads=1, cores=(0, 1), launcher=launcher, **options)
        stack.callback(split.close)
        alone = LLM(model, num_threads=2, cores=(0, 1), **options)
        stack.callback(alone.close)
        contestants = {
            "weft, 2 ranks, serial": Weft(split, "serial"),
            f"weft, 2 ranks, {given.overlap}": Weft(split, given.overlap),
            f"weft, 2 ranks, auto, {CHOSEN}": Weft(split, "auto", CHOSEN),
            "transformers, 2 ranks, tp_plan": Transformers(model, launcher),
            "weft, 1 process": Weft(alone, "serial"),
            "transformers, 1 process": Transformers(model, None),
        }
        for contestant in contestants.values():
            if isinstance(contestant, Transformers):
                stack.callback(contestant.close)
        plan = split.engine.planner.like("serial", "exact").plan(one_prompt(len(ids)))

        def seconds(scope: str) -> float:
            return split.engine.probe(one_prompt(len(ids)), ids, plan, RunOptions(scope)).seconds

        for link in links_of(given.link):
            there = link if link.times is None else link.at(link.times * balance(seconds, launcher.shape))
            launcher.shape(there.rate)
            split.engine.calibrate(needed(CHOSEN))
            rounds = measure(contestants, ids, given.rounds)
            shown = f"{there}, shared" if given.shared else str(there)
            show(f"{given.model}, {given.tokens} tokens, link {shown}", rounds)
            results.append({"link": shown, "balance": link.times, "rounds": rounds})
        machine = describe(split.engine.model, 1)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "results": results}) + "\n")


def measure(contestants: dict[str, Weft | Transformers], ids: list[int], rounds: int) -> list[dict[str, float]]:
    """Seconds by contestant for each round; one round more to warm up is not counted."""
    kept = []
    for _ in range(rounds + 1):
        answers = {name: contestant.prefill(ids) for name, contestant in contestants.items()}
        tokens = {token for name, (_, token) in answers.items() if CHOSEN not in name}
        assert len(tokens) == 1, f"they don't agree on the next token: {tokens}"
        kept.append({name: seconds for name, (seconds, _) in answers.items()})
    return kept[1:]


def show(title: str, rounds: list[dict[str, float]]) -> None:
    """One link's table: each against transformers' tensor parallelism, and against weft on one process."""
    table = Table(title=f"{title}; medians of {len(rounds)} rounds")
    for column in ("", "seconds", "of transformers' 2 ranks", "of weft's 1 process"):
        table.add_column(column, justify="left" if not column else "right")
    for name in rounds[0]:
        peer, alone = (
            median(r[name] / r[other] for r in rounds)
            for other in ("transformers, 2 ranks, tp_plan", "weft, 1 process")
        )
        table.add_row(name, f"{median(r[name] for r in rounds):.3f}", f"{peer:.2f}", f"{alone:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
