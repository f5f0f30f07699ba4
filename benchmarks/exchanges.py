"""What a sum of two ranks takes, against a bare program that does the same by hand, and against gloo.

    python benchmarks/exchanges.py [--rounds 7] [--sizes 2048,8192,1048576] [--json FILE]

Two processes, one core and one thread each, over loopback. All ways run in turns within each round. "bare" is what
anybody would write: through memory, copy, raise a counter, look at the other's until it is raised, copy, add; over TCP,
sendall and recv_into on blocking sockets (from 256 KiB on a thread sends), add. weft's are its own sums, by its groups;
bytes are those of exact sums. Median and 99th percentile of all rounds in µs, and processor time of one rank.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from weft.config import processor_name
from weft.execute.process import keep_freed_memory
from weft.parallel.allreduce import all_reduce
from weft.parallel.codec import codec_named
from weft.parallel.direct import Direct
from weft.parallel.gloo import Gloo, host_store, join_store
from weft.parallel.group import Group
from weft.parallel.handshake import new_key, pair_key
from weft.parallel.listening import Place
from weft.parallel.mesh import Mesh
from weft.parallel.tls import Identity

SIZES = "2048,8192,131072,1048576,8388608"
REGION = 64 << 20
# What each is measured by.
PAIRS = {"shared memory": "bare memory"} | dict.fromkeys(
    ("tcp", "tls", "tcp as int8", "tcp as int4", "gloo"), "bare tcp"
)
Sum = Callable[[torch.Tensor], object]


class BareMemory:
    """Two halves of a region, used in turns, and a counter of each rank."""

    def __init__(self, rank: int, region: mmap.mmap) -> None:
        self.rank, self.number = rank, 0
        self.words = memoryview(region).cast("Q")
        self.data = ctypes.addressof(ctypes.c_char.from_buffer(region)) + 4096

    def __call__(self, partial: torch.Tensor) -> None:
        """The sum takes the partial's place."""
        self.number += 1
        number, quarter = self.number, (REGION - 4096) // 4 & ~63
        half = self.data + (number & 1) * 2 * quarter
        ctypes.memmove(half + self.rank * quarter, partial.data_ptr(), partial.nbytes)
        self.words[self.rank * 8] = number
        while self.words[(1 - self.rank) * 8] < number:
            pass
        received = torch.empty_like(partial)
        ctypes.memmove(received.data_ptr(), half + (1 - self.rank) * quarter, partial.nbytes)
        torch.add(partial, received, out=partial)


class BareTcp:
    """One blocking socket each way."""

    def __init__(self, out: socket.socket, into: socket.socket) -> None:
        self.out, self.into = out, into
        self.to_send: SimpleQueue[memoryview] = SimpleQueue()
        self.sent: SimpleQueue[None] = SimpleQueue()
        Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        while True:
            self.out.sendall(self.to_send.get())
            self.sent.put(None)

    def __call__(self, partial: torch.Tensor) -> None:
        """The sum takes the partial's place."""
        received = torch.empty_like(partial)
        sent, taken = (memoryview(each.numpy()).cast("B") for each in (partial, received))
        beside = len(sent) >= 1 << 18
        if beside:
            self.to_send.put(sent)
        else:
            self.out.sendall(sent)
        count = 0
        while count < len(taken):
            count += self.into.recv_into(taken[count:])
        if beside:
            self.sent.get()
        torch.add(partial, received, out=partial)


@dataclass
class Measured:
    """Of one way and size: seconds of each sum, processor seconds and how many sums those were for."""

    seconds: list[float] = field(default_factory=list)
    processor: float = 0.0
    count: int = 0

    def at(self, part: float) -> float:
        """The time that so many take at most."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(part * len(self.seconds)))]


@torch.inference_mode()
def rank(number: int, talk: Connection, region: mmap.mmap, given: argparse.Namespace) -> None:
    """One of the two. Rank 0 prints."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    torch.set_num_threads(1)
    keep_freed_memory()
    with ways(number, talk, region) as sums:
        measured = {(name, size): Measured() for size in given.sizes for name in sums}
        for round_ in range(given.rounds + 1):
            for size in given.sizes:
                for name, total in sums.items():
                    _measure(total, size, talk, measured[name, size] if round_ else Measured())
            if number == 0:
                print(f"round {round_} of {given.rounds}", file=sys.stderr)
    if number == 0:
        report(measured, given)


def _measure(total: Sum, size: int, talk: Connection, into: Measured) -> None:
    fresh = torch.randn(1, size // 4)
    partial = torch.empty_like(fresh)
    count = max(5, min(400, (16 << 20) // size))
    _meet(talk)
    processor = time.process_time()
    for _ in range(count):
        partial.copy_(fresh)  # sums of sums would soon be infinite, which codecs have to look at
        begin = time.perf_counter()
        total(partial)
        into.seconds.append(time.perf_counter() - begin)
    into.processor += time.process_time() - processor
    into.count += count


def _meet(talk: Connection) -> None:
    talk.send(None)
    talk.recv()


@contextmanager
def ways(number: int, talk: Connection, region: mmap.mmap) -> Iterator[dict[str, Sum]]:
    """All of them, connected."""
    identity = Identity()
    own = [Mesh("127.0.0.1"), Mesh("127.0.0.1"), Mesh("127.0.0.1", identity=identity)]
    talk.send(([tuple(mesh.place) for mesh in own], identity.certificate))
    places_there, certificate = talk.recv()
    others = [Place(*place) for place in places_there]
    certificates = [identity.certificate, certificate] if number == 0 else [certificate, identity.certificate]
    if number == 0:
        keys = [new_key(), new_key(), new_key()]
        talk.send(keys)
    else:
        keys = talk.recv()
    groups = {}
    for name, mesh, other, key in zip(("shared memory", "tcp", "tls"), own, others, keys, strict=True):
        places = [mesh.place, other] if number == 0 else [other, mesh.place]
        if name != "shared memory":
            places = [place._replace(name="") for place in places]
        mesh.join(number, places, [pair_key(key, number, each) for each in range(2)], certificates=certificates)
        groups[name] = Direct(mesh)
    if number == 0:
        store, port = host_store("127.0.0.1")
        talk.send(port)
    else:
        store = join_store("127.0.0.1", talk.recv())
    out, into = _sockets(number, talk)
    sums: dict[str, Sum] = {"bare memory": BareMemory(number, region), "bare tcp": BareTcp(out, into)}
    over = {name: Group(transport, range(2)) for name, transport in {**groups, "gloo": Gloo(number, store)}.items()}
    for name, way, wire in (
        ("shared memory", "shared memory", "exact"), ("tcp", "tcp", "exact"), ("tls", "tls", "exact"),
        ("tcp as int8", "tcp", "int8"), ("tcp as int4", "tcp", "int4"), ("gloo", "gloo", "exact"),
    ):  # fmt: skip
        sums[name] = _summing(over[way], wire)
    yield sums
    _meet(talk)
    for each in (*groups.values(), out, into):
        each.close()


def _summing(group: Group, wire: str) -> Sum:
    """Rows of as many numbers as a model has, on wires where that matters."""
    codec = codec_named(wire)
    return lambda partial: all_reduce(group, codec, partial.view(-1, min(512, partial.numel())))


def _sockets(number: int, talk: Connection) -> tuple[socket.socket, socket.socket]:
    if number == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            talk.send(server.getsockname()[1])
            first, second = server.accept()[0], server.accept()[0]
        pair = first, second
    else:
        port = talk.recv()
        second, first = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        pair = first, second
    for each in pair:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return pair


def report(measured: dict[tuple[str, int], Measured], given: argparse.Namespace) -> None:
    """The table, and everything measured in a file."""
    table = Table(title=f"a sum of two ranks, µs; {given.rounds} rounds in turns, one core each")
    for column in ("bytes", "", "median", "99%", "of bare: median", "99%", "processor"):
        table.add_column(column, justify="left" if not column else "right")
    for size in given.sizes:
        for name in dict.fromkeys(name for name, _ in measured):
            each, bare = measured[name, size], measured[PAIRS.get(name, name), size]
            ratios = [f"{each.at(part) / bare.at(part):.2f}" if bare is not each else "" for part in (0.5, 0.99)]
            middle, tail = (f"{each.at(part) * 1e6:.1f}" for part in (0.5, 0.99))
            table.add_row(str(size), name, middle, tail, *ratios, f"{each.processor / each.count * 1e6:.1f}")
    Console(width=100).print(table)
    print(f"{processor_name()}, torch {torch.__version__}, {date.today()}")
    if given.json:
        rows = [
            {"bytes": size, "way": name, "seconds": each.seconds, "processor": each.processor / each.count}
            for (name, size), each in measured.items()
        ]
        head = {"processor": processor_name(), "torch": torch.__version__, "date": str(date.today())}
        given.json.write_text(json.dumps({**head, "rows": [_short(row) for row in rows]}) + "\n")


def _short(row: dict[str, object]) -> dict[str, object]:
    """Microseconds to the tenth: what a file in the repository need not say more exactly."""
    return row | {"seconds": [round(each * 1e6, 1) for each in row["seconds"]]}  # type: ignore[attr-defined]


def main() -> None:
    """Starts the other rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[int(size) for size in SIZES.split(",")],
    )
    parser.add_argument("--json", type=Path, help="every sum's time")
    given = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    assert dist.is_gloo_available()
    region, (one, other) = mmap.mmap(-1, REGION), Pipe()
    if os.fork():
        rank(0, one, region, given)
        os.wait()
    else:
        rank(1, other, region, given)


if __name__ == "__main__":
    main()
