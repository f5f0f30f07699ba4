"""With exact rows, bits depend on nothing but the sequence: not on cuts, nor on what is beside it, on any wire."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.ranks import LOSSY, Ranks
from tests.tiny import FAMILIES, prompt_of
from weft.model.attention import GRANULE
from weft.plan.wiring import Wiring
from weft.program.batch import Batch, Segment, one_prompt


@pytest.mark.parametrize(("name", "shares"), [
    *itertools.product(["llama", "mistral", "qwen3"], [(1.0,), (1.0, 1.0), (2.0, 1.0, 1.0)]),
    *((name, (2.0, 1.0, 1.0)) for name in (*FAMILIES, "phi3-part", "gemma2-odd", "olmo2-odd", "gpt_neox-odd")),
])  # fmt: skip
def test_reproducible_bits_do_not_depend_on_the_strategy(split, name, shares) -> None:
    ranks, prompt = split(name, shares, exact_rows=True), prompt_of(700)
    batch = one_prompt(len(prompt))
    tried = ("serial", "iso:2", "iso:3", "iso:2/4", "tiles:4", "tiles:7", "rs", "iso:2+rs")
    programs = [ranks.plan(batch, s, GRANULE) for s in tried if not ("rs" in s and "olmo" in name)]
    expected = ranks.run(batch, prompt, programs[0])[0]
    for program in programs[1:]:
        assert torch.equal(ranks.run(batch, prompt, program)[0].logits, expected.logits)


@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen2-window", "phi3-part", *FAMILIES])
def test_reproducible_bits_do_not_depend_on_the_batch(split, name) -> None:
    ranks, prompts = split(name, (1.0, 1.0), exact_rows=True), [prompt_of(n) for n in (5, 300, 150)]
    for strategy in ("serial", "requests", "iso:2"):
        together = _together(ranks, prompts, strategy)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(ranks.logits([prompt], "serial")[0], row)


def _together(ranks: Ranks, prompts, strategy: str, wire: str = "exact"):
    batch = Batch(tuple(Segment(slot, 0, len(prompt)) for slot, prompt in enumerate(prompts)))
    flat = [token for prompt in prompts for token in prompt]
    return ranks.run(batch, flat, ranks.plan(batch, strategy, GRANULE), wire)[0].logits


@pytest.mark.parametrize("name", FAMILIES)
def test_reproducible_decoding_does_not_depend_on_the_batch(split, name) -> None:
    ranks, prompts = split(name, (1.0, 1.0), exact_rows=True), [prompt_of(n) for n in (9, 140, 30)]
    _, together = ranks.greedy(prompts, "serial", 12)
    assert [ranks.greedy([prompt], "serial", 12)[1][0] for prompt in prompts] == together


@pytest.mark.parametrize("shares", [(1.0,), (2.0, 1.0)])
@pytest.mark.parametrize("name", FAMILIES)
def test_reproducible_decoded_tokens_have_their_bits_beside_others(split, name, shares) -> None:
    """Alone, with other tokens, beside a prompt, and where cuts part them."""
    ranks, lengths = split(name, shares, exact_rows=True), (9, 140, 30)
    for slot, length in enumerate(lengths):
        ranks.run(Batch((Segment(slot, 0, length),)), prompt_of(length), "serial")
    decoded = [Segment(slot, length, 1, prompt=length) for slot, length in enumerate(lengths)]
    unwanted = [replace(segment, wanted=0) for segment in decoded]  # as where an answer is computed again
    alone = [ranks.run(Batch((segment,)), [7], "serial")[0].logits for segment in decoded]
    for beside in ((), (Segment(3, 0, 50),)):
        batch = Batch((*decoded, *beside))
        for strategy in ("serial", "requests", "iso:2"):
            program = ranks.plan(batch, strategy, GRANULE)
            logits = ranks.run(batch, [7] * 3 + [*prompt_of(50)] * len(beside), program)[0].logits
            assert torch.equal(logits[:3], torch.cat(alone)), (strategy, beside)
    following = [Segment(slot, length + 1, 1, prompt=length) for slot, length in enumerate(lengths)]
    expected = [ranks.run(Batch((segment,)), [9], "serial")[0].logits for segment in following]
    ranks.run(Batch((*unwanted, Segment(3, 0, 50))), [7] * 3 + [*prompt_of(50)], "serial")
    assert all(
        torch.equal(ranks.run(Batch((segment,)), [9], "serial")[0].logits, logits)
        for segment, logits in zip(following, expected, strict=True)
    )


@pytest.mark.parametrize(("wire", "shares"), LOSSY)
def test_reproducible_bits_do_not_depend_on_cuts_on_less_exact_wires(split, wire, shares) -> None:
    """Also where a sum's bytes decide its algorithm, and where some sums are exact: what they owe is theirs."""
    ranks, prompt = split("llama", shares, exact_rows=True), prompt_of(700)
    batch = one_prompt(len(prompt))
    mixed = Wiring(wire, {("mlp", chunk): "exact" for chunk in range(40)})
    plans = [ranks.plan(batch, strategy, GRANULE) for strategy in ("serial", "iso:2", "iso:3", "iso:2/4", "tiles:4")]
    for wiring in (Wiring(wire), mixed):
        programs = [wiring.on(plan) for plan in plans]
        expected, *others = (ranks.run(batch, prompt, program, wire)[0].logits for program in programs)
        assert all(torch.equal(logits, expected) for logits in others)


@pytest.mark.parametrize(("wire", "shares"), LOSSY)
def test_reproducible_bits_do_not_depend_on_the_batch_on_less_exact_wires(split, wire, shares) -> None:
    ranks, prompts = split("llama", shares, exact_rows=True), [prompt_of(n) for n in (5, 300, 150)]
    for strategy in ("serial", "requests", "iso:2"):
        together = _together(ranks, prompts, strategy, wire)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(ranks.logits([prompt], "serial", wire)[0], row)
