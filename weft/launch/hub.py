"""Machines that join a server, its side: who is there, whether they meet its terms, and whose rank each has. The other
side is machine.py.

    machine -> hub   Here (twice a second), Agreed, Unfit, WorkerEnded
    hub -> machine   Known (to every Here), Terms, Begin, Say, End, Refuse

Several groups of ranks, each on a thread of its own, may have machines from the same hub. Knows addresses; knows
nothing of workers, or of models: what a machine has to agree to are bytes here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count as counted
from typing import Any

import msgspec
import zmq

from weft.errors import InputError
from weft.launch.addresses import endpoint, interface_of, parse_address, resolved
from weft.launch.keys import key_of, new_key
from weft.launch.launcher import VERSION
from weft.launch.sockets import TurnedAway, engine_socket

EVERY = 0.5  # seconds between signs of life
SILENT = 4.0  # seconds after which a machine, or the engine, counts as gone
SAID_AGAIN = 60.0  # seconds after which it is said once more that somebody was turned away
CAME_BY = 3  # from this version on a machine can be told that it isn't used
PAUSE = 0.01  # seconds between looks at what was said
UNDECIDED = 2.0  # seconds after which it is said that a machine still looks at its files
MOST = 256  # messages that are taken at a time
LARGEST = 64 << 10  # bytes of a message
LONGEST = 500  # letters of what a machine says of itself


class Here(msgspec.Struct, tag=True, frozen=True):
    """A machine lives. `name`: of its host; `address`: where other ranks reach it. `version`: of these messages."""

    name: str
    address: str
    version: int = 0


class Agreed(msgspec.Struct, tag=True, frozen=True):
    """The machine meets the terms of this number."""

    number: int


class Unfit(msgspec.Struct, tag=True, frozen=True):
    """It doesn't, and goes."""

    reason: str


class WorkerEnded(msgspec.Struct, tag=True, frozen=True):
    """The machine's worker of group `number` has ended, or can't go on; `crashed`: by its own fault."""

    reason: str
    number: int
    crashed: bool = False


class Known(msgspec.Struct, tag=True, frozen=True):
    """The engine lives."""


class Terms(msgspec.Struct, tag=True, frozen=True):
    """What a machine must have: it looks, and answers."""

    number: int
    data: bytes


class Begin(msgspec.Struct, tag=True, frozen=True):
    """Start a worker that joins this address with this token. `number`: of the group, to tell it from earlier ones."""

    address: str
    token: str
    threads: int
    place: int
    number: int


class Say(msgspec.Struct, tag=True, frozen=True):
    """A line for whoever runs the machine."""

    line: str


class End(msgspec.Struct, tag=True, frozen=True):
    """End the worker, if it is in the group of this number."""

    number: int


class Refuse(msgspec.Struct, tag=True, frozen=True):
    """The machine can't be used as it is, and need not wait."""

    reason: str


ToHub = Here | Agreed | Unfit | WorkerEnded
ToMachine = Known | Terms | Begin | Say | End | Refuse
encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToHub).decode


def printable(text: str) -> str:
    """As it can be shown on a terminal: a machine must not write there what it likes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:LONGEST])


class RemoteMachine:
    """One that has joined."""

    def __init__(self, hub: Hub, identity: bytes, here: Here) -> None:
        self.hub, self.identity = hub, identity
        self.name, self.address = printable(here.name) or "?", printable(here.address)
        self.came = self.heard = time.monotonic()
        self.undecided = False  # it was said that it still looks at its files
        self.fit = False  # it meets the terms
        self.ended: WorkerEnded | None = None  # what it said of its worker's end
        self.failed = 0  # groups with it that ended soon
        self.group: object = None  # whose rank it has
        self.asked = 0  # the number of the terms that it was asked to meet
        self.free = 0.0  # since when it has none
        self.spare = False  # it was told that it stands by

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"

    def send(self, message: ToMachine) -> None:
        """One that is gone, or doesn't read, says so by its silence."""
        with self.hub.lock, suppress(zmq.ZMQError):
            self.hub.socket.send_multipart([self.identity, encode(message)], zmq.NOBLOCK)

    def say(self, line: str) -> None:
        """Says a line there."""
        self.send(Say(line))

    def doubt(self, line: str) -> None:
        """Says a line there, and is used after others."""
        self.failed += 1
        self.say(line)

    def refuse(self, reason: str) -> None:
        """Doesn't use it any more, and says why, on both sides."""
        self.send(Refuse(reason))
        self.hub.turn_away(self, reason)


class Hub:
    """Listens for machines at HOST:PORT, with a `token` that follows from the server's `secret`, or is new. `told`:
    what goes on, in words.

    Each group of ranks enters, and claims machines when it starts; one that nobody has claimed may take any place that
    becomes free. `interrupted`: set by who doesn't want to wait for machines any more.

    Raises `InputError` for an address that this machine doesn't have.
    """

    def __init__(
        self, address: str, secret: str | None = None, told: Callable[[str], None] = lambda line: None
    ) -> None:  # fmt: skip
        host, self.port = parse_address(address, "--join-address")
        self.address = endpoint(host, self.port).removeprefix("tcp://")
        if host in ("0.0.0.0", "::", "*"):
            raise InputError("--join-address must be the address at which the other machines reach this one, not any")
        self.host, self.told = resolved(host, "--join-address"), told
        interface_of(self.host)  # demands that it is this machine's
        key = key_of(secret) if secret else new_key()
        self.token = key.token
        self.interrupted = threading.Event()
        self.lock = threading.RLock()  # of the socket, and of all that follows
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = engine_socket(self._context, key, LARGEST)
        self._machines: dict[bytes, RemoteMachine] = {}
        self._unused: set[bytes] = set()  # who speaks another version, or was turned away
        self.numbers = counted(1)  # of groups each time that they start
        self._groups: set[object] = set()
        self._complete: set[object] = set()  # groups that have the machines that they want
        self._terms = Terms(0, b"")
        self.refused = 0  # machines
        self._said = -SAID_AGAIN
        self._lines: list[str] = []  # to tell, once the lock is free: whoever is told may take their time
        try:
            self.socket.ipv6 = ":" in self.host
            self.socket.bind(endpoint(self.host, self.port))
        except zmq.ZMQError as error:
            self.socket.close(0)
            self._context.term()
            raise InputError(f"--join-address {address} can't be used ({error}); choose another port") from None
        self._turned_away = TurnedAway(self.socket)

    def enter(self, group: object) -> None:
        """One more that will claim machines; while it hasn't, none stands by."""
        with self.lock:
            self._groups.add(group)

    def leave(self, group: object) -> None:
        """It claims none any more; with the last one the hub closes."""
        with self.lock:
            self._groups.discard(group)
            self._complete.discard(group)
            if not self._groups:
                self.close()

    def demand(self, terms: bytes) -> None:
        """From now on only machines that agree to these count; each is asked once, and not while it has a rank."""
        with self.lock:
            if self._terms.number and terms == self._terms.data:
                return
            self._terms = Terms(self._terms.number + 1, terms)
            for machine in self._machines.values():
                self._ask(machine)

    def _ask(self, machine: RemoteMachine) -> None:
        if machine.group is None and machine.asked != self._terms.number:
            machine.fit, machine.asked = False, self._terms.number
            machine.send(self._terms)

    def claim(self, group: object, count: int, since: float) -> tuple[list[RemoteMachine], int]:
        """So many machines for a group, of those that nobody has and that have given a sign of life since then
        (seconds, monotonic), and of late: first those that haven't failed, in the order of their coming. None of them,
        and how many are missing, if there are fewer."""
        self.listen(0)
        with self.lock:
            since = max(since, time.monotonic() - 2 * EVERY)
            free = [m for m in self._fit() if m.group is None and m.heard >= max(since, m.free)]
            if len(free) < count:
                return [], count - len(free)
            claimed = sorted(free, key=lambda machine: machine.failed)[:count]
            for machine in claimed:
                machine.group, machine.spare, machine.ended = group, False, None
            self._complete.add(group)
            self._stand_by()
        self._tell()
        return claimed, 0

    def release(self, group: object, machines: Iterable[RemoteMachine]) -> None:
        """The group has let go of these, and will claim others."""
        with self.lock:
            self._complete.discard(group)
            for machine in machines:
                machine.group, machine.free = None, time.monotonic()
                self._ask(machine)

    def there(self) -> list[RemoteMachine]:
        """Machines that are fit, in the order of their coming."""
        self.listen(0)
        with self.lock:
            return self._fit()

    def _fit(self) -> list[RemoteMachine]:
        for machine in self._machines.values():
            if not (machine.fit or machine.undecided or machine.heard < machine.came + UNDECIDED):
                machine.undecided = True
                self._lines.append(f"{machine} is there, and still compares its model with the one here")
        return [machine for machine in self._machines.values() if machine.fit]

    def listen(self, milliseconds: int) -> None:
        """To what was said, or until something is, for so long at most."""
        until = time.monotonic() + milliseconds / 1000
        while not self._listen() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, PAUSE))  # not with the lock: others listen too

    def _listen(self) -> bool:
        """To what was said; False if that was nothing."""
        heard = 0
        with self.lock:
            while heard < MOST and self.socket.poll(0):
                identity, *frames = self.socket.recv_multipart()
                try:
                    [data] = frames
                    message = _decode(data)
                except (ValueError, msgspec.MsgspecError):
                    message = Here("", "")
                if identity not in self._unused:
                    self._hear(identity, message)
                heard += 1
            if heard < MOST:  # that was all: who said nothing is gone
                now = time.monotonic()
                self._machines = {i: m for i, m in self._machines.items() if now - m.heard < SILENT}
            if self._turned_away.any() and time.monotonic() - self._said > SAID_AGAIN:
                self._said = time.monotonic()
                self._lines.append("a machine tried to join with another token than this server's, and is not heard")
        self._tell()
        return heard > 0

    def _tell(self) -> None:
        """What is to be told, by whoever comes first."""
        with self.lock:
            lines, self._lines = self._lines, []
        for line in lines:
            self.told(line)

    def _hear(self, identity: bytes, message: ToHub) -> None:
        if isinstance(message, Here):
            self._greet(identity, message)
        elif (machine := self._machines.get(identity)) is None:
            return
        elif isinstance(message, WorkerEnded):
            machine.ended = message
        elif isinstance(message, Unfit):
            self._turn_away(machine, printable(message.reason))
        elif message.number == self._terms.number and not machine.fit:
            machine.fit = True
            self._lines.append(f"{machine} has joined")
            self._stand_by()

    def _stand_by(self) -> None:
        """Says so once of each that no group wants: there is one for every rank."""
        if self._complete != self._groups:
            return
        for machine in self._machines.values():
            if machine.fit and machine.group is None and not machine.spare:
                machine.spare = True
                self._lines.append(f"all ranks are there: {machine} stands by for one that is lost")
                machine.say("all ranks are there: this machine stands by for one that is lost")

    def _greet(self, identity: bytes, here: Here) -> None:
        if here.version != VERSION:
            other = RemoteMachine(self, identity, here)
            if here.version >= CAME_BY:  # who came before there was a way to say so waits on
                other.send(Refuse("it runs another version of weft than the server; install the same on both"))
            self._turn_away(other, "it runs another version of weft")
            return
        if (machine := self._machines.get(identity)) is None:
            machine = self._machines[identity] = RemoteMachine(self, identity, here)
            self._ask(machine)
        machine.heard = time.monotonic()
        machine.send(Known())

    def turn_away(self, machine: RemoteMachine, reason: str) -> None:
        """Doesn't hear it any more."""
        with self.lock:
            self._turn_away(machine, reason)
        self._tell()

    def _turn_away(self, machine: RemoteMachine, reason: str) -> None:
        self.refused += 1
        self._machines.pop(machine.identity, None)
        self._unused.add(machine.identity)
        self._lines.append(f"{machine} is not used: {reason}")

    def close(self) -> None:
        """Tells all machines, and lets go of the address. Safe to repeat."""
        with self.lock:
            if self.socket.closed:
                return
            for machine in self._fit():
                machine.say("the server has ended; waiting for it to come back")
            self.socket.close(200)  # milliseconds for the last words
            self._turned_away.ended()
            self._context.term()
