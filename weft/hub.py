"""Where a model is: the one in the package, a directory, a .gguf file, or the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from weft.errors import InputError
from weft.formats.fingerprint import INDEX, SINGLE, weight_files
from weft.formats.gguf.files import SPLIT, is_gguf

PACKAGED = Path(__file__).parent / "packaged"
FILES = ["*.json", "*.jinja", "*.txt"]  # no pickle, no code; and the weights that these name
ELSEWHERE = ["*/*"]  # sub-directories hold the same in other formats
TAG = re.compile(r"(?:.*?[-._])?((?:UD-)?(?:IQ|TQ|Q|BF|FP?|MXFP|NVFP)\d\w*)", re.IGNORECASE)
BESIDE = ("mmproj", "imatrix")  # what is in such files are not models


def locate(model: str | Path | None, weights: bool = True) -> Path:
    """The directory of a model, or its .gguf file; what a hub id names is downloaded into huggingface_hub's own cache,
    with its progress bar. owner/repo:Q4_K_M is that .gguf file of several, as DIRECTORY:Q4_K_M is.

    Only what is needed is fetched, each tensor once. `HF_HUB_OFFLINE=1` keeps to what the cache has.
    Raises `InputError` if there is no such model.
    """
    if model is None:
        return PACKAGED
    name, path = str(model), _place(str(model))
    if path.is_dir():
        return path if _has_tensors(path) or not any(path.glob("*.gguf")) else _of_directory(path, None)
    before, _, tag = name.rpartition(":")
    if before and _place(before).is_dir():
        return _of_directory(_place(before), tag)
    if before and _place(before).is_file():
        raise InputError(f"{before} is a file; leave out :{tag}")
    if is_gguf(path) and not path.is_file() and not before:
        raise InputError(f"{name} is missing; give a .gguf file, a directory, or a hub id as in owner/repo:Q4_K_M")
    if path.is_file():
        if not is_gguf(path):
            raise InputError(f"{name} is a file; give the directory that it is in, or a .gguf file")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or (before or name).count("/") > 1:
        raise InputError(f"{name} is not a directory; give a Hugging Face checkpoint's, a .gguf file or a hub id")
    return _asked(name, lambda: _file_of(before, tag, weights) if before else _download(name, weights))


def locate_config(model: str | Path | None) -> Path:
    """What says how a model is made, where nothing else is needed, nor fetched: a configuration's file of any name, a
    directory, or a .gguf file."""
    if model is not None:
        path = _place(str(model))
        if path.is_file() and not is_gguf(path):
            return path
        if path.suffix.lower() == ".json":
            raise InputError(f"{model} is missing; give a model's config.json, its directory or hub id")
    return locate(model, weights=False)


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


def _has_tensors(path: Path) -> bool:
    """Whether it is a directory in Hugging Face's format, though GGUF files may lie there too."""
    return any((path / name).is_file() for name in (SINGLE, INDEX))


def _of_directory(path: Path, tag: str | None) -> Path:
    """The one .gguf model in it, or the one of that name."""
    found = [file for file in (*path.glob("*.gguf"), *path.glob("*/*.gguf")) if file.is_file()]
    there = [str(file.relative_to(path)) for file in found]
    return path / chosen(str(path), there, tag)[0]


def chosen(where: str, files: Iterable[str], tag: str | None) -> list[str]:
    """All files of one GGUF model of those that are there. Raises `InputError` that says what there is, if `tag`, such
    as Q4_K_M, is not one of them alone, or none is given and there are several."""
    models: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        if is_gguf(Path(file)) and not any(part in PurePosixPath(file).name.lower() for part in BESIDE):
            models.setdefault(_stem(file), []).append(file)
    meant = [each for each in models if tag is None or _is(each[0], models[each], tag)]
    named = [each for each in meant if tag is not None and tag.lower() == _tag(each[0]).lower()]  # not UD-Q4_K_XL too
    found = named if len(named) == 1 else meant
    if len(found) == 1:
        return models[found[0]]
    tags = sorted({_tag(stem) for stem, _ in models})
    if not tags:
        raise InputError(f"{where} has no .gguf file")
    if not found:
        what = f"{where} has no {tag}; it" if tag else f"nothing stands behind the colon; {where}"
        raise InputError(f"{what} has {', '.join(tags)}: give one of them, as in {where}:{tags[0]}")
    own = [_tag(stem) for stem, _ in found]
    which = sorted(own) if len({*own}) == len(own) else sorted(models[each][0] for each in found)
    raise InputError(f"{where} has {', '.join(which)}: give one of them, as in {where}:{which[0]}")


def _stem(file: str) -> tuple[str, str]:
    """What all files of a model have in common: their name, and how many they are, if they are several."""
    path = PurePosixPath(file)
    split = SPLIT.fullmatch(path.name)
    return (str(path.with_name(split[1])), split[3]) if split else (str(path.with_suffix("")), "")


def _tag(stem: str) -> str:
    """How a model is told from others: by how its weights are stored, where its name ends so."""
    found = TAG.fullmatch(PurePosixPath(stem).name)
    return found[1] if found else stem


def _is(stem: str, files: Sequence[str], tag: str) -> bool:
    """Whether that names a model: one of its files, the end of its name or all of it, or its directory."""
    path, wanted = PurePosixPath(stem.lower()), tag.lower()
    if is_gguf(Path(tag)):
        return any(wanted in (file.lower(), PurePosixPath(file.lower()).name) for file in files)
    ends = path.name.endswith(tuple(mark + wanted for mark in "-._"))
    return bool(wanted) and (wanted in (path.name, str(path), path.parent.name) or ends)


def _download(name: str, weights: bool) -> Path:
    """A repository's directory, or its only .gguf model."""
    from huggingface_hub import snapshot_download

    wanted = FILES if weights else ["config.json"]
    directory = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=ELSEWHERE))
    if weights:
        needed = [file.name for file in weight_files(directory)]
        directory = Path(snapshot_download(name, allow_patterns=needed, ignore_patterns=ELSEWHERE))
    configured = (directory / "config.json").is_file()
    if (configured and (not weights or _has_tensors(directory))) or not any(is_gguf(Path(f)) for f in _listed(name)):
        return directory  # what is missing, its reader says
    return _file_of(name, None, weights)


def _file_of(name: str, tag: str | None, weights: bool) -> Path:
    """A .gguf model of a repository, all its files; without `weights` only if it is in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = chosen(name, _listed(name), tag)
    try:
        paths = [Path(hf_hub_download(name, file, local_files_only=not weights)) for file in files]
    except LocalEntryNotFoundError:
        if weights:
            raise
        raise InputError(f"{files[0]} of {name} is not here yet, and all of it would be fetched for its header; give "
                         "the model that it was made from, which has a config.json") from None  # fmt: skip
    return paths[0]


def _listed(name: str) -> Sequence[str]:
    """A repository's files; where the hub isn't asked, or doesn't answer, those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return list(HfApi().list_repo_files(name))
    except HFValidationError:
        raise
    except Exception as error:  # whatever kept it from answering: its HTTP client's own, or the wish to stay offline
        try:
            directory = Path(snapshot_download(name, allow_patterns=[], local_files_only=True))
        except LocalEntryNotFoundError:
            raise error if isinstance(error, HfHubHTTPError) else LocalEntryNotFoundError(str(error)) from None
        return [str(file.relative_to(directory)) for file in directory.rglob("*.gguf")]


def _asked(name: str, ask: Callable[[], Path]) -> Path:
    """The hub's answer. Raises `InputError` for all that can go wrong there."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what is wrong is said below, once
    try:
        return ask()
    except HFValidationError:
        raise InputError(f"{name!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B") from None
    except LocalEntryNotFoundError:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        why = "HF_HUB_OFFLINE keeps weft from asking the hub" if HF_HUB_OFFLINE else "the hub can't be reached"
        told = f"{name!r} is no directory or file, not in the hub's cache, and {why}"
        raise InputError(f"{told}; give one that is here, or try again") from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{name!r} can't be had from the hub: {next(iter(str(error).splitlines()), '')}") from None
