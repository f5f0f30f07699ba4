"""Where a model is: the one in the package, a directory, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from weft.errors import InputError

PACKAGED = Path(__file__).parent / "packaged"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]  # no pickle, no code


def locate(model: str | Path | None, files: list[str] = FILES) -> Path:
    """The directory of a model; a hub id is downloaded into huggingface_hub's own cache, with its progress bar.

    `HF_HUB_OFFLINE=1` keeps to what the cache has. Raises `InputError` if there is no such model.
    """
    if model is None:
        return PACKAGED
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    name = str(model)
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is not a directory; give a Hugging Face checkpoint's directory or hub id")
    return _download(name, files)


def locate_config(model: str | Path | None) -> Path:
    """The same where `config.json` is all that is needed: also that file itself; nothing else is fetched."""
    if model is not None and (path := Path(model).expanduser()).name == "config.json" and path.is_file():
        return path.parent
    return locate(model, ["config.json"])


def _download(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except HFValidationError:
        raise InputError(f"{name!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B") from None
    except LocalEntryNotFoundError:
        raise InputError(f"{name!r} is no directory, not in the hub's cache, and the hub can't be reached") from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{name!r} can't be had from the hub: {str(error).splitlines()[0]}") from None
