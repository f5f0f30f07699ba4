"""The speed of a link at which a prompt's messages take as long as its computation: where overlap has most to hide.
A delay comes beside that: it is not in what is looked for.

Knows seconds and speeds; knows nothing of how a link is made slower.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_GUESS = 400e6  # bits a second, where the search starts
STEPS = 3  # each time from closer by: what messages take beside their bytes is in it then


def balance(seconds: Callable[[str], float], set_rate: Callable[[float], object]) -> float:
    """Bits a second. `seconds`: of a prompt by serial, of one scope alone, "compute" or "network"; `set_rate`: makes
    the link so fast."""
    seconds("compute")  # warms up
    compute, rate = seconds("compute"), FIRST_GUESS
    for _ in range(STEPS):
        set_rate(rate)
        rate *= seconds("network") / compute
    return rate
