"""A model's stages without a model."""

from __future__ import annotations

from weft.program.stages import Kind, Outline, Stage


def decoder_outline(layers: int) -> Outline:
    """A decoder-only transformer: embed, attention and mlp of each layer, head."""
    layer = Stage("attention", Kind.REDUCE, ordered=True), Stage("mlp", Kind.REDUCE)
    return Outline((Stage("embed", None),), layer, (Stage("head", Kind.GATHER),), layers)
