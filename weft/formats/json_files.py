"""JSON that came with a model, read with limits: as much memory as its bytes, about. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft.errors import InputError

LARGEST = 32 << 20  # bytes; the index of the largest models has 10 MB, their configurations 3
MOST_VALUES = 400_000  # as brackets and commas tell; that index has 100,000


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises `InputError` for a file that is missing, has none, or has more than any model needs."""
    if not path.is_file():
        raise InputError(f"{path} is missing; a checkpoint in Hugging Face format has one")
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} has more than {LARGEST} bytes, which no model needs; download it again")
        data = path.read_bytes()
        if sum(map(data.count, (b"[", b"{", b","))) > MOST_VALUES:
            raise InputError(f"{path} has more than {MOST_VALUES} values, which no model needs; download it again")
        raw = json.loads(data.decode("utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}); download the file again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no JSON object; download the file again")
    return raw
