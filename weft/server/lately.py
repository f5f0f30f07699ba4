"""What a service did in the last seconds, for the page. Knows numbers and the last batch."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from weft.timeline.timeline import median
from weft.turn import Turn


@dataclass
class Live:
    """What the page shows of the last seconds."""

    tokens: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=10_000))  # when, how many
    first: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # seconds to the first token
    drawn: Turn | None = None  # the last batch that was recorded, with its timeline
    number: int = 0  # how many were recorded
    wanted: bool = False  # somebody looks, so that the next batch is to be recorded

    def rate(self, over: float = 10.0) -> float:
        """Tokens a second, of the last seconds. For any thread, as is `to_first`."""
        since = time.monotonic() - over
        return sum(count for when, count in self.tokens.copy() if when > since) / over

    def to_first(self) -> float | None:
        """Seconds to the first token, in the median; None if there was none yet."""
        first = self.first.copy()  # in one go: the engine's thread appends meanwhile
        return median(first) if first else None
