"""What less exact wires do to a model's answers: figures, limits, and where they are kept.

`weft bench quality` (bench/quality.py) measures them; `auto:` leaves out a wire that was found to exceed its limit for
a model. Knows files and figures; measures nothing.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from weft.model.fingerprint import fingerprint
from weft.wires import WIRES, allowed, chosen_by_cost

LIMITS = {"bf16": 0.001, "int8": 0.001, "int4": 0.015}  # of perplexity, above exact's
CODECS = 1  # counts what was measured of another form of the wires


class Quality(msgspec.Struct, frozen=True):
    """One wire's, on some text: perplexity; `above`: how much it is above exact's, as a part of that, with `unsure`,
    its standard error; `divergence`: Kullback-Leibler's from exact's distributions of the next token, in nats, in the
    mean and (`divergence_99`) at the 99th percentile; `agreement`: the part of positions where the likeliest token is
    the same. `bytes`: of a number."""

    wire: str
    bytes: float
    perplexity: float
    above: float
    unsure: float
    divergence: float
    divergence_99: float
    agreement: float

    @property
    def limit(self) -> float | None:
        """For `above`; none for exact."""
        return LIMITS.get(self.wire)

    @property
    def exceeds(self) -> bool:
        """The limit."""
        return self.limit is not None and self.above > self.limit


class Measured(msgspec.Struct, frozen=True):
    """Of one model on so many ranks; `when`, and on which text, of how many tokens."""

    ranks: int
    text: str
    tokens: int
    when: str
    wires: list[Quality]


def keep(directory: Path, measured: Measured) -> None:
    """For later starts. Where that fails, they go without."""
    path = _path(directory)
    known = [each for each in recall(directory) if (each.ranks, each.text) != (measured.ranks, measured.text)]
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode([*known, measured]))


def recall(directory: Path) -> list[Measured]:
    """What was measured of the model in this directory."""
    try:
        return msgspec.json.decode(_path(directory).read_bytes(), type=list[Measured])
    except (OSError, msgspec.MsgspecError):
        return []


def within_limits(directory: Path, wire: str) -> tuple[str, list[str]]:
    """The wire to use for this model, and lines for whoever asked for it: of a choice of wires none is left that was
    found to exceed its limit. What was chosen outright is used."""
    if not chosen_by_cost(wire):
        return wire, []
    known = {quality.wire: (quality, each) for each in recall(directory) for quality in each.wires}
    left, lines = allowed(wire), []
    for each in left[1:]:
        if each in known and known[each][0].exceeds:
            quality, measured = known[each]
            lines.append(
                f"wire {each} is left out for this model: perplexity is {quality.above:.2%} above exact's, the limit "
                f"{quality.limit:.1%} (weft bench quality, {measured.when})"
            )
            left = left[: left.index(each)]
            break
    unknown = [each for each in left[1:] if each not in known and each != "bf16"]
    if unknown:
        named = f"wires {' and '.join(unknown)} do" if len(unknown) > 1 else f"wire {unknown[0]} does"
        lines.append(f"what {named} to this model's answers isn't known: weft bench quality measures it")
    return (f"auto:{left[-1]}" if len(left) > 1 else WIRES[0]), lines


def _path(directory: Path) -> Path:
    files = fingerprint(directory)
    name = hashlib.sha256(msgspec.json.encode([CODECS, files])).hexdigest()[:20]
    return user_cache_path("weft") / "quality" / f"{name}.json"
