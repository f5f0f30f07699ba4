"""Models whose layers are in sections, on groups of ranks of their own: the same as one rank, and as transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import DEEP, DEPTH, FAMILIES, prompt_of
from weft.program.batch import Batch, Segment

# Layers of each section, and the shares of each one's ranks.
LAYOUTS = {
    "1x2": ((3, 2), ((1.0,), (1.0,))),
    "2x2": ((2, 3), ((1.0, 1.0), (1.0, 1.0))),
    "1x3": ((1, 3, 1), ((1.0,), (1.0,), (1.0,))),
    "1x4": ((2, 1, 1, 1), ((1.0,), (1.0,), (1.0,), (1.0,))),
    "uneven": ((4, 1), ((2.0, 1.0), (1.0,))),
    "uneven-other": ((1, 4), ((1.0,), (1.0, 3.0))),
}
STRATEGIES = ("serial", "iso:2", "pipe:4", "pipe:3+iso:2", "pipe:2+tiles:2", "pipe@5,300+iso:2/4", "iso:3+ahead")
PROMPTS = ((1,), (2,), (17,), (700,), (3, 200, 41))
EVERY = tuple(itertools.product((f"{name}-deep" for name in FAMILIES), LAYOUTS, STRATEGIES, PROMPTS[2:]))
SAMPLE = [
    (name, layout, STRATEGIES[(number + 2 * index) % len(STRATEGIES)], PROMPTS[(number + index) % len(PROMPTS)])
    for number, name in enumerate(DEEP)
    for index, layout in enumerate(LAYOUTS)
    if (number + index) % 3 == 0
]


def test_sample_covers_everything() -> None:
    for place, values in enumerate((DEEP, LAYOUTS, STRATEGIES, PROMPTS)):
        assert {case[place] for case in SAMPLE} == set(values)


def agrees(checkpoints, split, name, layout, strategy, lengths) -> None:
    """The same logits to 2e-4 relative, and the same 16 greedy tokens, as transformers."""
    layers, shares = LAYOUTS[layout]
    assert sum(layers) == DEPTH
    ranks = split(name, shares, layers=layers)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    logits, tokens = ranks.greedy(prompts, strategy, 16)
    for row, output, prompt in zip(logits, tokens, prompts, strict=True):
        expected, greedy = checkpoints.reference(name, prompt)
        assert (row - expected).abs().max() <= 2e-4 * expected.abs().max()
        assert output == greedy[:16]
    ranks.check_integrity()


@pytest.mark.parametrize(("name", "layout", "strategy", "lengths"), SAMPLE)
def test_same_as_transformers(checkpoints, split, name, layout, strategy, lengths) -> None:
    agrees(checkpoints, split, name, layout, strategy, lengths)


@pytest.mark.grid
@pytest.mark.parametrize(("name", "layout", "strategy", "lengths"), EVERY)
def test_same_as_transformers_everywhere(checkpoints, split, name, layout, strategy, lengths) -> None:
    agrees(checkpoints, split, name, layout, strategy, lengths)


@pytest.mark.parametrize("strategy", ["serial", "pipe@128,384", "pipe@256+iso@128,256,384"])
@pytest.mark.parametrize("layout", ["1x2", "1x4"])
def test_to_the_bit_where_reproducible(split, layout: str, strategy: str) -> None:
    """One rank a section adds nothing up: what it computes are one rank's own bits, however a prompt is cut."""
    layers, shares = LAYOUTS[layout]
    ranks, one = split("qwen3-deep", shares, True, layers=layers), split("qwen3-deep", (1.0,), True)
    prompt = prompt_of(500)
    assert torch.equal(ranks.logits([prompt], strategy), one.logits([prompt], "serial"))
    step = Batch((Segment(0, 500, 1),))
    assert torch.equal(ranks.run(step, (7,), "serial")[0].logits, one.run(step, (7,), "serial")[0].logits)


@pytest.mark.parametrize("layout", ["1x2", "2x2", "uneven"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_and_strategy(split, layout: str, data: st.DataObject) -> None:
    """Also mixed ones: prompts and single tokens, of which some rows are wanted, some pooled."""
    layers, shares = LAYOUTS[layout]
    ranks, one = split("llama-deep", shares, layers=layers), split("llama-deep", (1.0,))
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    segments = [
        Segment(slot, 0, length, data.draw(st.integers(0, length)), pooled=data.draw(st.booleans()))
        for slot, length in enumerate(lengths)
    ]
    batch, strategy = Batch(tuple(segments)), data.draw(st.sampled_from(STRATEGIES))
    tokens = prompt_of(batch.tokens)
    actual, expected = ranks.run(batch, tokens, strategy)[0], one.run(batch, tokens, "serial")[0]
    pairs = list(zip(actual.pooled, expected.pooled, strict=True))
    if batch.predicting_rows:
        pairs.append((actual.logits, expected.logits))
    for mine, other in pairs:
        assert mine.shape == other.shape and (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_rows_go_on_in_fewer_bytes(split, wire: str) -> None:
    layers, shares = LAYOUTS["2x2"]
    ranks, prompt = split("llama-deep", shares, layers=layers), prompt_of(200)
    exact, lossy = (ranks.logits([prompt], "pipe:2", each) for each in ("exact", wire))
    error = (exact - lossy).norm() / exact.norm()
    assert 0 < error < {"bf16": 0.01, "int8": 0.03, "int4": 0.4}[wire]
