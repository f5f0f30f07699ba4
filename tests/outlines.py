"""A model's stages without a model, and programs that are changed step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from weft.program.stages import Kind, Outline, Stage
from weft.program.steps import Program, Step


def decoder_outline(layers: int) -> Outline:
    """A decoder-only transformer: embed, attention and mlp of each layer, head."""
    layer = Stage("attention", Kind.REDUCE, ordered=True), Stage("mlp", Kind.REDUCE)
    return Outline((Stage("embed", None),), layer, (Stage("head", Kind.GATHER),), layers)


def changed(program: Program, change: Callable[[Step], Step]) -> Program:
    """The same program with every step changed."""
    blocks = tuple(replace(block, steps=tuple(map(change, block.steps))) for block in program.form.blocks)
    return Program(replace(program.form, blocks=blocks), program.offsets)
