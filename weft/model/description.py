"""What a model says of itself, whatever its files: configuration, proposals for sampling, tokenizer, chat template.

`path` is a directory in Hugging Face's format, or a .gguf file. Knows metadata; knows nothing of tensors. No torch.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from weft.config import ModelConfig
from weft.errors import InputError
from weft.formats.gguf.files import GgufFiles, is_gguf
from weft.formats.json_files import read_json
from weft.formats.names import tensor_names
from weft.formats.schemes import scheme_of
from weft.model.configuration import configured
from weft.model.families import family_of
from weft.model.gguf import gguf_fields

GGUF_POOLINGS = {1: "mean", 3: "last"}
PROPOSED = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # fmt: skip


def model_config(path: Path) -> ModelConfig:
    """Of a model, or from a configuration's file of any name.

    Raises `InputError` if it is missing, unreadable, or can't be run.
    """
    if is_gguf(path):
        return _checked(path, gguf_fields(path))
    if not path.is_file():
        if not path.is_dir():
            raise InputError(f"{path} is not a directory; give a Hugging Face checkpoint's, a .gguf file or a hub id")
        path = path / "config.json"
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise InputError(f"{path} has no model_type; it is not a model's configuration")
    return _checked(path, raw)


def _checked(path: Path, raw: dict[str, Any]) -> ModelConfig:
    try:
        config = configured(raw, keeps=True)
        scheme_of(config.fields)
        family_of(config, lambda: tensor_names(path.parent))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def generation_defaults(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a `generation_config.json` says, or nothing if there is none; and a line for whoever should know that it
    can't be read: transformers loads such a checkpoint too."""
    if is_gguf(path):
        header = GgufFiles(path).header
        found = {name: header.get(f"general.sampling.{key}", float if name != "top_k" else int)
                 for key, name in PROPOSED.items()}  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}, []
    file = path / "generation_config.json"
    if not file.is_file():
        return {}, []
    try:
        return read_json(file), []
    except InputError as error:
        return {}, [f"{error}; left out"]


def pooling_of(path: Path) -> str:
    """How a model makes embeddings, "mean" or "last" token: as sentence-transformers and GGUF files write it down, and
    the mean where nothing is said."""
    with suppress(InputError):
        if is_gguf(path):
            header = GgufFiles(path).header
            kind = header.get(f"{header.get('general.architecture', str, '')}.pooling_type", int, 1)
            return GGUF_POOLINGS.get(kind, "mean")
        said = read_json(path / "1_Pooling" / "config.json")
        if said.get("pooling_mode_lasttoken") is True or said.get("pooling_mode") == "lasttoken":
            return "last"
    return "mean"
