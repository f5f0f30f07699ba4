"""Where a model is: the one in the package, a directory, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from weft.errors import InputError
from weft.model.fingerprint import weight_files

PACKAGED = Path(__file__).parent / "packaged"
FILES = ["*.json", "*.jinja", "*.txt"]  # no pickle, no code; and the weights that these name
ELSEWHERE = ["*/*"]  # sub-directories hold the same in other formats
GGUF = "GGUF can't be read yet; give the model as a Hugging Face directory or hub id with safetensors"


def locate(model: str | Path | None, weights: bool = True) -> Path:
    """The directory of a model; a hub id is downloaded into huggingface_hub's own cache, with its progress bar.

    Only what is needed is fetched, each tensor once. `HF_HUB_OFFLINE=1` keeps to what the cache has.
    Raises `InputError` if there is no such model.
    """
    if model is None:
        return PACKAGED
    name, directory = str(model), _place(str(model))
    if directory.is_dir():
        if not (directory / "config.json").is_file() and any(directory.glob("*.gguf")):
            raise InputError(f"{name} has no config.json, and a .gguf file: {GGUF}")
        return directory
    if name.lower().endswith(".gguf") or re.fullmatch(r"[\w.-]+/[\w.-]+:[\w.-]+", name):
        missing = "there is no such file, and " if not directory.is_file() and ":" not in name else ""
        raise InputError(f"{name}: {missing}{GGUF}")
    if directory.is_file():
        raise InputError(f"{name} is a file; give the directory that it is in")
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is not a directory; give a Hugging Face checkpoint's directory or hub id")
    return _download(name, weights)


def locate_config(model: str | Path | None) -> Path:
    """The configuration's file, where nothing else is needed, nor fetched: in such a directory, or itself, whatever its
    name."""
    if model is not None:
        path = _place(str(model))
        if path.is_file() and path.suffix.lower() != ".gguf":
            return path
        if path.suffix.lower() == ".json":
            raise InputError(f"{model} is missing; give a model's config.json, its directory or hub id")
    return locate(model, weights=False) / "config.json"


def _place(name: str) -> Path:
    """Where that would be. Raises `InputError` for what the system takes for no name."""
    try:
        if "\0" in name or not name:
            raise ValueError("it is empty, or holds a zero byte")
        path = Path(name).expanduser()
        path.exists()
    except (ValueError, RuntimeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name[:100]!r} is no name of a model ({reason}); give a directory or a hub id") from None
    return path


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=["config.json"]))
        directory = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=ELSEWHERE))
        return Path(snapshot_download(name, allow_patterns=weight_files(directory), ignore_patterns=ELSEWHERE))
    except HFValidationError:
        raise InputError(f"{name!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B") from None
    except LocalEntryNotFoundError:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        why = "HF_HUB_OFFLINE keeps weft from asking the hub" if HF_HUB_OFFLINE else "the hub can't be reached"
        raise InputError(f"{name!r} is no directory, not in the hub's cache, and {why}") from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{name!r} can't be had from the hub: {str(error).splitlines()[0]}") from None
