"""Wires as users write them: how partials travel between ranks.

    exact          as they were computed
    bf16           half the bytes of float32
    int8, int4     a quarter and an eighth and a little more (parallel/quantised.py)
    auto:int8      each sum on the most exact wire on which it hides behind computation, int8 at the least

Knows names; knows nothing of how numbers are coded.
"""

from __future__ import annotations

from weft.errors import InputError

WIRES = ("exact", "bf16", "int8", "int4")  # from the most exact one on
_AUTO = "auto:"


def allowed(text: str) -> tuple[str, ...]:
    """Wires among which sums may choose, from the most exact one on. Raises `InputError`."""
    wire = text.removeprefix(_AUTO)
    if wire not in WIRES or text == f"{_AUTO}exact":
        autos = ", ".join(f"{_AUTO}{wire}" for wire in WIRES[1:])
        raise InputError(f"--wire {text!r} is not known; allowed: {', '.join(WIRES)}, {autos}")
    return WIRES[: WIRES.index(wire) + 1] if text != wire else (wire,)


def needed(text: str) -> tuple[str, ...]:
    """Those on which anything travels then: the last sums don't go below int8, see plan/wiring.py."""
    wires = allowed(text)
    return (*wires, "int8") if wires == ("int4",) else wires


def chosen_by_cost(text: str) -> bool:
    """Whether there is a choice."""
    return text.startswith(_AUTO)
