"""Figures as people read them: three digits, and the unit that suits. Knows no other room."""

from __future__ import annotations


def digits(value: float) -> str:
    """Three significant ones, or all in front of the point: 0.0123, 1.23, 12,345."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or not value else f"{value:.0e}"


def duration(seconds: float) -> str:
    """In seconds from one second on, else in milliseconds."""
    return f"{digits(seconds)} s" if seconds >= 0.9995 else f"{digits(seconds * 1e3)} ms"


def times(factor: float) -> str:
    """How much of something that is: 1.3 times; 12 times."""
    return f"{factor:.1f} times" if factor < 9.95 else f"{factor:,.0f} times"


def counted(count: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
