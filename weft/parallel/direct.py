"""weft's own transport: shared memory between ranks of one machine, TCP between others. Knows channels and the mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weft.parallel.channel import SPIN, Channel, Pump
from weft.parallel.mesh import Connection, Mesh
from weft.parallel.pace import Pace, Pacing
from weft.parallel.ring import RingChannel
from weft.parallel.stream import StreamChannel
from weft.parallel.transport import Wired


class Direct:
    """Over a mesh that has been joined. `spins`: each rank has a core of its own, which waiting may keep busy; `woken`:
    see `Pump`."""

    def __init__(self, mesh: Mesh, spins: bool = True, woken: Callable[[], None] = lambda: None) -> None:
        self._woken = woken
        self.rank, self._mesh, self._spin = mesh.rank, mesh, SPIN if spins else 0.0
        self._channels: list[Channel] = []
        self._pacing = Pacing()

    def open(self, purpose: str, peers: Sequence[int]) -> dict[int, Wired]:
        """Channels that one thread at a time moves."""
        pump, made = Pump(lambda: self._mesh.lost, self._spin, self._woken), dict[int, Wired]()
        for peer, connection in self._mesh.connections(purpose, peers).items():
            made[peer] = channel = self._channel(peer, pump, connection)
            self._channels.append(channel)
        return made

    def _channel(self, peer: int, pump: Pump, connection: Connection) -> Channel:
        if connection.memory is not None:
            return RingChannel(peer, pump, connection.memory, connection.out, first=self.rank < peer)
        assert connection.into is not None
        return StreamChannel(peer, pump, connection.out, connection.into, self._pacing)

    def pace(self, pace: Pace | None) -> None:
        """From now on messages take as long as over this link; those through memory don't know of links."""
        assert not any(isinstance(channel, RingChannel) for channel in self._channels), "memory is no link"
        self._pacing.by(pace)

    def close(self) -> None:
        """Closes all, and leaves the mesh."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        self.pace(None)
        self._mesh.close()
