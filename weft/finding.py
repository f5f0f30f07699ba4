"""One line of what `weft doctor` reports. Knows words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`ok`: True, or False where something falls back or is not possible."""

    what: str
    ok: bool
    value: str
    meaning: str
