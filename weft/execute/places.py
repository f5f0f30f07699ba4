"""Where the ranks of a group are, and what each is told of the others. Knows what they said. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from weft.config import EngineConfig
from weft.errors import InputError
from weft.execute.protocol import Hello, Meet, Meeting
from weft.launch.launcher import Launcher
from weft.parallel.handshake import new_key, pair_key


def numbered_machines(hellos: Sequence[Hello], together: bool) -> list[int]:
    """Of each rank a number, equal for ranks of one machine. `together`: False where each counts as on its own."""
    names = [hello.machine if together else str(rank) for rank, hello in enumerate(hellos)]
    return [names.index(name) for name in names]


def among(rank: int, hellos: Sequence[Hello], config: EngineConfig, launcher: Launcher) -> tuple[int, int]:
    """How many ranks a rank's machine has, those of replicas included, and which of them this one is."""
    near = [other for other, hello in enumerate(hellos) if hello.machine == hellos[rank].machine]
    replicas, number = (config.replicas, config.replica) if launcher.elsewhere(rank) is None else (1, 0)
    return replicas * len(near), number * len(near) + near.index(rank)


def threads_of(config: EngineConfig, hello: Hello, near: int) -> tuple[int, bool]:
    """Of a rank that is one of so many on its machine; and whether they all want more cores than it has."""
    threads = max(1, hello.cores // near) if config.threads_by_machine else config.threads
    return threads, config.cores is None and near * threads > hello.cores


def encrypted(config: EngineConfig, launcher: Launcher) -> bool:
    """Whether what ranks send each other is, but for what stays in a machine's memory."""
    return config.transport == "tls" or (launcher.leaves_machine and not config.plain_data)


def introduced(
    hellos: Sequence[Hello], meetings: Sequence[Meeting], machines: Sequence[int], near: bool, must: bool
) -> list[Meet]:  # fmt: skip
    """For each rank where the others are, as it is to reach them, and the keys that it shares with them. `near`: ranks
    of one machine may share memory; `must`: all do. Raises `InputError` where they can't."""
    group, meets = new_key(), []
    by_rank = [replace(meeting, machine=machine) for meeting, machine in zip(meetings, machines, strict=True)]
    for rank, here in enumerate(hellos):
        sharing = [near and here.machine == there.machine for there in hellos]
        sharing = [share and _same(by_rank[rank], other) for share, other in zip(sharing, by_rank, strict=True)]
        seen = [each if share else replace(each, name="") for each, share in zip(by_rank, sharing, strict=True)]
        if must and not all(place.name for place in seen):
            raise InputError(f"--transport shm is for ranks that share memory; those on {_hosts(hellos)} don't")
        meets.append(Meet(seen, [pair_key(group, rank, other) for other in range(len(hellos))]))
    return meets


def _same(one: Meeting, other: Meeting) -> bool:
    """Whether their sockets reach each other: files do, others within their network namespace."""
    return one.name.rpartition("/")[0] == other.name.rpartition("/")[0]


def _hosts(hellos: Sequence[Hello]) -> str:
    return ", ".join(dict.fromkeys(hello.host for hello in hellos))
