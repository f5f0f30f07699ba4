"""A request can hurt nobody but itself: what goes wrong with one ends it, and the others get what they get alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz import faults
from benchmarks.fuzz.models import KINDS, save
from tests.tiny import Checkpoints, prompt_of
from weft import LLM, SamplingParams
from weft.errors import InputError, WorkerLost
from weft.launch.local import LocalLauncher
from weft.llm import RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS: list[Any] = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (5, 9, 30)]


@pytest.fixture(scope="module")
def soup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-fallback tokenizer, whose generation_config.json names an end token that isn't there."""
    return save(KINDS["byte-fallback"], tmp_path_factory.mktemp("soup"))


@pytest.fixture
def llm(soup: Path) -> Iterator[LLM]:
    """With faults in its workers, for who asks for them."""
    launcher = LocalLauncher()
    launcher.command = faults.COMMAND
    with LLM(soup, num_threads=1, launcher=launcher, max_num_seqs=4, reproducible=True) as made:
        yield made
        made.engine.batcher.check_integrity()
        assert made.engine.batcher.idle and not made.engine.requests.completions


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def harmful(kind: str) -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=faults.seed_of(kind))


@pytest.mark.parametrize(("kind", "restarts"), [("rank raises", 2), ("rank crashes", 2), ("rank is killed", 4)])
def test_poison_is_refused_and_its_restarts_do_not_count(llm: LLM, kind: str, restarts: int) -> None:
    alone = texts([llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS])
    outputs = llm.generate([*PROMPTS, PROMPTS[0]], [GREEDY, GREEDY, GREEDY, harmful(kind)])
    assert texts(outputs[:3]) == alone and [output.error for output in outputs[:3]] == [None] * 3
    assert outputs[3].error and "by itself: " in outputs[3].error
    assert outputs[3].outputs[0].finish_reason == "error"
    assert llm.engine.workers.restarts.total == restarts and not llm.engine.workers.restarts
    assert texts(llm.generate(PROMPTS, GREEDY)) == alone


def test_two_poisons_at_once(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS[:1], GREEDY))
    outputs = llm.generate([PROMPTS[0], *PROMPTS[:2]], [GREEDY, harmful("rank raises"), harmful("rank crashes")])
    assert texts(outputs[:1]) == alone and all(output.error for output in outputs[1:])
    assert not llm.engine.workers.restarts


def test_poison_again_and_again_never_ends_the_engine(llm: LLM) -> None:
    """As a client sends it that tries again at once: the group has done nothing yet when it is lost."""
    for times in range(1, 4):
        [output] = llm.generate(PROMPTS[:1], harmful("rank crashes at once"))
        assert output.error and llm.engine.workers.restarts.total == 2 * times and not llm.engine.workers.restarts
    assert llm.generate(PROMPTS[0], GREEDY)[0].error is None


def test_ranks_killed_from_outside_refuse_nobody(llm: LLM) -> None:
    """One long answer, and a kill every few tokens: each time it is tried by itself, and goes on."""
    params = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    [alone] = llm.generate(PROMPTS[0], params)
    request = llm.engine.add(PROMPTS[0]["prompt_token_ids"], params)
    for kills in range(1, 6):
        while request.sequences[0].produced < 20 * kills:
            llm.engine.step()
        os.kill(llm.engine.workers.controller.launcher.pids()[0], signal.SIGKILL)
    while not llm.engine.batcher.idle:
        llm.engine.step()
    assert request.error == "" and llm.engine.requests.settle(request)[0].text.text == alone.outputs[0].text
    assert llm.engine.workers.restarts.total == 5


def test_company_is_kept_after_two_kills(llm: LLM) -> None:
    requests = [llm.engine.add(prompt["prompt_token_ids"], replace(GREEDY, max_tokens=60)) for prompt in PROMPTS]
    for produced in (5, 25):
        while requests[0].sequences[0].produced < produced:
            llm.engine.step()
        os.kill(llm.engine.workers.controller.launcher.pids()[0], signal.SIGKILL)
    while requests[0].sequences[0].produced < 45:
        llm.engine.step()
    assert llm.engine.last_turn is not None and len(llm.engine.last_turn.scheduled.sequences) == 3
    while not llm.engine.batcher.idle:
        llm.engine.step()
    assert [
        llm.engine.requests.settle(request)[0].offsets for request in requests
    ] and llm.engine.workers.restarts.total == 2


def test_an_interrupted_batch_harms_no_other_answer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while one answer streams and another is generated."""
    params = replace(GREEDY, max_tokens=60)
    [alone] = llm.generate(PROMPTS[0], params)
    stream = llm.stream(PROMPTS[0], params)
    next(stream)
    collect = llm.engine.workers.controller.collect

    def interrupted(submitted: Any) -> Any:
        if submitted.number % 7 == 0:
            monkeypatch.setattr(llm.engine.workers.controller, "collect", collect)
            raise KeyboardInterrupt
        return collect(submitted)

    monkeypatch.setattr(llm.engine.workers.controller, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[1], params)
    *_, output = stream
    assert isinstance(output, RequestOutput) and output.outputs[0].text == alone.outputs[0].text


def test_a_start_that_fails_for_a_moment_is_tried_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, fails = llm.engine.workers.controller.launcher, [BlockingIOError(11, "no more processes")] * 2
    start = launcher.start

    def starting(*arguments: Any) -> None:
        if fails:
            raise fails.pop()
        start(*arguments)

    monkeypatch.setattr(launcher, "start", starting)
    llm.engine.restart(WorkerLost("a test"))
    assert not fails and llm.engine.workers.restarts.total == 1
    assert llm.generate(PROMPTS[0], GREEDY)[0].error is None


def test_a_sampler_that_raises_ends_its_row_alone(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY))
    outputs = llm.generate([*PROMPTS, PROMPTS[0]], [GREEDY, GREEDY, GREEDY, harmful("sampler")])
    assert texts(outputs[:3]) == alone and llm.engine.workers.restarts.total == 0
    assert outputs[3].error and "planted in the sampler" in outputs[3].error


def test_a_batch_that_cannot_be_sent_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, plan = texts(llm.generate(PROMPTS, GREEDY)), llm.engine.planner.plan

    def planning(batch: Any) -> Any:
        if any(segment.length == 21 for segment in batch.segments):
            raise ZeroDivisionError("planted")
        return plan(batch)

    monkeypatch.setattr(llm.engine.planner, "plan", planning)
    llm.engine.batcher.forget_prefixes()
    outputs = llm.generate([*PROMPTS, {"prompt_token_ids": list(range(100, 121))}], GREEDY)
    assert texts(outputs[:3]) == alone
    assert outputs[3].error and "ZeroDivisionError: planted" in outputs[3].error


def test_end_tokens_that_do_not_exist_are_left_out(llm: LLM) -> None:
    [notice] = [line for line in llm.engine.notices if "end token" in line]
    assert "1361 (of generation_config.json" in notice and llm.engine.requests.end_ids == frozenset({1})
    params = SamplingParams(temperature=0.0, max_tokens=4, min_tokens=1)
    assert llm.generate(PROMPTS[0], params)[0].error is None


def test_proposals_that_make_no_sense_are_left_out(soup: Path, tmp_path: Path) -> None:
    shutil.copytree(soup, tmp_path / "model")
    proposed = {"temperature": -1, "top_k": 5, "top_p": "all", "eos_token_id": ["</s>", True, -1, None]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(proposed))
    with LLM(tmp_path / "model", num_threads=1) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.top_p) == (1.0, 5, 1.0)
        assert sum(line.startswith("generation_config.json:") for line in llm.engine.notices) == 2
        assert any("'</s>', True, -1 (of generation_config.json" in line for line in llm.engine.notices)
        assert llm.engine.requests.end_ids == frozenset({1})


@pytest.mark.parametrize(
    "given",
    [np.arange(3, 8), tuple(np.int32(i) for i in range(3, 8)), torch.arange(3, 8), range(3, 8), iter(range(3, 8))],
)
def test_ids_of_any_kind_are_plain_ones(llm: LLM, given: Any) -> None:
    expected = texts(llm.generate({"prompt_token_ids": list(range(3, 8))}, GREEDY))
    assert texts(llm.generate({"prompt_token_ids": given}, GREEDY)) == expected


def test_other_odd_input_is_refused_in_one_line(llm: LLM) -> None:
    for prompts in (5, [5], [[1, 2]], [{"text": "a"}], [{"prompt": 5}], "\ud800"):
        with pytest.raises(InputError):
            llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    for params in ([None], [{"temperature": 0}], 5):
        with pytest.raises(InputError):
            llm.generate("a", params)  # type: ignore[arg-type]
    for wrong in ({"temperature": 10**400}, {"seed": 10**5000}, {"stop_token_ids": [10**5000]}, {"top_k": [1]}):
        with pytest.raises(InputError) as told:
            llm.generate("a", SamplingParams(**wrong))  # type: ignore[arg-type]
        assert len(str(told.value)) < 300
    assert llm.generate({"prompt": "a"}, GREEDY)[0].prompt == "a"


@pytest.mark.parametrize("given", [[3, True], [3.0], ["3"], "345", 3, None, [[3]], [3, 1 << 70], [-1], []])
def test_what_is_no_prompt_is_refused_and_leaves_nothing_behind(llm: LLM, given: Any) -> None:
    with pytest.raises(InputError):
        llm.generate([PROMPTS[0], {"prompt_token_ids": given}], GREEDY)
    assert llm.engine.batcher.idle and not llm.engine.requests.completions
    assert llm.generate(PROMPTS[0], GREEDY)[0].error is None


def test_all_tokens_end_the_answer_and_one_is_wanted(llm: LLM) -> None:
    every = list(range(llm.engine.model.vocabulary))
    with pytest.raises(InputError, match="min_tokens"):
        llm.generate(PROMPTS[0], SamplingParams(min_tokens=1, stop_token_ids=every))
    assert llm.generate(PROMPTS[0], SamplingParams(stop_token_ids=every))[0].outputs[0].finish_reason == "stop"


def test_numbers_that_are_none_end_the_request(soup: Path, tmp_path: Path) -> None:
    shutil.copytree(soup, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][50] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with LLM(tmp_path / "model", num_threads=1) as llm:
        fine, wrong = llm.generate([PROMPTS[0], {"prompt_token_ids": [3, 50]}], GREEDY)
        assert fine.error is None and wrong.error is not None and "not finite" in wrong.error


@pytest.mark.parametrize(
    "name", ["llama-biased-tied", "mistral", "llama-dynamic", "phi3-long", "gemma2", "cohere2", "olmo3"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_scores_of_prompts_are_those_of_transformers(checkpoints: Checkpoints, name: str, ranks: int) -> None:
    """In pieces, beside others, and with what comes after them."""
    prompts = [prompt_of(length) for length in (1, 2, 40, 300)]
    options = {"num_threads": 1, "overlap": "iso:2", "max_num_batched_tokens": 100, "tensor_parallel_size": ranks}
    with LLM(checkpoints.directory(name), **options) as llm:  # type: ignore[arg-type]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params)
        again = llm.generate({"prompt_token_ids": list(prompts[3])}, SamplingParams(max_tokens=0, prompt_logprobs=2))
    for prompt, output in zip([*prompts, prompts[3]], [*outputs, *again], strict=True):
        logits = checkpoints.model_anew(name)(torch.tensor([prompt])).logits[0].detach()
        logprobs = torch.log_softmax(logits.float(), dim=1)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for at in range(1, len(prompt)):
            entries = output.prompt_logprobs[at]
            assert entries is not None and prompt[at] in entries and len(entries) in (2, 3)
            for token, entry in entries.items():
                assert abs(entry.logprob - float(logprobs[at - 1, token])) < 1e-3
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1] * 4
    assert again[0].outputs[0].token_ids == [] and again[0].outputs[0].finish_reason == "length"


def test_a_head_of_its_own_counts_for_more_than_tied(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """As transformers reads such a checkpoint; and one that has the head, but not the embedding it is tied to."""
    source, prompt = checkpoints.directory("llama-biased-tied"), prompt_of(20)
    for name in ("both", "alike", "swapped"):
        shutil.copytree(source, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding.roll(1, 0) if name == "both" else embedding.clone()
        if name == "swapped":
            del weights["model.embed_tokens.weight"]
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        expected = checkpoints.greedy(tmp_path / name, prompt, 8)
        with LLM(tmp_path / name, num_threads=1, tensor_parallel_size=2, overlap="serial") as llm:
            found = llm.generate({"prompt_token_ids": list(prompt)}, GREEDY)[0].outputs[0].token_ids
        assert found == expected, name


def test_angles_that_stretch_do_not_depend_on_cuts_or_reuse(checkpoints: Checkpoints) -> None:
    """A prompt of 400 tokens for a model of 256, in pieces, and with beginnings that others have left."""
    prompt = prompt_of(400)
    _, expected = checkpoints.reference("llama-dynamic", prompt, 8)
    for tokens in (8192, 70):
        with LLM(checkpoints.directory("llama-dynamic"), num_threads=1, max_num_batched_tokens=tokens) as llm:
            for other in (prompt[:100], prompt[:300], prompt, prompt + prompt[:50]):
                llm.generate({"prompt_token_ids": list(other)}, GREEDY)
            [output] = llm.generate({"prompt_token_ids": list(prompt)}, GREEDY)
            assert output.outputs[0].token_ids == expected
            assert llm.engine.batcher.counts.reused > 300, "the same prompt again is reused"


@pytest.mark.parametrize("lengths", [(60, 61, 30), (64, 63, 65, 200)])
@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2, "overlap": "iso:2"}, {"reproducible": True}])
def test_answers_that_outgrow_short_angles_are_computed_anew(
    checkpoints: Checkpoints, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    """longrope, with 64 positions of the shorter form: each token is what a pass over all before it gives, also with
    prefixes that others left."""
    prompts, theirs = [prompt_of(length) for length in lengths], checkpoints.model_anew("phi3-long")

    def greedy(tokens: list[int]) -> list[int]:
        found = list(tokens)
        for _ in range(24):
            found.append(int(theirs(torch.tensor([found])).logits[0, -1].argmax()))
        return found[len(tokens) :]

    expected, params = [greedy(list(prompt)) for prompt in prompts], replace(GREEDY, max_tokens=24)
    with LLM(checkpoints.directory("phi3-long"), num_threads=1, **options) as llm:
        for again in range(3):
            outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params)
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected, again
        whole = [*prompts[0], *expected[0]]
        [longer] = llm.generate({"prompt_token_ids": whole}, params)
        assert list(longer.outputs[0].token_ids) == greedy(whole)
        llm.engine.batcher.check_integrity()
        assert llm.engine.batcher.counts.reused > 0 or options.get("reproducible")  # then 128 and more are reused


def test_reproducible_bits_survive_reuse_preemption_and_restarts(checkpoints: Checkpoints) -> None:
    """Log-probabilities to the last bit: a prefix that ends in an answer, memory for one of two, and lost ranks."""
    first, params = list(prompt_of(140)), SamplingParams(temperature=0.0, max_tokens=60, logprobs=0, ignore_eos=True)

    def ask(llm: LLM, *prompts: list[int]) -> list[list[float]]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        chosen = [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]
        return [[entry[token].logprob for token, entry in zip(*each, strict=True)] for each in chosen]  # type: ignore[arg-type]

    options: dict[str, Any] = {"num_threads": 1, "reproducible": True}
    with LLM(checkpoints.directory("qwen3"), enable_prefix_caching=False, **options) as llm:
        answer = llm.generate({"prompt_token_ids": first}, params)[0].outputs[0].token_ids
        longer = first + list(answer) + list(prompt_of(90, 3))
        expected = [ask(llm, prompt)[0] for prompt in (first, longer)]
    with LLM(checkpoints.directory("qwen3"), **options) as llm:
        assert [ask(llm, prompt)[0] for prompt in (first, longer)] == expected
        assert llm.engine.batcher.counts.reused == 128, "what was an answer is computed as part of the prompt"
        llm.engine.batcher.memory = 480
        llm.engine.batcher.forget_prefixes()
        assert ask(llm, longer, first) == expected[::-1] and llm.engine.batcher.counts.preempted > 0
        llm.engine.batcher.memory = 10**6
        requests = [llm.engine.add(prompt, params) for prompt in (first, longer)]
        for _ in range(30):
            llm.engine.step()
        llm.engine.restart(WorkerLost("a test"))
        while not llm.engine.batcher.idle:
            llm.engine.step()
        found = [[chosen.logprob for chosen in llm.engine.requests.settle(request)[0].chosen] for request in requests]
        assert found == expected
