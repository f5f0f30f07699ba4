"""The whole forward pass against transformers, and programs against each other."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.execute.programs import SEGMENTS, TOKENS, legal_programs
from tests.ranks import Ranks
from tests.tiny import MODELS, Checkpoints, prompt_of
from weft.execute.executor import Part
from weft.model.attention import GRANULE
from weft.program.batch import Batch, one_prompt
from weft.program.steps import Program, decoder_stages

STRATEGIES = ("serial", "iso:2", "iso@5,300", "iso:2/4", "tiles:4", "requests", "iso:2+rs", "iso:3+tiles:2",
              "iso:3+ahead")  # fmt: skip
SPLITS = ((1.0,), (1.0, 1.0), (1.0,) * 3, (1.0,) * 4, (2.0, 1.0), (1.0, 3.0, 2.0, 1.0))
PROMPTS = ((1,), (2,), (17,), (700,), (3, 200, 41))

SAMPLE = [
    (name, SPLITS[(index + number) % len(SPLITS)], strategy, PROMPTS[(2 * index + number) % len(PROMPTS)])
    for index, name in enumerate(MODELS)
    for number, strategy in enumerate(STRATEGIES)
    if (index + number) % 2 == 0 or strategy == "iso:2"
]


@pytest.fixture(scope="module")
def split(checkpoints: Checkpoints) -> Iterator[object]:
    """Models split over ranks, kept for the tests of one model."""
    kept: dict[object, Ranks] = {}

    def get(name: str, shares: tuple[float, ...], exact_rows: bool = False) -> Ranks:
        key = (name, shares, exact_rows)
        if key not in kept:
            kept[key] = Ranks(checkpoints.directory(name), shares, exact_rows)
        return kept[key]

    yield get
    for ranks in kept.values():
        ranks.close()


def test_sample_covers_everything() -> None:
    assert {case[0] for case in SAMPLE} == set(MODELS)
    assert {case[1] for case in SAMPLE} == set(SPLITS)
    assert {case[2] for case in SAMPLE} == set(STRATEGIES)
    assert {case[3] for case in SAMPLE} == set(PROMPTS)


def agrees(checkpoints: Checkpoints, ranks: Ranks, name: str, strategy: str, lengths: tuple[int, ...]) -> None:
    """The same logits to 2e-4 relative, and the same 32 greedy tokens, as transformers."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    logits, tokens = ranks.greedy(prompts, strategy, 32)
    for row, output, prompt in zip(logits, tokens, prompts, strict=True):
        expected, greedy = checkpoints.reference(name, prompt)
        assert (row - expected).abs().max() <= 2e-4 * expected.abs().max()
        assert output == greedy
    ranks.check_integrity()


@pytest.mark.parametrize(("name", "shares", "strategy", "lengths"), SAMPLE)
def test_same_as_transformers(checkpoints, split, name, shares, strategy, lengths) -> None:
    agrees(checkpoints, split(name, shares), name, strategy, lengths)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("name", "shares", "strategy", "lengths"), [*itertools.product(MODELS, SPLITS, STRATEGIES, PROMPTS)]
)
def test_same_as_transformers_everywhere(checkpoints, split, name, shares, strategy, lengths) -> None:
    agrees(checkpoints, split(name, shares), name, strategy, lengths)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=legal_programs(decoder_stages(2)))
def test_any_legal_program_equals_serial(split, program: Program) -> None:
    ranks = split("qwen3", (1.0, 1.0))
    tokens = prompt_of(TOKENS)
    batch = Batch(SEGMENTS)
    expected = ranks.run(batch, tokens, "serial")[0].logits
    actual = ranks.run(batch, tokens, program)[0].logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("shares", [(1.0,), (1.0, 1.0), (2.0, 1.0, 1.0)])
def test_reproducible_bits_do_not_depend_on_the_strategy(split, name, shares) -> None:
    ranks, prompt = split(name, shares, exact_rows=True), prompt_of(700)
    batch = one_prompt(len(prompt))
    programs = [
        ranks.plan(batch, s, GRANULE)
        for s in (*STRATEGIES[:2], "iso:3", "iso:2/4", "tiles:4", "tiles:7", "rs", "iso:2+rs")
    ]
    expected = ranks.run(batch, prompt, programs[0])[0]
    for program in programs[1:]:
        assert torch.equal(ranks.run(batch, prompt, program)[0].logits, expected.logits)


@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen2-window"])
def test_reproducible_bits_do_not_depend_on_the_batch(split, name) -> None:
    ranks, prompts = split(name, (1.0, 1.0), exact_rows=True), [prompt_of(n) for n in (5, 300, 150)]
    for strategy in ("serial", "requests", "iso:2"):
        together = _together(ranks, prompts, strategy)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(ranks.logits([prompt], "serial")[0], row)


def _together(ranks: Ranks, prompts, strategy: str):
    from weft.program.batch import Segment

    batch = Batch(tuple(Segment(slot, 0, len(prompt)) for slot, prompt in enumerate(prompts)))
    flat = [token for prompt in prompts for token in prompt]
    return ranks.run(batch, flat, ranks.plan(batch, strategy, GRANULE))[0].logits


def test_reproducible_decoding_does_not_depend_on_the_batch(split) -> None:
    ranks, prompts = split("llama", (1.0, 1.0), exact_rows=True), [prompt_of(n) for n in (9, 140, 30)]
    _, together = ranks.greedy(prompts, "serial", 12)
    assert [ranks.greedy([prompt], "serial", 12)[1][0] for prompt in prompts] == together


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 2.0, 1.0)])
def test_bf16_wire_is_close_and_ranks_agree(split, shares) -> None:
    ranks, prompt = split("llama", shares), prompt_of(200)
    exact, lossy = (ranks.logits([prompt], "iso:2", wire) for wire in ("exact", "bf16"))
    error = (exact - lossy).abs().max() / exact.abs().max()
    assert 0 < error < 0.1


def test_a_run_leaves_no_cycle(split) -> None:
    """Else its partials would stay until a garbage collection, and a rank's memory would grow by them."""
    ranks, prompt = split("llama", (1.0, 1.0)), prompt_of(64)
    batch = one_prompt(64)
    program = ranks.plan(batch, "iso:2")
    ranks.run(batch, prompt, program)
    gc.collect()
    gc.disable()
    try:
        ranks.run(batch, prompt, program)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [item for item in gc.garbage if isinstance(item, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_lanes_alone(split) -> None:
    ranks, prompt = split("llama", (1.0, 1.0)), prompt_of(64)
    batch = one_prompt(64)
    program = ranks.plan(batch, "iso:2")
    both = ranks.run(batch, prompt, program)[0]
    compute = ranks.run(batch, prompt, program, part=Part.COMPUTE)[0]
    network = ranks.run(batch, prompt, program, part=Part.NETWORK)[0]
    for result, lanes in ((both, {"compute", "network"}), (compute, {"compute"}), (network, {"network"})):
        ran = {step.lane.value for step, (_, stop) in zip(program, result.spans, strict=True) if stop > 0}
        assert ran == lanes


def test_a_message_is_sent_once_for_every_collective(split) -> None:
    ranks, prompt = split("llama", (1.0, 1.0)), prompt_of(600)
    group = ranks.parts[0][1].group
    sent = []
    for strategy in ("serial", "iso:2", "iso:3+rs", "tiles:4"):
        before = group.bytes_sent
        ranks.logits([prompt], strategy)
        sent.append(group.bytes_sent - before)
    hidden = ranks.config.hidden * 4 * 600
    assert sent[0] == 2 * ranks.config.layers * hidden  # two-shot: N - 1 shards of 1/N, twice
    assert sent[1:3] == [sent[0]] * 2 and sent[3] <= sent[0] * 2  # small tiles go one-shot, which sends everything
