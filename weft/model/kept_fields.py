"""Configurations as transformers completes them, kept: importing it to complete one takes seconds, each time anew.

Only what a file leaves out needs that, so most configurations never come here. Knows fields and files; knows no family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

MOST = 200  # that are kept, the ones used last

Fields = dict[str, Any]


def folder() -> Path:
    """Where they are."""
    return user_cache_path("weft") / "configurations"


def kept_fields(raw: Fields, complete: Callable[[Fields], Fields | None]) -> Fields | None:
    """What `complete` makes of a configuration, or has made of it before, with the same versions of both."""
    try:
        key = json.dumps([raw, version("transformers"), version("weft")], sort_keys=True)
    except (TypeError, ValueError):  # what JSON can't say
        return complete(raw)
    path = folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if (kept := _kept(path, raw)) is not None:
        return kept
    fields = complete(raw)
    with suppress(TypeError, ValueError):
        fields = json.loads(json.dumps(fields))  # what is kept and what is new are to be alike
        if fields is not None:
            _keep(path, {"raw": raw, "fields": fields})
    return fields


def _kept(path: Path, raw: Fields) -> Fields | None:
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text("utf-8"))
        if isinstance(kept, dict) and kept.get("raw") == raw and isinstance(kept.get("fields"), dict):
            path.touch()
            return dict(kept["fields"])
    return None


def _keep(path: Path, kept: Fields) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(kept), "utf-8")
        fresh.replace(path)
        for old in sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)
