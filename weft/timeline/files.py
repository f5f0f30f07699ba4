"""Timelines as files: read, and written in the form that a file's name asks for.

Knows timelines and files; knows nothing of how timelines were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.errors import InputError
from weft.timeline.page import page
from weft.timeline.svg import svg
from weft.timeline.timeline import Timeline

FORMS = {".json": "read back by weft timeline, opened by Perfetto", ".svg": "a picture", ".html": "a page"}


def demand_form(path: Path, option: str, forms: Sequence[str] = tuple(FORMS)) -> None:
    """Raises `InputError` unless the file's name ends in one of these forms."""
    if path.suffix not in forms:
        names = ", ".join(f"{form} ({FORMS[form]})" for form in forms)
        raise InputError(f"{option} {path}: give a name that ends in one of {names}")


def timelines_as(path: Path, timelines: Sequence[Timeline]) -> str:
    """The text of a file of this name: the first timeline as .json, or all of them as one picture."""
    if path.suffix == ".json":
        return timelines[0].to_json() + "\n"
    return svg(timelines) if path.suffix == ".svg" else page(timelines)


def demand_writable(path: Path | None, option: str) -> None:
    """Raises `InputError` if nothing can be written there: before an hour of measuring, not after it."""
    if path is None:
        return
    there = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(f"{option} {path} can't be written ({error.strerror}); choose another file") from None
    if not there:
        path.unlink()


def write(path: Path, text: str) -> None:
    """Writes a text file. Raises `InputError` with the system's reason, such as a full disk."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}); choose another file") from None


def read_timeline(path: Path) -> Timeline:
    """Reads what `write_timelines` wrote as .json. Raises `InputError`."""
    try:
        return Timeline.from_json(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
