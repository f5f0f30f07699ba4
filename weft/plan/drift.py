"""Notices that costs have changed: links get slower, machines get busy. Knows seconds; knows nothing of programs.

Batches with small sums (decoding) and with large ones (prompts) are told apart: what limits the one is not what limits
the other.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from weft.plan.candidates import Estimate
from weft.simulate.cost import Costs
from weft.timeline.timeline import median

SEEN = 7  # of the last batches the median decides: four in a row that differ are enough, three odd ones are not
FEWEST = 4
NOTICED = 0.12  # a smaller difference is noise
TOLD = {False: 1.3, True: 2.0}  # smaller ones are nobody's concern; tokens one upon the other find all in the cache
STEP = 1.06  # factors are powers of it: one that comes again finds what was planned under it
COUNTS = 0.1  # of what both lanes are busy: a lane that does and should do less says nothing


class Factors(NamedTuple):
    """How much longer computation and communication take than their costs say."""

    compute: float = 1.0
    network: float = 1.0


class Drift:
    """Corrections of costs."""

    def __init__(self) -> None:
        self.factors = {True: Factors(), False: Factors()}  # by smallness
        self._seen = {small: (deque[float](maxlen=SEEN), deque[float](maxlen=SEEN)) for small in self.factors}

    def observe(self, small: bool, predicted: Estimate, factors: Factors, compute: float, network: float) -> bool:
        """What a batch took against what it was predicted to take under `factors`; True if that changes them."""
        before, lanes = self.factors[small], ((compute, predicted.compute), (network, predicted.network))
        ratios, whole = [], predicted.compute + predicted.network
        for seen, then, now, (measured, expected) in zip(self._seen[small], factors, before, lanes, strict=True):
            if min(measured, expected) > 0 and max(measured, expected) > COUNTS * whole:
                seen.append(measured / expected * then)
            ratios.append(median(seen) if len(seen) >= FEWEST else now)
        if all(abs(new / old - 1) < NOTICED for new, old in zip(ratios, before, strict=True)):
            return False
        self.factors[small] = Factors(*(STEP ** round(math.log(ratio, STEP)) for ratio in ratios))
        return True

    def corrected(self, costs: Costs, small: bool) -> Costs:
        """The costs as they seem to be now, for batches of this kind."""
        return costs.scaled(*self.factors[small])

    def describe(self) -> str | None:
        """One line on what has changed by much since the calibration; None if nothing has."""
        said = [
            f"{what} takes {factor:.2f} times as long for {'tokens' if small else 'prompts'}"
            for small, factors in self.factors.items()
            for what, factor in zip(("computation", "communication"), factors, strict=True)
            if not 1 / TOLD[small] < factor < TOLD[small]
        ]
        if not said:
            return None
        return f"since the calibration {', '.join(said)}, and plans follow; --recalibrate measures anew"
