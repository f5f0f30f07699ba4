"""Why a request is refused before it is queued, in words. Knows what pydantic says; knows no HTTP library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.batching.params import shown

MISTAKE = "the server made a mistake; its log says more"


class Refused(Exception):
    """A request that can't be served. `status`: HTTP's; `field`: of the body, which is why; `code`: OpenAI's."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code


class Gone(Exception):
    """The client went away before there was anything to answer."""


def unknown_model(given: str, name: str) -> Refused:
    """Another model than `name` is asked for."""
    return Refused(404, f"the model {shown(given)} is not served here; there is {name!r}", code="model_not_found")


def misread(errors: Sequence[Any], outer: int = 0) -> Refused:
    """What pydantic found, the first of it; of a union's members rather the one that had the right type.

    `outer`: parts of each place that stand for what holds the fields.
    """
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    places = first["loc"][outer:]
    field = next((str(part) for part in places), None)
    place = ".".join(str(part) for part in places if not _names_a_type(part))
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be"):
        message = f"{shown(first['input'])} is not allowed; it {message.removeprefix('Input ')}"
    if first["type"] == "unknown_field":
        field = field or first["ctx"]["field"]
        place = ".".join(filter(None, [place, first["ctx"]["field"]]))
    elif first["type"] == "missing":
        message = "is missing, and is needed"
    named = f"{place}: {message}" if place and not message.startswith(f"{place} ") else message
    return Refused(400, named, field)


def _names_a_type(part: int | str) -> bool:
    """pydantic says which member of a union it tried."""
    if isinstance(part, str) and part[:1].isupper():  # a class of ours
        return True
    return isinstance(part, str) and (part in ("str", "int", "nullable") or not part.replace("_", "").isalnum())
