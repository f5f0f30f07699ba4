"""What the engine needs of whatever starts its workers, and what a worker finds in its environment.

Knows nothing of how or where workers run; a cluster engine is one more launcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

VERSION = 15  # of all that machines and their ranks say to each other; both sides speak the same, or not at all
TOKEN_VARIABLE = "WEFT_TOKEN"  # in the environment: a command line is seen by everyone
PLACE_VARIABLE = "WEFT_PLACE"  # of a worker in the order of ranks
MODEL_VARIABLE = "WEFT_MODEL"  # where the model is, if not where the engine has it
LEASE_VARIABLE = "WEFT_LEASE"  # set by a launcher that holds the worker's standard input open while it lives


class Other(Protocol):
    """Another machine, on which a rank is."""

    def say(self, line: str) -> None:
        """Says a line to whoever runs it."""
        ...

    def refuse(self, reason: str) -> None:
        """Doesn't use it any more, and says why, there and here."""
        ...

    def doubt(self, line: str) -> None:
        """Says a line there, and uses others rather than it."""
        ...


class Launcher(Protocol):
    """Starts the worker command some number of times. `link_name`: of the link between the workers, for who keeps
    measurements of it."""

    @property
    def link_name(self) -> str:
        """Such as loopback."""
        ...

    @property
    def one_clock(self) -> bool:
        """True if all workers read the same clock."""
        ...

    @property
    def leaves_machine(self) -> bool:
        """True if messages between workers may leave this machine: then they are encrypted."""
        ...

    @property
    def shares_memory(self) -> bool:
        """True if workers of one machine may share its memory; False if they are to talk as if on several."""
        ...

    def shape(self, rate: float | None) -> bool:
        """Makes the links between workers so fast, bits a second, or as fast as they go; False if it has no way to."""
        ...

    meanwhile: Callable[[], None]  # set by who starts workers: called again and again while that waits for machines
    told: Callable[[str], None]  # what goes on, in words, for who runs this

    @property
    def may_change(self) -> bool:
        """True if what is missing may come back, or be replaced, while one waits: other machines."""
        ...

    def here(self, ranks: int) -> int:
        """How many of so many ranks are on this machine."""
        ...

    def demand(self, terms: bytes) -> None:
        """What other machines must have; whoever looks after them there can read it. Before `start`."""
        ...

    def elsewhere(self, place: int) -> Other | None:
        """The machine of the rank at this place, if it is another one."""
        ...

    def attend(self) -> None:
        """Answers other machines, where nothing else is wanted of it for a while. Raises `Interrupted`."""
        ...

    def control_address(self, folder: str) -> str:
        """Where the engine is to listen for workers, as ZeroMQ writes it; `folder` is the engine's own."""
        ...

    def start(self, threads: int, address: str, tokens: Sequence[str]) -> None:
        """Starts as many workers that join `address`, each with a token of its own."""
        ...

    def pids(self) -> list[int]:
        """Process ids of what was started, in no particular order."""
        ...

    def dead(self) -> list[str]:
        """What is known of workers that have ended, or that can't go on: a line each."""
        ...

    def last_words(self) -> list[str]:
        """What workers that have ended printed last: for who runs them."""
        ...

    def crashed(self) -> bool:
        """True if a worker has ended by its own fault, not because somebody killed it."""
        ...

    def stop(self) -> None:
        """Ends all workers; returns when none is left. Others may be started then."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...
