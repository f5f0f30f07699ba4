"""Ranks on this machine and on others that join: there `weft worker` (machine.py) starts a worker when it is told to.

What the workers then say to the engine is none of this room's business. Knows processes and addresses; knows nothing of
models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from weft.errors import InputError, Interrupted
from weft.launch.addresses import endpoint, interface_of
from weft.launch.hub import EVERY, SILENT, Begin, End, Hub, RemoteMachine, WorkerEnded, printable
from weft.launch.local import LocalLauncher

LOOK_MILLISECONDS = 100
SOON = 30.0  # seconds: whoever was in a group that ended sooner comes after others in the next one


class Placed(LocalLauncher):
    """Children on this machine that other machines' ranks reach at `address`; at `port` and those after it, or at any
    that are free."""

    def __init__(self, address: str, port: int = 0) -> None:
        super().__init__()
        self.address, self._port, self._interface = address, port, interface_of(address)

    def data_address(self, index: int) -> str:
        """The same for all."""
        return self.address

    def data_port(self, index: int) -> int:
        """The next one for each."""
        return self._port + index if self._port else 0

    def interface(self, index: int) -> str:
        """Of that address."""
        return self._interface


class JoinedLauncher:
    """`local` ranks on this machine, the rest on machines that join at a hub, of which other launchers may have some.
    `ports`: the first of those that ranks use on this machine; 0: any that are free.

    A machine that is missing is waited for; another one may take its place.

    Raises `InputError` for ports that the hub has.
    """

    def __init__(self, hub: Hub, local: int, ports: int = 0) -> None:
        self.hub, self.local = hub, local
        if ports and ports <= hub.port <= ports + local:
            raise InputError(f"--rank-ports {ports} to {ports + local} and the port of --join-address overlap")
        self._children, self._ports = Placed(hub.host, ports + 1 if ports else 0), ports
        self.told = hub.told
        self._used: list[RemoteMachine] = []
        self._number, self._begun = 0, 0.0  # of the group, and when it was started
        self._lost = False  # one of it
        self.meanwhile: Callable[[], None] = lambda: None
        hub.enter(self)

    @property
    def link_name(self) -> str:
        """By the machines that are used: what was measured with others says nothing of these."""
        return f"between machines: {self.hub.host} {' '.join(machine.address for machine in self._used)}"

    one_clock = False
    leaves_machine = True
    shares_memory = True
    may_change = True

    def here(self, ranks: int) -> int:
        """The local ones."""
        return min(self.local, ranks)

    def demand(self, terms: bytes) -> None:
        """Machines that join look whether they meet these terms; those that don't are not used."""
        self.hub.demand(terms)

    def elsewhere(self, place: int) -> RemoteMachine | None:
        """The machine of that rank, if it isn't this one."""
        return self._used[place - self.local] if self.local <= place < self.local + len(self._used) else None

    def shape(self, rate: float | None) -> bool:
        """The machines' links are as they are."""
        return False

    def control_address(self, folder: str) -> str:
        """One that other machines reach."""
        return endpoint(self.hub.host, self._ports or "*")

    def start(self, threads: int, address: str, tokens: Sequence[str]) -> None:
        """Waits for the machines that are missing, then starts the local ranks and has each machine start one."""
        local = self.here(len(tokens))
        self._used = self._awaited(len(tokens) - local)
        self._number, self._begun, self._lost = next(self.hub.numbers), time.monotonic(), False
        self._children.start(threads, address, tokens[:local])
        for place, machine in enumerate(self._used, start=local):
            machine.send(Begin(address, tokens[place], threads, place, self._number))

    def _awaited(self, count: int) -> list[RemoteMachine]:
        """So many machines that have given a sign of life from now on: one that is gone may look alive for a while."""
        self.hub.listen(0)  # what was said before is no sign of life now
        begin, said = time.monotonic(), (0, 0)
        while True:
            claimed, missing = self.hub.claim(self, count, begin)
            if not missing:
                return claimed
            if (missing, self.hub.refused) != said and time.monotonic() - begin > 2 * EVERY:
                said = missing, self.hub.refused
                self.told(
                    f"waiting for {missing} more machine{'s' if missing > 1 else ''} to join at {self.hub.address}"
                )
            self.meanwhile()
            self.attend(LOOK_MILLISECONDS)

    def attend(self, milliseconds: int = 0) -> None:
        """Answers machines for so long, or what they have said. Raises `Interrupted`."""
        if self.hub.interrupted.is_set():
            raise Interrupted("interrupted while ranks were started")
        self.hub.listen(milliseconds)

    def pids(self) -> list[int]:
        """Of the local ranks."""
        return self._children.pids()

    def dead(self) -> list[str]:
        """Local ranks, machines whose worker has ended, and machines that are silent."""
        self.hub.listen(0)
        now, lines = time.monotonic(), self._children.dead()
        for machine in self._used:
            if (ended := self._ended(machine)) is not None:
                lines.append(f"{machine}: {printable(ended.reason)}")
            elif now - machine.heard > SILENT:
                lines.append(f"{machine} has been silent for {now - machine.heard:.0f} s")
        self._lost = self._lost or bool(lines)
        return lines

    def last_words(self) -> list[str]:
        """Of the local ranks; machines say theirs on their own terminals."""
        return self._children.last_words()

    def crashed(self) -> bool:
        """Of any rank, here or there."""
        ended = (self._ended(machine) for machine in self._used)
        return self._children.crashed() or any(each is not None and each.crashed for each in ended)

    def _ended(self, machine: RemoteMachine) -> WorkerEnded | None:
        """What it said of the end of its worker in this group, not of one that is over."""
        return machine.ended if machine.ended is not None and machine.ended.number == self._number else None

    def stop(self) -> None:
        """Ends all workers; machines stay joined."""
        soon = self._lost and time.monotonic() - self._begun < SOON
        for machine in self._used:
            machine.send(End(self._number))
            machine.failed += soon or self._ended(machine) is not None
        self.hub.release(self, self._used)
        self._used = []
        self._children.stop()

    def close(self) -> None:
        """Ends all workers, and is in the hub no longer."""
        self.stop()
        self.hub.leave(self)
