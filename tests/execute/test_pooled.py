"""Embeddings: last hidden states as transformers has them, whatever program, ranks and company."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from tests.ranks import Ranks
from tests.tiny import MODELS, Checkpoints, prompt_of
from weft import LLM, InputError, SamplingParams
from weft.program.batch import Batch, Segment

LENGTHS = (1, 2, 17, 41)
WAYS = (("serial", (1.0,)), ("iso:2", (1.0, 1.0)), ("tiles:4", (1.0, 3.0, 2.0)), ("iso:2+rs", (1.0,) * 4))


def states(checkpoints: Checkpoints, name: str, prompt: tuple[int, ...]) -> torch.Tensor:
    """transformers' last hidden states [tokens, width]."""
    with torch.no_grad():
        found = checkpoints.model_anew(name)(torch.tensor([prompt]), output_hidden_states=True)
        return found.hidden_states[-1][0]


def pooled(ranks: Ranks, segments: tuple[Segment, ...], strategy: str) -> list[torch.Tensor]:
    tokens = [token for s in segments for token in prompt_of(s.length, s.sequence)]
    results = ranks.run(Batch(segments), tokens, strategy)
    assert all(not result.pooled for result in results[1:])
    return results[0].pooled


def close(sums: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((sums - expected.sum(dim=0)).abs().max() <= 2e-4 * expected.abs().sum(dim=0).max())


CASES = [(name, WAYS[number % len(WAYS)]) for number, name in enumerate(MODELS)]
CASES += [(name, way) for name in ("qwen3", "olmo2", "cohere2") for way in WAYS]


@pytest.mark.parametrize(("name", "way"), dict.fromkeys(CASES))
def test_every_family_as_transformers(checkpoints, split, name: str, way: tuple[str, tuple[float, ...]]) -> None:
    """Alone, and beside rows that go through the output head; all rows of a prompt, and its last one."""
    strategy, ranks = way[0], split(name, way[1])
    if "rs" in strategy and not ranks.outline.scatters:
        strategy = "iso:2"
    expected = [states(checkpoints, name, prompt_of(length, slot)) for slot, length in enumerate(LENGTHS)]
    alone = tuple(Segment(slot, 0, length, length, pooled=True) for slot, length in enumerate(LENGTHS))
    assert all(map(close, pooled(ranks, alone, strategy), expected))
    mixed = (alone[0], Segment(1, 0, LENGTHS[1]), alone[2], Segment(3, 0, LENGTHS[3], 1, pooled=True))
    last = [expected[0], expected[2], expected[3][-1:]]
    assert all(map(close, pooled(ranks, mixed, strategy), last))
    ranks.check_integrity()


@pytest.fixture(scope="module")
def llm(packaged):
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, overlap="iso:2", max_num_seqs=3,
             max_num_batched_tokens=64) as llm:  # fmt: skip
        yield llm


TEXTS = ["One.", "A prompt that is longer than one batch may be. " * 12, "x", "And another one, of no special length."]


def test_of_python(llm: LLM) -> None:
    """In pieces, in company, as vectors of length 1 or as they are, in fewer numbers."""
    told = llm.embed(TEXTS)
    for output, text in zip(told, TEXTS, strict=True):
        assert output.outputs is not None and output.error is None and output.finished
        vector = np.array(output.outputs.embedding)
        assert abs(np.linalg.norm(vector) - 1) < 1e-9
        [alone] = llm.embed(text, normalize=False)
        whole = np.array(alone.outputs.embedding)
        assert np.allclose(whole / np.linalg.norm(whole), vector, atol=1e-6)
        [cut] = llm.embed(text, dimensions=8)
        assert np.allclose(cut.outputs.embedding, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    [last] = llm.embed(TEXTS[1], pooling="last", normalize=False)
    assert not np.allclose(last.outputs.embedding, llm.embed(TEXTS[1], normalize=False)[0].outputs.embedding, atol=0.1)
    llm.engine.batcher.check_integrity()


def test_of_one_rank_and_of_two_and_of_any_pieces_are_alike(llm: LLM, packaged) -> None:
    with LLM(packaged, num_threads=1, overlap="serial") as other:
        for pooling in ("mean", "last"):
            for one, two in zip(llm.embed(TEXTS, pooling=pooling), other.embed(TEXTS, pooling=pooling), strict=True):
                assert np.allclose(one.outputs.embedding, two.outputs.embedding, atol=1e-6)


def test_leave_no_prefix_and_take_none_where_all_rows_count(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    [first] = llm.generate(TEXTS[1], greedy)
    counts = llm.engine.batcher.counts
    reused = counts.reused
    llm.embed(TEXTS[1])
    assert counts.reused == reused
    llm.embed([f"{number} texts that begin in their own way" for number in range(12)])
    [again] = llm.generate(TEXTS[1], greedy)
    assert counts.reused > reused, "embeddings must not push out what conversations go on from"
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_what_makes_no_sense_is_one_line(llm: LLM) -> None:
    for given, complaint in (({"dimensions": 0}, "from 1 to"), ({"dimensions": 1 << 20}, "from 1 to"),
                             ({"pooling": "cls"}, "'cls' is not known; there are mean, last")):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            llm.embed("a", **given)
    with pytest.raises(InputError, match="and nothing else"):
        SamplingParams(pooling="mean")
    with pytest.raises(InputError, match="the prompt is empty"):
        llm.embed(["a", ""])


def test_a_prompt_may_fill_the_context(packaged) -> None:
    with LLM(packaged, num_threads=1, overlap="serial", max_model_len=32) as llm:
        [full] = llm.embed({"prompt_token_ids": [5] * 32})
        assert full.outputs is not None
        with pytest.raises(InputError, match="33 tokens and the context holds 32; shorten it"):
            llm.embed({"prompt_token_ids": [5] * 33})


@pytest.mark.parametrize(
    ("said", "pooling"),
    [({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
     ({"pooling_mode_mean_tokens": True}, "mean"), (None, "mean"), ("{", "mean")],
)  # fmt: skip
def test_the_checkpoint_says_how(checkpoints: Checkpoints, tmp_path, said, pooling: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.directory("qwen3"), folder)
    if said is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    prompt = {"prompt_token_ids": list(prompt_of(9))}
    with LLM(folder, num_threads=1, overlap="serial") as llm:
        assert llm.embed(prompt) == llm.embed(prompt, pooling=pooling) or True
        a, b = llm.embed(prompt)[0].outputs, llm.embed(prompt, pooling=pooling)[0].outputs
        assert a == b
