"""Ranks on this machine and on others that join: there `weft worker` (machine.py) starts a worker when it is told to.

What the workers then say to the engine is none of this room's business. Knows processes and addresses; knows nothing of
models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from weft.errors import InputError, Interrupted
from weft.launch.addresses import endpoint, interface_of, parse_address, resolved
from weft.launch.hub import EVERY, SILENT, Begin, End, Hub, RemoteMachine, WorkerEnded, printable
from weft.launch.keys import key_of, new_key
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
    """`local` ranks on this machine, the rest on machines that join at HOST:PORT, with a `token` that follows from the
    server's `secret`, or is new. `told`: progress, in words.
    `ports`: the first of those that ranks use on this machine; 0: any that are free.

    A machine that is missing is waited for; another one may take its place.

    Raises `InputError` for an address that this machine doesn't have.
    """

    def __init__(
        self, address: str, local: int, secret: str | None, told: Callable[[str], None], ports: int = 0
    ) -> None:  # fmt: skip
        self.host, port = parse_address(address, "--join-address")
        self.address = endpoint(self.host, port).removeprefix("tcp://")
        if self.host in ("0.0.0.0", "::", "*"):
            raise InputError("--join-address must be the address at which the other machines reach this one, not any")
        self.host = resolved(self.host, "--join-address")
        self.local = local
        if ports and ports <= port <= ports + local:
            raise InputError(f"--rank-ports {ports} to {ports + local} and the port of --join-address overlap")
        key = key_of(secret) if secret else new_key()
        self.token = key.token
        self._children, self._ports = Placed(self.host, ports + 1 if ports else 0), ports
        self._hub = Hub(self.host, port, key, self._joined)
        self.told = told
        self._used: list[RemoteMachine] = []
        self._number, self._begun = 0, 0.0  # of the group, and when it was started
        self.meanwhile: Callable[[], None] = lambda: None
        self.interrupted = threading.Event()  # set by who doesn't want to wait for machines any more

    @property
    def told(self) -> Callable[[str], None]:
        """Who is told of progress."""
        return self._hub.told

    @told.setter
    def told(self, told: Callable[[str], None]) -> None:
        self._hub.told = told

    @property
    def link_name(self) -> str:
        """By the machines that are used: what was measured with others says nothing of these."""
        return f"between machines: {self.host} {' '.join(machine.address for machine in self._used)}"

    one_clock = False
    leaves_machine = True
    shares_memory = True
    may_change = True

    def demand(self, terms: bytes) -> None:
        """Machines that join look whether they meet these terms; those that don't are not used."""
        self._hub.demand(terms)

    def elsewhere(self, place: int) -> RemoteMachine | None:
        """The machine of that rank, if it isn't this one."""
        return self._used[place - self.local] if self.local <= place < self.local + len(self._used) else None

    def shape(self, rate: float | None) -> bool:
        """The machines' links are as they are."""
        return False

    def control_address(self, folder: str) -> str:
        """One that other machines reach."""
        return endpoint(self.host, self._ports or "*")

    def start(self, threads: int, address: str, tokens: Sequence[str]) -> None:
        """Waits for the machines that are missing, then starts the local ranks and has each machine start one."""
        local = min(self.local, len(tokens))
        self._used = self._awaited(len(tokens) - local)
        self._number, self._begun = self._number + 1, time.monotonic()
        self._children.start(threads, address, tokens[:local])
        for place, machine in enumerate(self._used, start=local):
            machine.ended, machine.spare = None, False
            machine.send(Begin(address, tokens[place], threads, place, self._number))
        for machine in self._hub.there(0.0):
            self._stand_by(machine)

    def _awaited(self, count: int) -> list[RemoteMachine]:
        """So many machines that have given a sign of life from now on: one that is gone may look alive for a while."""
        self._hub.listen(0)  # what was said before is no sign of life now
        begin, said = time.monotonic(), (0, 0)
        while len(there := self._hub.there(begin)) < count:
            missing = count - len(there)
            if (missing, self._hub.refused) != said and time.monotonic() - begin > 2 * EVERY:
                said = missing, self._hub.refused
                self.told(f"waiting for {missing} more machine{'s' if missing > 1 else ''} to join at {self.address}")
            self.meanwhile()
            self.attend(LOOK_MILLISECONDS)
        return sorted(there, key=lambda machine: machine.failed)[:count]

    def attend(self, milliseconds: int = 0) -> None:
        """Answers machines for so long, or what they have said. Raises `Interrupted`."""
        if self.interrupted.is_set():
            raise Interrupted("interrupted while ranks were started")
        self._hub.listen(milliseconds)

    def _joined(self, machine: RemoteMachine) -> None:
        self.told(f"{machine} has joined")
        if self._used:
            self._stand_by(machine)

    def _stand_by(self, machine: RemoteMachine) -> None:
        """Says so once, if it is not used: there is one for every rank."""
        if machine in self._used or machine.spare:
            return
        machine.spare = True
        self.told(f"all ranks are there: {machine} stands by for one that is lost")
        machine.say("all ranks are there: this machine stands by for one that is lost")

    def pids(self) -> list[int]:
        """Of the local ranks."""
        return self._children.pids()

    def dead(self) -> list[str]:
        """Local ranks, machines whose worker has ended, and machines that are silent."""
        self._hub.listen(0)
        now, lines = time.monotonic(), self._children.dead()
        for machine in self._used:
            if (ended := self._ended(machine)) is not None:
                lines.append(f"{machine}: {printable(ended.reason)}")
            elif now - machine.heard > SILENT:
                lines.append(f"{machine} has been silent for {now - machine.heard:.0f} s")
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
        soon = time.monotonic() - self._begun < SOON
        for machine in self._used:
            machine.send(End())
            machine.failed += soon or self._ended(machine) is not None
        self._used = []
        self._children.stop()

    def close(self) -> None:
        """Lets go of the address."""
        self.stop()
        for machine in self._hub.there(0.0):
            machine.say("the server has ended; waiting for it to come back")
        self._hub.close()
