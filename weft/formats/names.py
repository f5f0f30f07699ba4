"""The names of a directory's tensors, from headers alone. No torch; knows safetensors' layout."""

from __future__ import annotations

import json
from pathlib import Path

from weft.errors import InputError
from weft.formats.fingerprint import INDEX, SINGLE
from weft.formats.json_files import read_json

LONGEST = 100 << 20  # bytes of a header: the library's own limit


def tensor_names(directory: Path) -> list[str]:
    """As far as they can be told; none where there are no files, or broken ones: others say what is wrong then."""
    try:
        if (single := directory / SINGLE).is_file():
            with single.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                found = json.loads(file.read(min(length, LONGEST)))
        else:
            found = read_json(directory / INDEX)["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, InputError):
        return []
    return [str(name) for name in found] if isinstance(found, dict) else []
