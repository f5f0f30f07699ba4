"""Values of options that several commands share, from text. Knows text; knows nothing of what is done with it."""

from __future__ import annotations

from typing import Literal

from weft.errors import InputError


def words(text: str, name: str) -> tuple[str, ...]:
    """A list separated by commas, each entry once. Raises `InputError` if it is empty or has a hole.

    What follows an @ sign, as in iso@300,700, stays together: the entry goes on while numbers follow.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if found and "@" in found[-1] and part[:1].isdigit():
            found[-1] += f",{part}"
        else:
            found.append(part)
    if not all(found):
        raise InputError(f"{name} {text!r} has an empty entry; separate entries by single commas")
    return tuple(dict.fromkeys(found))


def numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers separated by commas. Raises `InputError`."""
    listed = words(text, name)
    try:
        return tuple(int(word) for word in listed)
    except ValueError:
        raise InputError(f"{name} {text!r} is not a list of whole numbers; write it like 512,2048") from None


def relative_shares(text: str | None) -> tuple[float, ...] | None:
    """Relative sizes of the ranks' parts. Raises `InputError`."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--shares {text!r} is not a list of numbers; give one a rank, as in 2,1") from None


def shares_or_auto(text: str | None) -> tuple[float, ...] | Literal["auto"] | None:
    """The same, or "auto": by the ranks' measured speed. Raises `InputError`."""
    return "auto" if text == "auto" else relative_shares(text)
