"""The engine with real worker processes: the main path, faults, and what is left behind (nothing)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.tiny import Checkpoints, prompt_of
from weft import LLM, InputError, SamplingParams
from weft.errors import WorkerFailed
from weft.execute.results import RunOptions
from weft.llm import Prompt, RequestOutput
from weft.program.batch import one_prompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


def worker_pids() -> set[int]:
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "weft.execute.worker" in " ".join(child.cmdline())}


@pytest.fixture(scope="module")
def two_ranks(packaged: Path) -> Iterator[LLM]:
    with LLM(packaged, tensor_parallel_size=2, overlap="iso:2", num_threads=1, max_num_seqs=6) as llm:
        yield llm
    assert worker_pids() == set()


@pytest.fixture(autouse=True)
def nothing_left_behind(two_ranks: LLM) -> Iterator[None]:
    """Whatever a test does, afterwards only the module's own workers run."""
    yield
    assert worker_pids() == set(two_ranks.engine.workers.controller.launcher.pids())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_same_tokens_as_transformers_in_batches(checkpoints: Checkpoints, ranks: int) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1, 2, 17, 300))]
    with LLM(
        checkpoints.directory("qwen3"), tensor_parallel_size=ranks, overlap="iso:2/4", num_threads=1, max_num_seqs=3
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], GREEDY)
        llm.engine.batcher.check_integrity()
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.prompt_token_ids == list(prompt)
        assert output.outputs[0].token_ids == checkpoints.reference("qwen3", prompt)[1]
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("ranks", [1, 2])
def test_closed_once_and_for_all(packaged: Path, ranks: int) -> None:
    with LLM(packaged, tensor_parallel_size=ranks, overlap="serial", num_threads=1) as llm:
        pass
    llm.close()
    for asked in (lambda: llm.generate("def", GREEDY), lambda: next(llm.stream("def", GREEDY))):
        with pytest.raises(InputError, match="this LLM was closed"):
            asked()


def test_a_mistake_leaves_the_next_one_alone() -> None:
    """In a process of its own: what the first one began to import, the second one needs."""
    code = (
        "from weft import LLM\n"
        "for wrong in ({'overlap': 'foo'}, {'max_model_len': 10**9}, {'tensor_parallel_size': '2'}):\n"
        "    try: LLM(**wrong)\n"
        "    except ValueError as error: print(error)\n"
        "LLM(tensor_parallel_size=2, overlap='serial', num_threads=1).close()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 3, run.stderr


def test_text_in_text_out(two_ranks: LLM) -> None:
    [output] = two_ranks.generate("The for statement is used to", GREEDY)
    assert output.prompt == "The for statement is used to" and len(output.outputs[0].text) > 20
    assert two_ranks.engine.tokenizer is not None
    whole = two_ranks.engine.tokenizer.decode(output.outputs[0].token_ids)
    text = output.outputs[0].text
    assert whole.startswith(text)
    assert text == whole or "\ufffd" in whole[len(text) :]  # a last token with half a character is not shown


def test_stream_gives_the_same_text(two_ranks: LLM) -> None:
    [whole] = two_ranks.generate("class Shape:\n", GREEDY)
    *pieces, last = two_ranks.stream("class Shape:\n", GREEDY)
    assert isinstance(last, RequestOutput) and last.outputs == whole.outputs
    assert "".join(pieces) == whole.outputs[0].text and len(pieces) > 5


def test_n_seeds_and_logprobs(two_ranks: LLM) -> None:
    params = SamplingParams(n=3, seed=11, temperature=0.9, max_tokens=12, logprobs=2)
    [first], [again] = two_ranks.generate("import os\n", params), two_ranks.generate("import os\n", params)
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 3
    for completion in first.outputs:
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            assert 2 <= len(entries) <= 3 and entries[token].logprob <= 0
            assert entries[token].rank >= 1
        total = sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total)


def test_stops(two_ranks: LLM) -> None:
    [free] = two_ranks.generate("The for statement is used to", GREEDY)
    text, tokens = free.outputs[0].text, free.outputs[0].token_ids
    stop = text[10:14]
    by_text = SamplingParams(temperature=0, max_tokens=32, stop=stop)
    [stopped] = two_ranks.generate("The for statement is used to", by_text)
    assert stopped.outputs[0].text == text[: text.find(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    by_token = SamplingParams(temperature=0, max_tokens=32, stop_token_ids=[tokens[5]])
    [at_token] = two_ranks.generate("The for statement is used to", by_token)
    assert at_token.outputs[0].token_ids == tokens[: tokens.index(tokens[5]) + 1]
    assert at_token.outputs[0].stop_reason == tokens[5]


def test_min_tokens_holds_stops_back(two_ranks: LLM) -> None:
    [free] = two_ranks.generate("def f(x):", GREEDY)
    params = SamplingParams(temperature=0, max_tokens=8, min_tokens=8, stop_token_ids=[free.outputs[0].token_ids[0]])
    [held] = two_ranks.generate("def f(x):", params)
    assert len(held.outputs[0].token_ids) == 8 and free.outputs[0].token_ids[0] not in held.outputs[0].token_ids[:7]


@pytest.mark.parametrize(
    ("prompt", "params", "complaint"),
    [
        ("", GREEDY, "the prompt is empty"),
        ({"prompt_token_ids": []}, GREEDY, "the prompt is empty"),
        ({"prompt_token_ids": [1, 99999]}, GREEDY, "token id 99999 is not in the vocabulary, 0 to 4095"),
        ({"prompt_token_ids": [1] * 2048}, GREEDY, "has 2048 tokens and the context holds 2048"),
    ],
)
def test_bad_prompts_are_refused_and_the_engine_goes_on(two_ranks: LLM, prompt, params, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        two_ranks.generate(["fine", prompt], params)
    assert two_ranks.engine.batcher.idle
    assert two_ranks.generate("fine", GREEDY)[0].finished


def test_one_wish_a_prompt(two_ranks: LLM) -> None:
    with pytest.raises(InputError, match="1 sampling parameters for 2 prompts"):
        two_ranks.generate(["a", "b"], [GREEDY])


def test_abandoned_streams_free_their_slot(two_ranks: LLM) -> None:
    for _ in range(8):  # more than there are slots
        stream = two_ranks.stream("def ", SamplingParams(max_tokens=50))
        next(stream)
        stream.close()
    assert two_ranks.engine.batcher.idle and not two_ranks.engine.requests.completions
    two_ranks.engine.batcher.check_integrity()


def test_timeline_bytes_and_checksums_of_a_batch(two_ranks: LLM) -> None:
    engine, tokens = two_ranks.engine, list(range(200))
    batch = one_prompt(200)
    plan = engine.planner.plan(batch)
    result = engine.probe(batch, tokens, plan, RunOptions(timeline=True, checksums=True, logits=True))
    assert result.timeline is not None and result.timeline.ranks == [0, 1]
    last = f"L{engine.model.layers - 1}"
    unwanted = ("reduce", f"{last}.attention", 100), ("compute", f"{last}.mlp", 100), ("reduce", f"{last}.mlp", 100)
    ran = [(e.kind, e.stage, e.rows.stop) for e in result.timeline.events if e.rank == 0]
    assert ran == [s for s in ((s.kind, s.stage, s.rows.stop) for s in plan.program) if s not in unwanted]
    assert len(result.timeline.events) == 2 * len(ran)
    assert result.timeline.seconds <= 2 * result.seconds
    assert result.checksums[0] == result.checksums[1] != []
    assert result.bytes_sent[0] > 0
    assert len(result.logits) == 4 * engine.model.vocabulary


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_noticed_and_the_batch_completes(packaged: Path, victim: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    prompts = ["The for statement is used to", "import sys\n"]
    with LLM(packaged, tensor_parallel_size=2, overlap="iso:2", num_threads=1) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        pid, noticed = llm.engine.workers.controller.launcher.pids()[victim], []
        stop, killed = llm.engine.workers.controller.stop, []

        def kill() -> None:
            killed.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)

        def noted_stop() -> None:
            noticed.append(time.monotonic())
            stop()

        llm.engine.workers.controller.stop = noted_stop  # type: ignore[method-assign]
        timer = threading.Timer(0.2, kill)
        timer.start()
        outputs = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        timer.join()
        assert noticed and noticed[0] - killed[0] < 2.0
        assert [len(output) for output in outputs] == [120, 120]
        # The prompts and the tokens so far are computed again in one piece, which may round the last bits
        # otherwise; on this model they lead to the same tokens.
        assert outputs == expected
        assert llm.generate("def ", GREEDY)[0].finished
        llm.engine.batcher.check_integrity()


def test_workers_that_keep_dying_end_with_one_line(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(packaged, num_threads=1) as llm:
        submit = llm.engine.workers.controller.submit

        def dying(*arguments: object) -> object:
            os.kill(llm.engine.workers.controller.launcher.pids()[0], signal.SIGKILL)
            time.sleep(0.2)
            return submit(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(llm.engine.workers.controller, "submit", dying)
        with pytest.raises(WorkerFailed, match="ranks were lost 4 times within a minute; .*SIGKILL"):
            llm.generate("x", GREEDY)


def test_errors_in_workers_leave_nothing_behind(checkpoints: Checkpoints, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(checkpoints.directory("llama"), tmp_path / "broken"))
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or corrupt"):
        LLM(broken, tensor_parallel_size=2, num_threads=1)


def test_too_little_memory_says_what_was_needed(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(checkpoints.directory("llama"), num_threads=1) as llm:
        llm.engine.batcher.memory = 100
        with pytest.raises(InputError, match=r"132 tokens need .* GiB of key/value memory and .* GiB are free"):
            llm.generate({"prompt_token_ids": [1] * 100}, GREEDY)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tensor_parallel_size": 0}, "--tp 0 is not allowed"),
        ({"overlap": "magic"}, "not a strategy; allowed: auto, serial, iso"),
        ({"wire": "int3"}, "--wire 'int3' is not known; allowed: exact, bf16"),
        ({"tensor_parallel_size": 2, "shares": [1]}, "--shares gives 1 number for 2 ranks"),
        ({"shares": [-1]}, "every share must be a number above 0"),
        ({"max_model_len": 9999}, "more than the model's context of 2048"),
        ({"dtype": "int7"}, "'int7' is not known; allowed: float32, bfloat16"),
        ({"num_threads": 0}, "num_threads 0 is not allowed"),
        ({"cores": [0], "num_threads": 2}, "1 ranks of 2 threads need 2 cores"),
    ],
)
def test_options_that_are_not_allowed(packaged: Path, options: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        LLM(packaged, **options)


def test_bfloat16(packaged: Path) -> None:
    with LLM(packaged, tensor_parallel_size=2, dtype="bfloat16", num_threads=1) as llm:
        [low] = llm.generate("The for statement is used to", GREEDY)
    with LLM(packaged, num_threads=1) as llm:
        [full] = llm.generate("The for statement is used to", GREEDY)
    assert low.outputs[0].token_ids[:3] == full.outputs[0].token_ids[:3]


def test_a_rank_loads_little_more_than_its_shard(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Peak memory of loading: shard + embeddings + 10%."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    LLM(tmp_path, tensor_parallel_size=2, num_threads=1).close()  # a first start tries kernels
    with LLM(tmp_path, tensor_parallel_size=2, num_threads=1) as llm:
        for loaded in llm.engine.workers.started.loaded:
            assert loaded.weights > 180e6
            assert loaded.peak < 1.1 * loaded.weights


@pytest.mark.parametrize(("weights", "alike"), [("bfloat16", 6), ("int8", 6), ("int4", 3)])
def test_weights_of_few_bits(packaged: Path, weights: str, alike: int) -> None:
    """The answer of float32, for a while; and the same from any number of ranks, cuts and neighbours."""
    prompt = "class Shape:\n    def area(self):\n        raise NotImplementedError\n" * 4
    with LLM(packaged, num_threads=1) as llm:
        [full] = llm.generate(prompt, GREEDY)
    with LLM(packaged, num_threads=1, weights=weights) as llm:
        [alone] = llm.generate(prompt, GREEDY)
        beside = llm.generate([prompt, "import", "def main(args):\n    print(", prompt[:70]], GREEDY)
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, weights=weights, overlap="iso:2") as llm:
        [cut] = llm.generate(prompt, GREEDY)
    tokens = alone.outputs[0].token_ids
    assert tokens[:alike] == full.outputs[0].token_ids[:alike]
    assert beside[0].outputs[0].token_ids == tokens
    assert cut.outputs[0].token_ids[:alike] == full.outputs[0].token_ids[:alike]


@pytest.mark.parametrize("ranks", [1, 2])
def test_pieces_and_reuse_change_nothing(packaged: Path, ranks: int) -> None:
    """Prompts in pieces, shared beginnings, several completions: the same tokens as whole and anew."""
    text = "class Shape:\n    def area(self):\n        raise NotImplementedError\n" * 12
    with LLM(packaged, tensor_parallel_size=ranks, overlap="serial", num_threads=1, enable_prefix_caching=False) as llm:
        assert llm.engine.tokenizer is not None
        ids = llm.engine.tokenizer.encode(text)
        prompts: list[Prompt] = [
            {"prompt_token_ids": part} for part in (ids[:200], ids[:150] + ids[10:60], ids[5:90], ids[:201])
        ]
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
        assert llm.engine.batcher.counts.reused == 0
    with LLM(
        packaged, tensor_parallel_size=ranks, overlap="iso:2", num_threads=1, max_num_batched_tokens=48, max_num_seqs=3
    ) as llm:
        for _ in range(2):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == expected
            llm.engine.batcher.check_integrity()
        assert llm.engine.batcher.counts.reused > 600
        several = llm.generate(prompts[0], SamplingParams(temperature=0.0, max_tokens=32, n=3))[0]
        assert [completion.token_ids for completion in several.outputs] == [expected[0]] * 3


def test_reproducible_with_pieces_and_reuse(packaged: Path) -> None:
    """The same bits: log-probabilities of the chosen tokens are equal, not merely close."""
    wishes = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0)
    prompts: list[Prompt] = [{"prompt_token_ids": [(7 * i) % 4000 + 1 for i in range(n)]} for n in (400, 385, 257, 129)]
    found = []
    for options in ({"enable_prefix_caching": False}, {"max_num_batched_tokens": 200}):
        with LLM(packaged, reproducible=True, num_threads=1, **options) as llm:  # type: ignore[arg-type]
            for prompt in prompts:
                output = llm.generate(prompt, wishes)[0].outputs[0]
                assert output.logprobs is not None
                found.append((output.token_ids, output.cumulative_logprob))
            reused = llm.engine.batcher.counts.reused
    assert reused == 128 * 2 + 128 and found[:4] == found[4:]


def test_completions_of_a_schema(two_ranks: LLM) -> None:
    schema = (
        '{"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": false}'
    )
    params = SamplingParams(n=3, seed=1, max_tokens=40, json_schema=schema)
    for completion in two_ranks.generate("as JSON: ", params)[0].outputs:
        assert completion.text in ('{"a": 1}', '{"a": 22}') and completion.finish_reason == "stop"


def test_sequences_that_had_to_wait_for_memory_go_on_where_they_were(packaged: Path) -> None:
    prompts: list[Prompt] = [{"prompt_token_ids": [i + 1, i + 2, 17 * i + 5, 40, 41]} for i in range(4)]
    wishes = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with LLM(packaged, num_threads=1, enable_prefix_caching=False) as llm:
        expected = [llm.generate(prompt, wishes)[0].outputs[0].token_ids for prompt in prompts]
        llm.engine.batcher.memory = 130
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, wishes)]
        assert llm.engine.batcher.counts.preempted > 0
        llm.engine.batcher.check_integrity()
    assert found == expected
