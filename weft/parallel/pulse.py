"""Whether the other ranks can still be reached, over the network that the collectives use.

A collective whose peer hangs, or whose link is down, waits for ever: TCP does not tell. So every rank sends its peers
a small datagram twice a second, from a thread of its own, and says so when it hears nothing from one. Knows addresses
and seconds; knows nothing of collectives or of who is told.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

EVERY = 0.5  # seconds
SILENT = 3.0  # seconds after which a peer counts as lost
OWN_PAUSE = 1.5  # seconds that this thread itself did not run: then nothing is known of the others


class Pulse:
    """Sends and listens until `stop()`. `store`: where ranks find each other. `lost(peer, seconds)` is told, again and
    again while a peer is silent."""

    def __init__(self, rank: int, world: int, store: Any, address: str, lost: Callable[[int, float], None]) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self._socket.settimeout(EVERY)
        self.rank, self._lost = rank, lost
        port, nonce = self._socket.getsockname()[1], secrets.token_hex(8)
        store.set(f"pulse/{rank}", f"{address} {port} {nonce}")
        entries = {peer: store.get(f"pulse/{peer}").decode().split() for peer in range(world) if peer != rank}
        self._peers = {peer: (host, int(port)) for peer, (host, port, _) in entries.items()}
        self._names = {nonce.encode(): peer for peer, (_, _, nonce) in entries.items()}
        self._own = nonce.encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="weft-pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        heard: dict[int, float] = {}  # a peer that was never heard is behind a firewall, not lost
        before = sent = 0.0
        while not self._over.is_set():
            now = time.monotonic()
            if now - before > OWN_PAUSE:
                heard = dict.fromkeys(heard, now)
            before = now
            if now - sent >= EVERY:
                sent = now
                self._send()
            for peer, then in list(heard.items()):
                if now - then > SILENT:
                    heard[peer] = now  # and again, should it stay silent: who is told may not listen yet
                    self._lost(peer, now - then)
            with suppress(OSError):  # nothing came, or the network is down: silence says it
                sender = self._names.get(self._socket.recv(64))
                if sender is not None:
                    heard[sender] = time.monotonic()

    def _send(self) -> None:
        for place in self._peers.values():
            with suppress(OSError):
                self._socket.sendto(self._own, place)

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join(timeout=2 * EVERY)
        self._socket.close()
