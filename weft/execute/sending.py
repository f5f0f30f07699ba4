"""What a machine that has not got the model is sent of it, and what is said of that meanwhile, there and here.

Knows files and machines; knows nothing of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from weft.errors import InputError
from weft.formats.fingerprint import Held, Wanted, cut_out
from weft.launch.launcher import Other

EVERY = 5.0  # seconds between two lines


class Sending:
    """To one machine. `told`: what goes on, in words, for who runs this one."""

    def __init__(self, held: Held, other: Other, told: Callable[[str], None]) -> None:
        self._held, self._other, self._told = held, other, told
        self._begun = self._said = time.monotonic()
        self._bytes = 0
        told(f"{other} has not got the model and fetches its part of it from here")

    def cut_out(self, wanted: Wanted, share: float) -> bytes:
        """These bytes. `share`: of the rank's part that is read.

        Raises `LookupError` for bytes that aren't there, `InputError` for a file that can't be read.
        """
        try:
            data = cut_out(Path(self._held.path), self._held.files, wanted)
        except OSError as error:
            raise InputError(f"{self._held.path}: {wanted.file} can't be read ({error.strerror})") from None
        self._bytes += len(data)
        if time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self._say(f"{self._bytes / 1e6:,.0f} MB fetched, {share:.0%} of its part is read")
        return data

    def over(self) -> None:
        """The rank is ready."""
        self._say(f"{self._bytes / 1e6:,.0f} MB fetched in {time.monotonic() - self._begun:.0f} s, and kept there")

    def _say(self, line: str) -> None:
        self._told(f"{self._other}: {line}")
        self._other.say(line)
