"""Workers on other machines: there `weft worker` waits, starts a worker when it is told to, and says when that ended.

    machine -> hub   Here (every second), WorkerEnded
    hub -> machine   Known (to every Here), Begin, End

The hub is the engine's side. What the workers then say to the engine is none of this room's business. Knows processes
and addresses; knows nothing of models.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from weft.errors import InputError, Interrupted
from weft.launch.addresses import endpoint, interface_of, parse_address, resolved
from weft.launch.launcher import TOKEN_VARIABLE
from weft.launch.local import LocalLauncher
from weft.launch.sockets import engine_socket, worker_socket

EVERY = 0.5  # seconds between signs of life
SILENT = 4.0  # seconds after which a machine, or the engine, counts as gone
LOOK_MILLISECONDS = 100


class Here(msgspec.Struct, tag=True, frozen=True):
    """A machine lives. `name`: of its host; `address`: where other ranks reach it. `version`: of these messages."""

    name: str
    address: str
    version: int = 0


class WorkerEnded(msgspec.Struct, tag=True, frozen=True):
    """The machine's worker of group `number` has ended, or can't go on; `crashed`: by its own fault."""

    reason: str
    number: int
    crashed: bool = False


class Known(msgspec.Struct, tag=True, frozen=True):
    """The engine lives."""


class Begin(msgspec.Struct, tag=True, frozen=True):
    """Start a worker that joins this address with this token. `number`: of the group, to tell it from earlier ones."""

    address: str
    token: str
    threads: int
    place: int
    number: int


class End(msgspec.Struct, tag=True, frozen=True):
    """End it."""


VERSION = 2
SOON = 30.0  # seconds: whoever was in a group that ended sooner comes after others in the next one

_encode = msgspec.msgpack.Encoder().encode
_to_hub = msgspec.msgpack.Decoder(Here | WorkerEnded).decode
_to_machine = msgspec.msgpack.Decoder(Known | Begin | End).decode


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


@dataclass
class _RemoteMachine:
    """One that has joined."""

    identity: bytes
    here: Here
    heard: float
    ended: WorkerEnded | None = None  # what it said of its worker's end
    failed: int = 0  # groups with it that ended soon


class JoinedLauncher:
    """`local` ranks on this machine, the rest on machines that join at HOST:PORT. `told`: progress, in words.
    `ports`: the first of those that ranks use on this machine; 0: any that are free.

    A machine that is missing is waited for; another one may take its place.

    Raises `InputError` for an address that this machine doesn't have.
    """

    def __init__(
        self, address: str, local: int, token: str | None, told: Callable[[str], None], ports: int = 0
    ) -> None:  # fmt: skip
        self.host, port = parse_address(address, "--join-address")
        self.address = endpoint(self.host, port).removeprefix("tcp://")
        if self.host in ("0.0.0.0", "::", "*"):
            raise InputError("--join-address must be the address at which the other machines reach this one, not any")
        self.host = resolved(self.host, "--join-address")
        self.local, self.told = local, told
        if ports and ports <= port <= ports + local:
            raise InputError(f"--rank-ports {ports} to {ports + local} and the port of --join-address overlap")
        self.token = token or secrets.token_urlsafe(24)
        self._children, self._ports = Placed(self.host, ports + 1 if ports else 0), ports
        self._context: zmq.Context[Any] = zmq.Context()
        self._hub = engine_socket(self._context, self.token)
        self._machines: dict[bytes, _RemoteMachine] = {}
        self._used: list[_RemoteMachine] = []
        self._number, self._begun = 0, 0.0  # of the group, and when it was started
        self._strangers: set[bytes] = set()  # who speaks another version
        self.meanwhile: Callable[[], None] = lambda: None
        self.interrupted = threading.Event()  # set by who doesn't want to wait for machines any more
        try:
            self._hub.ipv6 = ":" in self.host
            self._hub.bind(endpoint(self.host, port))
        except zmq.ZMQError as error:
            self._hub.close(0)
            self._context.term()
            raise InputError(f"--join-address {address} can't be used ({error}); choose another port") from None

    @property
    def link_name(self) -> str:
        """By the machines that are used: what was measured with others says nothing of these."""
        return f"between machines: {self.host} {' '.join(machine.here.address for machine in self._used)}"

    one_clock = False
    shares_memory = True
    may_change = True

    def shape(self, rate: float | None) -> bool:
        """The machines' links are as they are."""
        return False

    def control_address(self, folder: str) -> str:
        """One that other machines reach."""
        return endpoint(self.host, self._ports or "*")

    def start(self, count: int, threads: int, address: str, token: str) -> None:
        """Waits for the machines that are missing, then starts the local ranks and has each machine start one."""
        local = min(self.local, count)
        self._used = self._awaited(count - local)
        self._number, self._begun = self._number + 1, time.monotonic()
        self._children.start(local, threads, address, token)
        for place, machine in enumerate(self._used, start=local):
            machine.ended = None
            self._say(machine, Begin(address, token, threads, place, self._number))

    def _awaited(self, count: int) -> list[_RemoteMachine]:
        """So many machines that have given a sign of life from now on: one that is gone may look alive for a while."""
        self._listen(0)  # what was said before is no sign of life now
        begin, said = time.monotonic(), 0
        while len(there := self._there(begin)) < count:
            missing = count - len(there)
            if missing != said and time.monotonic() - begin > 2 * EVERY:
                said = missing
                self.told(f"waiting for {missing} more machine{'s' if missing > 1 else ''} to join at {self.address}")
            if self.interrupted.is_set():
                raise Interrupted("interrupted while waiting for machines to join")
            self.meanwhile()
            self._listen(LOOK_MILLISECONDS)
        return sorted(there, key=lambda machine: machine.failed)[:count]

    def _there(self, since: float) -> list[_RemoteMachine]:
        """Machines that were heard since then (seconds, monotonic), in the order of their coming."""
        self._listen(0)
        now = time.monotonic()
        self._machines = {i: m for i, m in self._machines.items() if now - m.heard < SILENT}
        return [machine for machine in self._machines.values() if machine.heard >= since]

    def _listen(self, milliseconds: int) -> None:
        while self._hub.poll(milliseconds):
            milliseconds = 0
            identity, data = self._hub.recv_multipart()
            try:
                message = _to_hub(data)
            except msgspec.MsgspecError:
                message = Here("", "")
            if isinstance(message, Here) and message.version != VERSION:
                if identity not in self._strangers:
                    self.told(
                        f"a machine that joins runs another version of weft, and isn't used: {message.name or '?'}"
                    )
                self._strangers.add(identity)
            elif isinstance(message, Here):
                machine = self._machines.setdefault(identity, _RemoteMachine(identity, message, 0.0))
                machine.heard = time.monotonic()
                self._say(machine, Known())
            elif identity in self._machines and message.number == self._number:  # else of a group that is over
                self._machines[identity].ended = message

    def _say(self, machine: _RemoteMachine, message: Known | Begin | End) -> None:
        with suppress(zmq.ZMQError):  # gone: its silence says so
            self._hub.send_multipart([machine.identity, _encode(message)])

    def pids(self) -> list[int]:
        """Of the local ranks."""
        return self._children.pids()

    def dead(self) -> list[str]:
        """Local ranks, machines whose worker has ended, and machines that are silent."""
        self._listen(0)
        now, lines = time.monotonic(), self._children.dead()
        for machine in self._used:
            where = f"the worker on {machine.here.name} ({machine.here.address})"
            if machine.ended is not None:
                lines.append(f"{where}: {machine.ended.reason}")
            elif now - machine.heard > SILENT:
                lines.append(f"{where} has been silent for {now - machine.heard:.0f} s")
        return lines

    def last_words(self) -> list[str]:
        """Of the local ranks; machines say theirs on their own terminals."""
        return self._children.last_words()

    def crashed(self) -> bool:
        """Of any rank, here or there."""
        return self._children.crashed() or any(m.ended is not None and m.ended.crashed for m in self._used)

    def stop(self) -> None:
        """Ends all workers; machines stay joined."""
        soon = time.monotonic() - self._begun < SOON
        for machine in self._used:
            self._say(machine, End())
            machine.failed += soon
        self._used = []
        self._children.stop()

    def close(self) -> None:
        """Lets go of the address."""
        self.stop()
        self._hub.close(200)  # milliseconds for the last words
        self._context.term()


class Machine:
    """The other side: waits to be told, has one worker at a time. `told`: what happens, in words."""

    def __init__(
        self, address: str, token: str, own_address: str | None, told: Callable[[str], None], port: int = 0
    ) -> None:  # fmt: skip
        host, join_port = parse_address(address, "--join")
        host = resolved(host, "--join")
        self.address = resolved(own_address, "--address") if own_address else _towards(host, join_port)
        self._children, self._told = Placed(self.address, port), told
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = worker_socket(self._context, token)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in host
        self._socket.connect(endpoint(host, join_port))
        self._place = host, join_port
        self._hub = address.removeprefix("tcp://")
        self._known: float | None = None  # when the engine was heard last
        self._number = 0  # of the group that the worker is in

    def serve(self) -> None:
        """Until it is interrupted; then the worker is ended."""
        sent, warned, begin = 0.0, False, time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now - sent >= EVERY:
                    self._say(Here(socket.gethostname(), self.address, VERSION))
                    sent = now
                if not warned and self._known is None and now - begin > 2 * SILENT:
                    warned = True
                    self._told(self._unanswered())
                if self._socket.poll(LOOK_MILLISECONDS):
                    self._obey(_to_machine(self._socket.recv()))
                self._look()
        finally:
            self._children.stop()
            self._say(WorkerEnded("weft worker was ended there", self._number))
            self._socket.close(500)  # milliseconds for the last words
            self._context.term()

    def _unanswered(self) -> str:
        """Why nobody has answered so far."""
        try:
            with socket.create_connection(self._place, timeout=2.0):
                pass
        except OSError as error:
            reason = error.strerror or error
            return f"no server at {self._hub} yet ({reason}): is weft serve running there with --join-address? Waiting"
        return (
            f"{self._hub} can be reached but doesn't answer: {TOKEN_VARIABLE} is not the one that weft serve printed "
            "there, or something else listens. Waiting"
        )

    def _obey(self, message: Known | Begin | End) -> None:
        if self._known is None:
            self._told(f"joined {self._hub} as {self.address}; waiting for work")
        self._known = time.monotonic()
        if isinstance(message, Known):
            return
        self._children.stop()
        if isinstance(message, Begin):
            self._number = message.number
            self._told(f"starting rank {message.place}")
            self._children.first_place = message.place
            try:
                self._children.start(1, message.threads, message.address, message.token)
            except OSError as error:  # no memory for one more process, say: that may pass
                self._say(WorkerEnded(f"no worker could be started there ({error.strerror or error})", message.number))
        else:
            self._told("the worker has ended, as it was told to; waiting for work")

    def _look(self) -> None:
        """Tells the engine of a lost worker; ends one whose engine is gone."""
        if lines := self._children.dead():
            crashed, words = self._children.crashed(), self._children.last_words()
            self._children.stop()
            self._say(WorkerEnded("; ".join(lines), self._number, crashed))
            self._told("; ".join(lines + words))
        if self._known is not None and time.monotonic() - self._known > SILENT:
            self._known = None
            if self._children.pids():
                self._children.stop()
            self._told(f"{self._hub} has gone silent; waiting for it to come back")

    def _say(self, message: Here | WorkerEnded) -> None:
        with suppress(zmq.ZMQError):
            self._socket.send(_encode(message), zmq.NOBLOCK)


def _towards(host: str, port: int) -> str:
    """This machine's address on the way to another. Raises `InputError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"there is no way from this machine to {host} ({error}); check --join") from None
