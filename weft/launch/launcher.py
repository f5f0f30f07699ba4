"""What the engine needs of whatever starts its workers, and what a worker finds in its environment.

Knows nothing of how or where workers run; a cluster engine is one more launcher.
"""

from __future__ import annotations

from typing import Protocol

TOKEN_VARIABLE = "WEFT_TOKEN"  # in the environment: a command line is seen by everyone
LEASE_VARIABLE = "WEFT_LEASE"  # set by a launcher that holds the worker's standard input open while it lives


class Launcher(Protocol):
    """Starts the worker command some number of times. `link_name`: of the link between the workers, for who keeps
    measurements of it."""

    @property
    def link_name(self) -> str:
        """Such as loopback."""
        ...

    def start(self, count: int, threads: int, address: str, token: str) -> None:
        """Starts `count` workers that join `address`."""
        ...

    def pids(self) -> list[int]:
        """Process ids of what was started, in no particular order."""
        ...

    def dead(self) -> list[str]:
        """What is known of workers that have ended, or that can't go on: a line each."""
        ...

    def stop(self) -> None:
        """Ends all workers; returns when none is left."""
        ...
