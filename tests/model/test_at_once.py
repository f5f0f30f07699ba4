"""Branches in one call: for which rows, and with the bits of their steps."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import MODELS, SMALL, Checkpoints, prompt_of, random_model
from weft.cache.slabs import Slabs
from weft.compiled.library import library
from weft.model.at_once import MOST_ROWS
from weft.model.decoder import Decoder, LayerStage, StageFunctions
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.forward import Extent, Forward
from weft.model.opening import open_model
from weft.model.rope import ropes_for
from weft.model.shares import tensor_shares
from weft.model.weights import load
from weft.program.batch import Batch, Rows, Segment

pytestmark = pytest.mark.skipif(library() is None, reason="nothing is compiled on this machine")
WIDE = {"head_dim": 16}
# Windows, caps, norms of heads and after, biases, rotary parts, no rotary; and those that go in steps.
IN_ONE = ("llama", "llama-biased-tied", "qwen3", "gemma2", "gemma3", "glm", "granite_swa", "smollm3", "ministral")
IN_STEPS = {"nemotron": (), "cohere2": (), "olmo2": ("mlp",), "ministral3": ("mlp",)}  # but for these stages
SLOTS = 70


def decoder_of(checkpoints: Checkpoints, name: str, format_: str, rounded: bool) -> tuple[Decoder, Slabs]:
    """Of one rank, with heads that compiled kernels take."""
    family, sizes = MODELS[name]
    if not (directory := checkpoints.folder / f"{name}-16").exists():
        random_model(family, SMALL | sizes | WIDE).save_pretrained(directory)
    config = model_config(directory)
    blueprint = blueprint_of(config)
    (share,) = tensor_shares(blueprint, [1.0])
    weights = load(open_model(directory, config), blueprint, share, weights=format_)
    slabs = Slabs(SLOTS, config.layers, len(share.kv_heads), 256, config.head_dim, rounded=rounded)
    return Decoder(blueprint, share, weights, ropes_for(config, blueprint)), slabs


def in_steps(stage: StageFunctions, forward: Forward, extent: Extent, hidden: torch.Tensor) -> torch.Tensor:
    entered = stage.enter(forward, extent, hidden)
    return stage.tail(forward, extent, stage.body(forward, extent, entered))


def prompts(decoder: Decoder, slabs: Slabs, lengths: list[int]) -> None:
    """Something to look back on."""
    for slot, length in enumerate(lengths):
        forward = decoder.begin(Batch((Segment(slot, 0, length),)), prompt_of(length), slabs)
        extent, hidden = Extent(Rows(0, length), Rows(0, length)), torch.randn(length, decoder.width)
        for stage in decoder.stages.values():
            if isinstance(stage, LayerStage):
                in_steps(stage, forward, extent, hidden)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("format_", ["float32", "int8", "int4"])
@pytest.mark.parametrize("name", IN_ONE)
def test_they_have_the_bits_of_their_steps(
    checkpoints: Checkpoints, threads: int, name: str, format_: str, rounded: bool
) -> None:
    decoder, slabs = decoder_of(checkpoints, name, format_, rounded)
    lengths = [3, 130, 50, 97]
    prompts(decoder, slabs, lengths)
    batch = Batch(tuple(Segment(slot, length, 1, prompt=length) for slot, length in enumerate(lengths)))
    for rows in (Rows(0, 4), Rows(1, 2), Rows(1, 4)):
        forward, extent = decoder.begin(batch, [7] * 4, slabs), Extent(rows, rows)
        for place, stage in decoder.stages.items():
            if isinstance(stage, LayerStage):
                hidden = torch.randn(rows.length, decoder.width)
                whole = stage.whole(forward, extent, hidden.clone())
                assert whole is not None, place
                kept = [each.clone() for array in slabs._arrays for each in array.slots[:4]]
                assert torch.equal(whole, in_steps(stage, forward, extent, hidden)), place
                now = [each for array in slabs._arrays for each in array.slots[:4]]
                assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, now, strict=True)), place


@pytest.mark.parametrize("name", [*IN_ONE, *IN_STEPS])
def test_other_rows_go_in_steps(checkpoints: Checkpoints, name: str) -> None:
    """Prompts, many rows, rows of which some leave, other numbers; and, whatever rows come, branches that aren't made
    of what is compiled."""
    decoder, slabs = decoder_of(checkpoints, name, "float32", False)
    many = MOST_ROWS + 1
    decoded = tuple(Segment(slot, 5, 1, prompt=5) for slot in range(many))
    cases = [(Batch((Segment(0, 0, 5),)), 5, Rows(0, 5)), (Batch(decoded), many, Rows(0, many)),
             (Batch(decoded), many, Rows(0, 2))]  # fmt: skip
    for batch, count, rows in cases:
        forward = decoder.begin(batch, [7] * count, slabs)
        for (part, layer), stage in decoder.stages.items():
            hidden = torch.randn(rows.length, decoder.width)
            takes = layer is not None and rows.length <= MOST_ROWS and part in IN_STEPS.get(name, ("mlp", "attention"))
            takes = takes and (part == "mlp" or rows.length == 2)
            whole = stage.whole(forward, Extent(rows, rows), hidden)
            assert (whole is not None) is takes, (part, layer, rows)
            assert stage.whole(forward, Extent(rows, Rows(0, 1)), hidden) is None
            assert stage.whole(forward, Extent(rows, rows), hidden.bfloat16()) is None
            assert stage.whole(forward, Extent(rows, rows), torch.randn(decoder.width, rows.length).T) is None
