"""Links between ranks as users write them: how fast, how far, and how that is brought about.

    none             as fast as this machine is
    200mbit          so many bits a second each way, headers included
    200mbit,5ms      and so long from one end to the other; none,5ms is the delay alone
    200mbit,shared   both directions share the rate, as on a radio
    1x, 0.5x,5ms     a multiple of the speed at which a prompt's messages take as long as its computation
    shaped:200mbit   not by weft's transport, but by the kernel between network namespaces; needs root

Knows texts and numbers; knows nothing of how they are kept. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from weft.errors import InputError

BURST = 68 << 10  # bytes that an idle link takes at once: the kernel's largest packet, which it else would split
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_PREFIX = "shaped:"
_EXAMPLES = "500mbit, 200mbit,5ms, 200mbit,shared, 1x or none"


@dataclass(frozen=True)
class Link:
    """`rate` in bits a second, or `times` the balance; neither: as fast as it goes. `delay`: seconds from end to end.
    `shared`: of both directions; `shaped`: by the kernel."""

    rate: float | None = None
    times: float | None = None
    delay: float = 0.0
    shared: bool = False
    shaped: bool = False

    @classmethod
    def parse(cls, text: str) -> Link:
        """Raises `InputError`."""
        lower = text.lower()
        first, *rest = lower.removeprefix(_PREFIX).split(",")
        link = cls(shaped=lower.startswith(_PREFIX))
        for number, part in enumerate([first, *rest]):
            link = link._with(part.strip(), number == 0, text)
        if link.shaped and (link.free or link.delay or link.shared):
            raise InputError(f"--link {text!r}: a shaped link has a speed and nothing else, as in shaped:200mbit")
        if link.shared and link.unlimited:
            raise InputError(f"--link {text!r}: there is no rate that both directions could share; give one")
        return link

    def _with(self, part: str, first: bool, text: str) -> Link:
        value, unit = _quantity(part)
        if first and part == "none":
            return self
        if first and value and unit == "x":
            return replace(self, times=value)
        if first and value and unit.endswith("bit"):
            return replace(self, rate=value * _UNITS[unit])
        if not first and value and unit in ("us", "ms", "s") and not self.delay:
            return replace(self, delay=value * _UNITS[unit])
        if not first and part == "shared" and not self.shared:
            return replace(self, shared=True)
        raise InputError(f"--link {text!r} is not a link: {_fault(part, first)}; write it like {_EXAMPLES}")

    @property
    def unlimited(self) -> bool:
        """True without a rate."""
        return self.rate is None and self.times is None

    @property
    def free(self) -> bool:
        """True where nothing is to be done."""
        return self.unlimited and not self.delay

    @property
    def paced(self) -> bool:
        """True where weft's transport has it to do."""
        return not self.free and not self.shaped

    def at(self, rate: float | None) -> Link:
        """The same at another speed, bits a second."""
        return replace(self, rate=rate, times=None)

    def __str__(self) -> str:
        return (_PREFIX if self.shaped else "") + ",".join(self._parts())

    def _parts(self) -> Iterator[str]:
        if self.rate is not None:
            yield f"{self.rate / 1e6:.4g}mbit" if self.rate < 1e9 else f"{self.rate / 1e9:.4g}gbit"
        else:
            yield f"{self.times:g}x" if self.times is not None else "none"
        if self.delay:
            yield f"{self.delay * 1e3:g}ms"
        if self.shared:
            yield "shared"


def _fault(part: str, first: bool) -> str:
    """What is wrong with a part that was not taken."""
    if not (match := re.fullmatch(rf"([+-]?){_NUMBER}([a-z]*)", part, re.ASCII | re.IGNORECASE)):
        return f"{part!r} isn't known there" if part else "a part of it is empty"
    sign, number, unit = match.groups()
    if not unit:
        return f"{part!r} has no unit, which is {'kbit, mbit, gbit or x' if first else 'us, ms or s'}"
    if unit not in (*_UNITS, "x"):
        return f"{unit!r} is no unit; there are kbit, mbit, gbit and x, and us, ms and s"
    if sign or not float(number):
        return f"{part!r} is not above zero" + ("" if first else "; leave a delay of zero out")
    if first:
        return f"{part!r} is a delay, and the speed goes before it, as in none,{part}"
    return f"{part!r} is one more speed, or one more delay"


NO_LINK = Link()  # of its own: messages travel as they do


def _quantity(part: str) -> tuple[float, str]:
    match = re.fullmatch(rf"{_NUMBER}(kbit|mbit|gbit|us|ms|s|x)", part, re.ASCII)
    return (float(match[1]), match[2]) if match else (0.0, "")


def links_of(text: str) -> tuple[Link, ...]:
    """A list separated by commas, as `weft bench` takes it: a delay, or `shared`, goes with the speed before it.

    Raises `InputError`.
    """
    entries: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if entries and (part == "shared" or _quantity(part)[1] in ("us", "ms", "s")):
            entries[-1] += f",{part}"
        else:
            entries.append(part)
    return tuple(Link.parse(entry) for entry in dict.fromkeys(entries))
