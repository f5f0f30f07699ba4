"""A model's tensors, in whatever files they are, by the names that its blueprint has. Knows rows and formats."""

from __future__ import annotations

from pathlib import Path

from weft.config import ModelConfig
from weft.formats.checkpoint import Bring, Checkpoint, open_checkpoint
from weft.model.families import family_of
from weft.model.gguf import ARCHITECTURES


def open_model(path: Path, config: ModelConfig, bring: Bring | None = None) -> Checkpoint:
    """`bring`: for files that are not here yet, or not whole. Raises `InputError` for files that can't be read."""
    family = family_of(config)
    known = [row for row in ARCHITECTURES if row.family == config.model_type]
    return open_checkpoint(path, config.fields, bring, family.aliases, known)
