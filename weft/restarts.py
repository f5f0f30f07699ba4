"""How often a group of workers was lost, and whether starting one more makes sense. Knows seconds; knows no processes.

A loss is one, however many tries the next start takes. What counts against the limit are groups that did not stay:
those that ended while they started, or right after it, before they had done anything. Who ends a group that works, from
outside, may do it for ever; and what a request did is that request's fault.
"""

from __future__ import annotations

import time

MOST = 3  # groups that did not stay, within SECONDS; then what ends them will not go away by itself
SECONDS = 60.0
STAYS = 1.0  # seconds after which a group that was ready counts as one that stays
PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before the next try, where other machines may come back


class Restarts:
    """Of one engine's groups; its length is how many did not stay lately. `total`: losses."""

    def __init__(self) -> None:
        self.total = 0
        self._lately: list[float] = []
        self._ready: float | None = None  # since when the group is there, as long as it has done nothing
        self._tries = 0

    def __len__(self) -> int:
        since = time.monotonic() - SECONDS
        self._lately = [then for then in self._lately if then > since]
        return len(self._lately)

    def clear(self) -> None:
        """Whatever was, was an accident."""
        self._lately.clear()

    def ready(self) -> None:
        """A group is there."""
        self._ready, self._tries = time.monotonic(), 0

    def worked(self) -> None:
        """It has done something."""
        self._ready = None

    def lost(self, blamed: bool) -> None:
        """The group is gone. `blamed`: a request may have caused it."""
        self.total += 1
        if not blamed and self._ready is not None and time.monotonic() - self._ready < STAYS:
            self._lately.append(time.monotonic())

    def failed(self) -> None:
        """The next one could not be started."""
        self._tries += 1
        self._lately.append(time.monotonic())

    @property
    def hopeless(self) -> bool:
        """True if one more start would not help."""
        return len(self) > MOST

    @property
    def pause(self) -> float:
        """Seconds to wait before the next try."""
        return PAUSES[min(self._tries, len(PAUSES) - 1)]
