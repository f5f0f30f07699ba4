"""What wires, weights, keys and values of few bits do to a model's answers: figures, limits, and where they are kept.

`weft bench quality` (bench/quality.py) measures them; `auto:` leaves out a wire that was found to exceed its limit for
a model on as many ranks. Knows files and figures; measures nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from weft.formats.fingerprint import fingerprint
from weft.wires import WIRES, allowed, chosen_by_cost

LIMITS = {  # of perplexity, above exact's
    "bf16": 0.001, "int8": 0.001, "int4": 0.015,
    "weights bfloat16": 0.002, "weights int8": 0.005, "weights int4": 0.04, "kv int8": 0.002,
}  # fmt: skip
SURE = 2.0  # standard errors by which a limit must be exceeded
ENOUGH = 4000  # tokens: what fewer say is not kept
CODECS = 1  # counts what was measured of another form of the wires


class Quality(msgspec.Struct, frozen=True):
    """One wire's, or that of weights or of keys and values in a format, on some text: perplexity; `above`: how much it
    is above exact's, as a part of that, with `unsure`, its standard error; `divergence`: Kullback-Leibler's from
    exact's distributions of the next token, in nats, in the mean and (`divergence_99`) at the 99th percentile;
    `agreement`: the part of positions where the likeliest token is the same. `bytes`: of a number."""

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
        """The limit, for sure."""
        return self.limit is not None and self.above - SURE * self.unsure > self.limit


class Assessment(msgspec.Struct, frozen=True):
    """Of one model on so many ranks, computing in a `dtype`; `when`, and on which text, of how many tokens."""

    ranks: int
    dtype: str
    text: str
    tokens: int
    when: str
    wires: list[Quality]


def keep(path: Path, measured: Assessment) -> bool:
    """For later starts: of each wire, number of ranks and dtype what was found on most tokens, lately. False for what
    says too little; where the file can't be written, later starts go without."""
    if measured.tokens < ENOUGH:
        return False
    known = {_key(each): each for each in recall(path)}
    for one in (msgspec.structs.replace(measured, wires=[quality]) for quality in measured.wires):
        if _key(one) not in known or known[_key(one)].tokens <= one.tokens:
            known[_key(one)] = one
    file = _file(path)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode(list(known.values())))
    return True


def recall(path: Path) -> list[Assessment]:
    """What was measured of this model, each of one wire."""
    try:
        return msgspec.json.decode(_file(path).read_bytes(), type=list[Assessment])
    except (OSError, msgspec.MsgspecError):
        return []


def within_limits(path: Path, wire: str, ranks: int, dtype: str) -> tuple[str, list[str]]:
    """The wire to use for this model, and lines for whoever asked for it: of a choice of wires none is left that was
    found to exceed its limit, nor any less exact one. What was chosen outright is used."""
    if not chosen_by_cost(wire) or ranks == 1:
        return wire, []
    known = {each.wires[0].wire: each for each in recall(path) if (each.ranks, each.dtype) == (ranks, dtype)}
    left, lines = allowed(wire), list[str]()
    worse = next((each for each in left[1:] if each in known and known[each].wires[0].exceeds), None)
    if worse is not None:
        lines.append(_why_not(known[worse], left[left.index(worse) :]))
        left = left[: left.index(worse)]
    if unknown := [each for each in left[1:] if each not in known and each != "bf16"]:
        named = f"wires {' and '.join(unknown)} do" if len(unknown) > 1 else f"wire {unknown[0]} does"
        tell = f"weft bench quality --tp {ranks} measures it"
        lines.append(f"what {named} to this model's answers on {ranks} ranks isn't known: {tell}")
    return (f"auto:{left[-1]}" if len(left) > 1 else WIRES[0]), lines


def _why_not(found: Assessment, gone: Sequence[str]) -> str:
    quality = found.wires[0]
    named = f"wire {quality.wire} is" if len(gone) == 1 else f"wires {' and '.join(gone)} are"
    return (
        f"{named} left out for this model: with {quality.wire} perplexity is {quality.above:.2%} above exact's, the "
        f"limit {quality.limit:.1%} (weft bench quality, {found.when})"
    )


def _key(measured: Assessment) -> tuple[str, int, str]:
    return measured.wires[0].wire, measured.ranks, measured.dtype


def _file(path: Path) -> Path:
    files = fingerprint(path)
    name = hashlib.sha256(msgspec.json.encode([CODECS, files])).hexdigest()[:20]
    return user_cache_path("weft") / "quality" / f"{name}.json"
