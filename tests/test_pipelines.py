"""Engines whose layers are in sections: several batches in flight, and what becomes of them when ranks are lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import Checkpoints, prompt_of
from weft import LLM, SamplingParams
from weft.errors import InputError
from weft.llm import RequestOutput

LENGTHS = (5, 90, 1, 33, 150, 17, 64, 2)
PROMPTS: list[Any] = [{"prompt_token_ids": list(prompt_of(length))} for length in LENGTHS]
LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
OPTIONS = {"num_threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 40, "reproducible": True}
LAYOUTS = [
    {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 3, "layers": (1, 3, 1)},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "overlap": "pipe:2+iso:2"},
]  # fmt: skip


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> Path:
    return checkpoints.directory("llama-deep")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with LLM(model, **OPTIONS) as llm:
        return tokens(llm.generate(PROMPTS, LONG))


@pytest.fixture(scope="module", params=LAYOUTS, ids=["pp2", "pp3", "tp2xpp2"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with LLM(model, **OPTIONS, **request.param) as made:
        yield made
        made.engine.batcher.check_integrity()
        assert made.engine.batcher.idle and not made.engine.flights


def test_answers_are_those_of_one_rank(llm: LLM, expected: list[list[int]]) -> None:
    """Prompts in pieces of 40 tokens, beside answers under way; sums of two ranks have other last bits."""
    found = tokens(llm.generate(PROMPTS, LONG))
    assert found == expected
    again = tokens(llm.generate(PROMPTS, LONG))  # from what was kept of them
    assert again == expected


def test_a_batch_is_limited_only_while_prompts_wait(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch may have takes searching for plans, which answers would wait for at every token."""
    asked, tokens_of = list[float | None](), llm.engine.budget.tokens

    def told(interval: float | None, *rest: Any) -> int:
        asked.append(interval)
        return tokens_of(interval, *rest)

    monkeypatch.setattr(llm.engine.budget, "tokens", told)
    monkeypatch.setattr(llm.engine, "config", replace(llm.engine.config, token_interval=10.0))
    llm.generate([{"prompt_token_ids": list(prompt_of(70, seed=9))}], LONG)
    alone = len(asked)
    assert asked[0] == 10.0 and asked.count(10.0) <= 6 and asked.count(None) >= 20
    llm.generate(PROMPTS, LONG)
    assert asked[alone:].count(10.0) >= 8, "eight prompts, each of which may make the others wait"


def test_wishes_are_heard(llm: LLM, model: Path) -> None:
    """What depends on the tokens before, which the ranks that choose must be told."""
    asked = [
        SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.3, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.1, seed=4, top_p=0.8, top_k=20, max_tokens=12, logprobs=3, ignore_eos=True),
    ]
    found = llm.generate(PROMPTS[:2], asked)
    with LLM(model, **OPTIONS) as one:
        known = one.generate(PROMPTS[:2], asked)
    assert tokens(found) == tokens(known)
    one_, other = (output[1].outputs[0].logprobs for output in (found, known))
    assert one_ is not None and other is not None and [set(each) for each in one_] == [set(each) for each in other]


def test_as_many_batches_are_in_flight_as_there_are_sections(llm: LLM, expected: list[list[int]]) -> None:
    engine, most, groups = llm.engine, 0, set[int]()
    requests = [engine.add(prompt["prompt_token_ids"], LONG) for prompt in PROMPTS]
    while not engine.batcher.idle:
        engine.step()
        engine.batcher.check_integrity()
        most = max(most, len(engine.flights))
        in_flight = [sequence for flight in engine.flights for sequence in flight.scheduled.sequences]
        decoding = [sequence for sequence in in_flight if sequence.produced]
        assert len(decoding) == len(set(decoding)), "a sequence's next token is asked for before this one is known"
        small = (flight.scheduled for flight in engine.flights if flight.scheduled.batch.tokens <= 8)
        groups |= {len(scheduled.sequences) for scheduled in small}
    # The batch that is waited for has come when a step ends.
    assert most == len(engine.config.layout.sections) - 1 or most == len(engine.config.layout.sections)
    assert max(groups) <= -(-len(PROMPTS) // len(engine.config.layout.sections))
    found = [list(request.sequences[0].output) for request in requests]
    assert found == expected
    for request in requests:
        engine.requests.settle(request)


@pytest.mark.parametrize("place", [0, -1])
def test_a_killed_rank_of_any_section_loses_nothing(llm: LLM, expected: list[list[int]], place: int) -> None:
    engine = llm.engine
    engine.workers.restarts.clear()
    total = engine.workers.restarts.total
    requests = [engine.add(prompt["prompt_token_ids"], LONG) for prompt in PROMPTS]
    while requests[0].sequences[0].produced < 8:
        engine.step()
    os.kill(engine.workers.controller.launcher.pids()[place], signal.SIGKILL)
    while not engine.batcher.idle:
        engine.step()
    assert [list(request.sequences[0].output) for request in requests] == expected
    assert [request.error for request in requests] == [""] * len(requests)
    assert engine.workers.restarts.total == total + 1
    for request in requests:
        engine.requests.settle(request)


def test_who_leaves_harms_no_other(llm: LLM, expected: list[list[int]]) -> None:
    """Sequences that are taken out while a batch with them is in flight; their memory goes to others."""
    engine = llm.engine
    requests = [engine.add(prompt["prompt_token_ids"], LONG) for prompt in PROMPTS]
    for turn in range(12):
        engine.step()
        if turn in (2, 5):
            gone = requests[turn].sequences
            for sequence in gone:
                sequence.finish_reason = "abort"
            engine.forget(gone)
            engine.batcher.check_integrity()
    late = engine.add(PROMPTS[2]["prompt_token_ids"], LONG)
    while not engine.batcher.idle:
        engine.step()
    stayed = [number for number in range(len(PROMPTS)) if number not in (2, 5)]
    assert [list(requests[n].sequences[0].output) for n in stayed] == [expected[n] for n in stayed]
    assert list(late.sequences[0].output) == expected[2]
    for request in (*requests, late):
        engine.requests.settle(request)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline_parallel_size": 6}, "--pp 6: the model has 5 layers; give at most"),
        ({"pipeline_parallel_size": 0}, "--pp 0 is not allowed; give a whole number from 1"),
        ({"pipeline_parallel_size": 2, "layers": (4, 2)}, "--layers 4,2 does not go with --pp 2 and a model of 5 la"),
        ({"pipeline_parallel_size": 2, "layers": (5, 0)}, "a section has none; .* as in 3,2"),
        ({"pipeline_parallel_size": 2, "layers": (4, 2)}, "they add up to 6"),
        ({"pipeline_parallel_size": 2, "layers": (3, 1, 1)}, "these are 3 numbers"),
        ({"layers": (3, 2)}, "--layers 3,2 is for as many sections: give --pp 2 too"),
        ({"layers": (3, 3)}, "--layers 3,3 does not go with --pp 1"),
        ({"pipeline_parallel_size": 2, "overlap": "rs"}, "sums can't be scattered where rows go on"),
        ({"pipeline_parallel_size": 2, "shares": (1.0,)}, "--shares gives 1 number for 2 ranks"),
    ],
)
def test_what_does_not_go_together(model: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LLM(model, num_threads=1, **options)
