"""How ranks find each other, and notice that one is gone.

Every rank listens on one port, and on a socket of this machine's where others share its memory. A connection is let in
after its hand-shake (handshake.py) and waits here until it is asked for. One thread does that, and sends every other
rank a byte four times a second: who ends is noticed at once, who is cut off or hangs by its silence. Knows addresses,
keys and seconds; knows nothing of what ranks say. No torch.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import socket
import ssl
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from weft.errors import LinkLost
from weft.parallel import handshake as h
from weft.parallel import ring
from weft.parallel.listening import (
    Place,
    exactly,
    is_own,
    listen_at,
    local_name,
    of_system,
    sockaddr,
    towards,
    where_of,
)
from weft.parallel.tls import SIGN_BYTES, WAITS, Encryption, Identity

EVERY = 0.25  # seconds between signs of life
CUT = 1.5  # seconds of silence after which a peer counts as lost, if its system takes nothing in either
SILENT = 3.0  # and if it does: its process may only wait for its turn
OWN_PAUSE = 0.75  # seconds that this thread itself did not run: then nothing is known of the others
JOIN_SECONDS = 10.0  # to find another rank, which listens before anybody is told of it
GUESTS = 32  # hand-shakes at a time; one more ends the one that has taken longest
GUEST_SECONDS = 2.0
WELCOME = b"!"
PULSE = h.label_of("pulse")


class Connection(NamedTuple):
    """To a peer, each after its hand-shake: one for each way, or one and the memory of both ways."""

    out: socket.socket
    into: socket.socket | None
    memory: int | None

    def close(self) -> None:
        self.out.close()
        if self.into is not None:
            self.into.close()
        if self.memory is not None:
            os.close(self.memory)


@dataclass(eq=False)
class _Guest:
    """A hand-shake that was begun. `shown`: whose certificate, over TLS; `said`: so far, of the message that is due."""

    socket: socket.socket
    local: bool
    until: float
    shown: int | None = None
    said: bytearray = field(default_factory=bytearray)
    hello: bytes = b""
    challenge: bytes = b""
    memory: int | None = None

    def close(self) -> None:
        self.socket.close()
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None


class Mesh:
    """This rank's connections to all others. `address`, `port`: where it listens; port 0 takes any that is free.
    `folder`: the engine's on this machine, which only this user may enter; else its socket there has a name that is no
    file, which others may find. `identity`: what all but those over that socket are secured with; None: they are plain.

    Raises `InputError` for an address that can't be listened on.
    """

    def __init__(
        self, address: str, port: int = 0, folder: str | None = None, identity: Identity | None = None
    ) -> None:  # fmt: skip
        self._identity = identity
        self._encryption: Encryption | None = None
        self._listening = [listen_at(address, port)]
        name = local_name(folder) if ring.available else ""
        if name:
            local = socket.socket(socket.AF_UNIX)
            local.bind(of_system(name))
            local.listen(GUESTS)
            self._listening.append(local)
        self.place = Place(address, self._listening[0].getsockname()[1], name)
        self.rank = 0
        self._lost: dict[int, str] = {}  # peers, and how that was seen
        self._places: Sequence[Place] = ()
        self._keys: Sequence[bytes] = ()
        self._tell: Callable[[int, str, bool], None] = lambda peer, reason, ended: None
        self._guests: list[_Guest] = []
        self._arrived: dict[tuple[bytes, int], tuple[socket.socket, int | None]] = {}
        self._there = threading.Condition()
        self._pulses: dict[int, socket.socket] = {}
        self._heard: dict[int, float] = {}
        self._selector = selectors.DefaultSelector()
        self._over = False
        self._bell, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="weft-mesh", daemon=True)

    @property
    def lost(self) -> str | None:
        """Why the group is of no use now."""
        return next(iter(self._lost.values()), None)

    def join(
        self, rank: int, places: Sequence[Place], keys: Sequence[bytes],
        tell: Callable[[int, str, bool], None] = lambda peer, reason, ended: None, certificates: Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        """Becomes this rank of those that listen at `places`. `keys`: shared with each; `certificates`: of all, where
        this one has an identity. `tell`: (peer, why, whether it has ended), again and again while one is lost, from a
        thread of the mesh's own. Raises `LinkLost`."""
        self.rank, self._places, self._keys, self._tell = rank, places, keys, tell
        if self._identity is not None:
            self._encryption = Encryption(self._identity, rank, certificates)
        for listening in self._listening:
            listening.setblocking(False)
            self._selector.register(listening, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda _: self._woken.recv(64))
        self._thread.start()
        for peer in range(len(places)):
            if peer != rank:
                pulse = self._connect(peer, PULSE) if peer < rank else self._await(peer, PULSE)[0]
                pulse.setblocking(False)
                self._heard[peer], self._pulses[peer] = time.monotonic(), pulse
        self._bell.send(b"!")

    def connections(self, purpose: str, peers: Sequence[int]) -> dict[int, Connection]:
        """To each of these ranks, for a purpose that they all ask for in the same order. Raises `LinkLost`."""
        label, made = h.label_of(f"for {purpose}"), dict[int, Connection]()
        outgoing = {peer: self._open(peer, label) for peer in peers if not self._shares(peer) or peer < self.rank}
        for peer in peers:
            if not self._shares(peer):
                made[peer] = Connection(outgoing[peer][0], self._await(peer, label)[0], None)
            else:
                made[peer] = _with_memory(*(outgoing.get(peer) or self._await(peer, label)))
        return made

    def _shares(self, peer: int) -> bool:
        return bool(self._places[peer].name)

    def _open(self, peer: int, label: bytes) -> tuple[socket.socket, int | None]:
        memory = ring.new_region() if self._shares(peer) else None
        try:
            return self._connect(peer, label, memory), memory
        except BaseException:
            if memory is not None:
                os.close(memory)
            raise

    def _connect(self, peer: int, label: bytes, memory: int | None = None) -> socket.socket:
        """The connecting side; tries again while the other one is too busy to answer."""
        end = time.monotonic() + JOIN_SECONDS
        while True:
            connection = towards(self._places[peer])
            try:
                connection.settimeout(GUEST_SECONDS)
                connection.connect(sockaddr(self._places[peer]))
                if self._encryption is not None and not self._shares(peer):
                    connection = self._encryption.reach(connection, peer)
                self._introduce(connection, peer, label, memory)
                return connection
            except (h.NotAMember, OSError) as error:
                connection.close()
                where = f"rank {peer} at {where_of(self._places[peer])}"
                if isinstance(error, h.NotAMember):
                    raise LinkLost(f"{where}: what listens there is another one, it {error}") from None
                if time.monotonic() > end or self._over or self.lost:
                    raise LinkLost(f"{where} can't be reached ({error})") from None
                time.sleep(0.05)

    def _introduce(self, connection: socket.socket, peer: int, label: bytes, memory: int | None) -> None:
        said = h.hello(self.rank, peer, label, _security(connection))
        connection.sendall(said)
        shown = h.proof(self._keys[peer], said, exactly(connection, h.CHALLENGE_BYTES))
        if memory is not None:
            socket.send_fds(connection, [shown], [memory])
        else:
            connection.sendall(shown)
        exactly(connection, len(WELCOME))  # who was sent away in between comes again

    def _await(self, peer: int, label: bytes) -> tuple[socket.socket, int | None]:
        """The answering side: what has come of that peer for that purpose, or comes. Who has joined and lives may take
        its time: it may still be at what comes before."""
        key, end = (label, peer), time.monotonic() + JOIN_SECONDS
        with self._there:
            while key not in self._arrived:
                self._there.wait(0.1)
                if self.lost or self._over or (label == PULSE and time.monotonic() > end):
                    raise LinkLost(self.lost or f"rank {peer} at {where_of(self._places[peer])} has not connected")
            return self._arrived.pop(key)

    def _serve(self) -> None:
        """The thread's: until `close`."""
        before = sent = time.monotonic()
        while not self._over:
            for key, _ in self._selector.select(EVERY / 2):
                with suppress(OSError, ValueError, KeyError):  # closed by what came before it in the same moment
                    key.data(key.fileobj)
            now = time.monotonic()
            if now - before > OWN_PAUSE:
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            for guest in [guest for guest in self._guests if guest.until < now]:
                self._dismiss(guest)
            self._listen_to_new_pulses()
            self._demand_signs(now)
            if now - sent >= EVERY:
                sent = now
                self._beat()

    def _demand_signs(self, now: float) -> None:
        """Of life, from every peer."""
        for peer, then in list(self._heard.items()):
            if now - then > (CUT if self._unheard(peer) else SILENT):
                self._heard[peer] = now  # and again, should it stay silent: who is told may not listen yet
                self._lose(peer, now - then)

    def _beat(self) -> None:
        for pulse in list(self._pulses.values()):
            with suppress(OSError):  # nothing more goes in: its silence says so
                pulse.send(b".")

    def _unheard(self, peer: int) -> bool:
        """Whether more than the last sign sent to a peer on another machine has not arrived at its system."""
        waiting, pulse = bytearray(4), self._pulses.get(peer)
        sign = SIGN_BYTES if isinstance(pulse, ssl.SSLSocket) else 1
        if pulse is not None and pulse.family != socket.AF_UNIX:
            with suppress(OSError):
                fcntl.ioctl(pulse, termios.TIOCOUTQ, waiting)
        return int.from_bytes(waiting, sys.byteorder) > sign

    def _listen_to_new_pulses(self) -> None:
        known = self._selector.get_map()
        for peer, pulse in list(self._pulses.items()):
            if pulse.fileno() not in known:
                self._selector.register(pulse, selectors.EVENT_READ, lambda _, peer=peer: self._hear(peer))

    def _hear(self, peer: int) -> None:
        try:
            heard = self._pulses[peer].recv(4096)
        except WAITS:
            return
        except OSError:
            heard = b""
        if heard:
            self._heard[peer] = time.monotonic()
            self._lost.pop(peer, None)  # it was only silent
        else:
            self._selector.unregister(self._pulses[peer])
            self._pulses.pop(peer).close()
            self._lose(peer, 0.0)

    def _lose(self, peer: int, seconds: float) -> None:
        ended = peer not in self._pulses
        silent = f"rank {self.rank} heard nothing from rank {peer} for {seconds:.1f} s"
        self._lost[peer] = f"the connection to rank {peer} has ended" if ended else silent
        self._tell(peer, self._lost[peer], ended)

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            connection, _ = listening.accept()
            connection.setblocking(False)
            local = connection.family == socket.AF_UNIX
            if local and not is_own(connection):
                connection.close()
                return
            if self._encryption is not None and not local:
                connection = self._encryption.received(connection)
            guest = _Guest(connection, local, time.monotonic() + GUEST_SECONDS)
            if len(self._guests) == GUESTS:
                self._dismiss(self._guests[0])
            self._guests.append(guest)
            self._selector.register(connection, selectors.EVENT_READ, lambda _: self._answer(guest))

    def _dismiss(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._guests.remove(guest)
            self._selector.unregister(guest.socket)
            guest.close()

    def _answer(self, guest: _Guest) -> None:
        """Goes on with a hand-shake, as far as what has come goes."""
        try:
            while guest in self._guests:  # else it was let in, or sent away for another one that came in that moment
                self._go_on(guest)
        except WAITS:
            return
        except (OSError, h.NotAMember):
            self._dismiss(guest)

    def _go_on(self, guest: _Guest) -> None:
        if isinstance(guest.socket, ssl.SSLSocket) and guest.shown is None:
            guest.socket.do_handshake()
            assert self._encryption is not None, "who secures connections knows certificates"
            guest.shown = self._encryption.peer_of(guest.socket)
        self._read(guest)
        if len(guest.said) < (h.PROOF_BYTES if guest.hello else h.HELLO_BYTES):
            return
        said, guest.said = bytes(guest.said), bytearray()
        claimed = h.read_hello(guest.hello or said, _security(guest.socket))
        if claimed.to != self.rank or claimed.rank == self.rank or claimed.rank >= len(self._keys):
            raise h.NotAMember("wants another rank")
        if guest.shown not in (None, claimed.rank):
            raise h.NotAMember("shows another rank's certificate")
        key = self._keys[claimed.rank]
        if not guest.hello:
            guest.hello, guest.challenge = said, h.challenge(key, said)
            guest.socket.send(guest.challenge)
            return
        h.demand_proof(key, guest.hello, guest.challenge, said)
        self._let_in(guest, claimed)

    def _read(self, guest: _Guest) -> None:
        """No byte more than the message that is due."""
        left = (h.PROOF_BYTES if guest.hello else h.HELLO_BYTES) - len(guest.said)
        if guest.local and guest.hello:
            part, handles, _, _ = socket.recv_fds(guest.socket, left, 1)
            for handle in handles:
                if guest.memory is not None:
                    os.close(guest.memory)
                guest.memory = handle
        else:
            part = guest.socket.recv(left)
        if not part:
            raise h.NotAMember("hung up")
        guest.said += part

    def _let_in(self, guest: _Guest, claimed: h.Claim) -> None:
        key = claimed.label, claimed.rank
        if guest.memory is not None and not ring.sound(guest.memory):
            raise h.NotAMember("brought memory that isn't whole")
        guest.socket.send(WELCOME)
        self._selector.unregister(guest.socket)
        self._guests.remove(guest)
        with self._there:
            if key in self._arrived:  # a second one for the same: the first was given up by who tried again
                _close(self._arrived[key])
            self._arrived[key] = guest.socket, guest.memory
            self._there.notify_all()

    def close(self) -> None:
        """Ends the thread and every connection that nobody has taken. Once more does nothing."""
        if self._over:
            return
        self._over = True
        self._bell.send(b"!")
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._selector.close()
        closed: list[socket.socket | _Guest] = [*self._listening, *self._pulses.values(), *self._guests]
        for each in (*closed, self._bell, self._woken):
            each.close()
        if self.place.name.startswith("/"):
            Path(self.place.name).unlink(missing_ok=True)
        for arrived in self._arrived.values():
            _close(arrived)
        self._arrived.clear()


def _security(connection: socket.socket) -> int:
    return h.TLS if isinstance(connection, ssl.SSLSocket) else h.PLAIN


def _with_memory(bell: socket.socket, memory: int | None) -> Connection:
    if memory is None:
        bell.close()
        raise LinkLost("a rank of this machine brought no memory to share")
    return Connection(bell, None, memory)


def _close(arrived: tuple[socket.socket, int | None]) -> None:
    arrived[0].close()
    if arrived[1] is not None:
        os.close(arrived[1])
