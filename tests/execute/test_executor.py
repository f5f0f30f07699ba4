"""The whole forward pass against transformers, and programs against each other."""

from __future__ import annotations

import gc
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.execute.programs import SEGMENTS, TOKENS, legal_programs
from tests.outlines import changed
from tests.ranks import LOSSY, Ranks
from tests.tiny import MODELS, Checkpoints, prompt_of
from weft.execute.executor import Result, Scope
from weft.execute.owed import Owed
from weft.model.forward import Extent
from weft.parallel.allreduce import all_reduce
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.check import check
from weft.program.stages import Kind
from weft.program.text import parse, write

STRATEGIES = ("serial", "iso:2", "iso@5,300", "iso:2/4", "tiles:4", "requests", "iso:2+rs", "iso:3+tiles:2",
              "iso:3+ahead")  # fmt: skip
SPLITS = ((1.0,), (1.0, 1.0), (1.0,) * 3, (1.0,) * 4, (2.0, 1.0), (1.0, 3.0, 2.0, 1.0))
PROMPTS = ((1,), (2,), (17,), (700,), (3, 200, 41))
FEWER = ("serial", "iso:2", "iso@5,300", "tiles:4")  # of the odd ones


def strategies(name: str) -> tuple[str, ...]:
    """Those that a model is tried with; where norms go over all heads, sums can't be scattered."""
    tried = FEWER if name.endswith("-odd") else STRATEGIES
    return tuple(each for each in tried if not ("rs" in each and "olmo" in name))


SAMPLE = [
    (name, SPLITS[(index + number) % len(SPLITS)], strategy, PROMPTS[(2 * index + number) % len(PROMPTS)])
    for index, name in enumerate(MODELS)
    for number, strategy in enumerate(strategies(name))
    if (index + number) % 3 == 0 or (strategy == "iso:2" and not name.endswith("-odd"))
]


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
    ("name", "shares", "strategy", "lengths"),
    [case for name in MODELS for case in itertools.product([name], SPLITS, strategies(name), PROMPTS)],
)
def test_same_as_transformers_everywhere(checkpoints, split, name, shares, strategy, lengths) -> None:
    agrees(checkpoints, split(name, shares), name, strategy, lengths)


@pytest.mark.parametrize(("name", "lags"), [
    ("qwen3", (0, 0)), ("qwen3", (0, 1)), ("qwen3", (1, 1)), ("olmo2", (0, 0, 0)), ("cohere2", (0,)), ("gemma2", (0, 0))
])  # fmt: skip
@pytest.mark.parametrize("world", [2, 3])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_legal_program_equals_serial(split, world: int, name, lags, data: st.DataObject) -> None:
    """Whatever its stages read, its lanes and its algorithms are, and from where on wanted rows go on alone."""
    ranks = split(name, (1.0,) * world, lags=lags)
    program = data.draw(legal_programs(ranks.outline))
    tokens, batch = prompt_of(TOKENS), Batch(SEGMENTS)
    check(program, ranks.outline, batch)
    near(ranks.run(batch, tokens, program)[0], ranks.run(batch, tokens, "serial")[0])


def near(actual: Result, expected: Result) -> None:
    """The same logits, and the same sums of hidden states."""
    pairs = [(actual.logits, expected.logits), *zip(actual.pooled, expected.pooled, strict=True)]
    assert len(pairs) == 2
    assert all((one - other).abs().max() <= 1e-5 * other.abs().max() for one, other in pairs)


@pytest.mark.parametrize(("shares", "times"), [((1.0,), 2), ((1.0,), 3), ((1.0, 1.0), 2)])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_steps_may_be_for_some_ranks(split, shares: tuple[float, ...], times: int, data: st.DataObject) -> None:
    """Groups of ranks that have some of the stages each, and hand rows on to the next one, equal one rank."""
    ranks, one = split("qwen3", shares, times=times), split("qwen3", (1.0,))
    groups = [tuple(range(n * len(shares), (n + 1) * len(shares))) for n in range(times)]
    program = data.draw(legal_programs(ranks.outline, groups))
    tokens, batch = prompt_of(TOKENS), Batch(SEGMENTS)
    check(program, ranks.outline, batch, ranks.world)
    assert parse(write(program)) == program
    results = ranks.run(batch, tokens, program)
    pooled = next(result.pooled for result in results if result.pooled)
    near(replace(results[0], pooled=pooled), one.run(batch, tokens, "serial")[0])
    likeliest = torch.stack(results[0].told)[:, :, 0].max(dim=0).values
    assert all(torch.equal(torch.stack(r.told)[:, :, 0].max(dim=0).values, likeliest) for r in results)


@pytest.mark.parametrize("lags", [(0, 0), (0, 1), (1, 1)])
def test_stages_read_what_the_outline_says(split, lags: tuple[int, int]) -> None:
    """By hand, stage after stage: each one's input is the sum of what those before it left, up to where it reads."""
    ranks, tokens, batch = split("llama", (1.0,), lags=lags), prompt_of(50), one_prompt(50)
    decoder, _, slabs = ranks.parts[0]
    forward, rows = decoder.begin(batch, tokens, slabs), Rows(0, 50)
    left, extent = [], Extent(rows, rows)
    for place, stage in enumerate(ranks.outline.stages):
        functions = decoder.stages[stage.part, stage.layer]
        hidden = decoder.empty_hidden(50)
        for before, total in left[: ranks.outline.input_until(place) + 1]:
            before.absorb(forward, extent, hidden, total)
        features = functions.body(forward, extent, functions.enter(forward, extent, hidden))
        left.append((functions, functions.tail(forward, extent, features)))
    expected = left[-1][1][-1:]
    for strategy in ("serial", "iso:2", "iso:3+ahead", "iso:2/4"):
        logits = ranks.run(batch, tokens, strategy)[0].logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_some_sums_may_travel_in_fewer_bytes_than_others(split) -> None:
    ranks, tokens, batch = split("llama", (1.0, 1.0)), prompt_of(200), one_prompt(200)
    exact = ranks.plan(batch, "iso:2")
    mixed = changed(
        exact, lambda step: step._replace(wire="bf16") if (step.kind, step.part) == (Kind.REDUCE, "mlp") else step
    )
    check(mixed, ranks.outline, batch)
    group, sent, logits = ranks.parts[0][1].group, [], []
    for program, wire in ((exact, "exact"), (mixed, "exact"), (exact, "bf16")):
        before = group.bytes_sent
        logits.append(ranks.run(batch, tokens, program, wire)[0].logits)
        sent.append(group.bytes_sent - before)
    assert sent[2] < sent[1] < sent[0]
    some, all_of_them = ((logits[0] - each).abs().max() for each in logits[1:])
    assert 0 < some < 0.1 * logits[0].abs().max() and not torch.equal(logits[1], logits[2]) and all_of_them > 0


@pytest.mark.parametrize(("wire", "shares"), LOSSY)
def test_less_exact_wires_are_close_and_ranks_agree(split, wire, shares) -> None:
    ranks, prompt = split("llama", shares), prompt_of(200)
    exact, lossy = (ranks.logits([prompt], "iso:2", wire) for wire in ("exact", wire))
    error = (exact - lossy).norm() / exact.norm()
    assert 0 < error < {"bf16": 0.01, "int8": 0.03, "int4": 0.4}[wire]


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso@5,60/30,90", "tiles:4", "requests", "iso:3+ahead"])
@pytest.mark.parametrize("wanted", [1, 7, 40])
def test_nothing_is_lost_but_what_is_owed_in_the_end(split, strategy, wanted, monkeypatch) -> None:
    """Row by row, also where wanted rows go on alone: all partials are the sums, and what each rank still owes."""
    ranks = split("llama", (1.0, 1.0))
    batch = Batch((Segment(0, 0, 70, wanted), Segment(1, 0, 40, min(wanted, 40))))
    rows, width = batch.tokens, ranks.config.hidden
    given, taken, ledgers = torch.zeros(rows, width), torch.zeros(rows, width), dict[int, Owed]()
    lock, of = threading.Lock(), Owed.of

    def noted(owed: Owed, place: int, extent: Extent) -> torch.Tensor:
        ledgers[id(owed)] = owed
        where = range(*extent.leaves)
        threading.current_thread().where = (  # type: ignore[attr-defined]
            [batch.wanted_rows[row] for row in where] if owed._residual.leaves_alone(place) else list(where)
        )
        return of(owed, place, extent)

    def summed(group, codec, partial, algorithm, owed):
        where, before = threading.current_thread().where, partial.clone()  # type: ignore[attr-defined]
        total = all_reduce(group, codec, partial, algorithm, owed)
        with lock:
            given[where] += before
            taken[where] += total / group.world
        return total

    monkeypatch.setattr(Owed, "of", noted)
    monkeypatch.setattr("weft.execute.executor.all_reduce", summed)
    ranks.run(batch, prompt_of(rows), strategy, "int8")
    owed = torch.zeros(rows, width)
    for ledger in ledgers.values():
        owed += _owed_in_the_end(ledger, batch)
    assert len(ledgers) == 2 and owed.abs().max() > 0
    assert torch.allclose(given, taken + owed, atol=2e-5)


def _owed_in_the_end(ledger: Owed, batch: Batch) -> torch.Tensor:
    owed = ledger._all.clone()
    owed[list(batch.wanted_rows)] = ledger._kept
    return owed


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
    compute = ranks.run(batch, prompt, program, scope=Scope.COMPUTE)[0]
    network, beside = (ranks.run(batch, prompt, program, scope=scope)[0] for scope in (Scope.NETWORK, Scope.BESIDE))
    for result, lanes in (
        (both, {"compute", "network"}), (compute, {"compute"}), (network, {"network"}), (beside, {"network"}),
    ):  # fmt: skip
        ran = {step.lane for step, (_, stop) in zip(program, result.spans, strict=True) if stop > 0}
        assert ran == lanes


def test_messages_alone_on_the_threads_that_send_beside_a_computation(split) -> None:
    """Also the urgent ones: what they take of the processor is then what a computation loses."""
    ranks, prompt = split("llama", (1.0, 1.0)), prompt_of(64)
    program, by = ranks.plan(one_prompt(64), "serial"), set[str]()
    group = ranks.parts[0][1].group
    exchange = group.exchange

    def watched(*what: object) -> None:
        by.add(threading.current_thread().name)
        exchange(*what)

    group.exchange = watched
    try:
        ranks.run(one_prompt(64), prompt, program, scope=Scope.NETWORK)
        assert "weft-network-lane" not in by
        by.clear()
        ranks.run(one_prompt(64), prompt, program, scope=Scope.BESIDE)
        assert by == {"weft-network-lane"}
    finally:
        del group.exchange


def test_a_message_is_sent_once_for_every_collective(split) -> None:
    ranks, prompt = split("llama", (1.0, 1.0)), prompt_of(600)
    group = ranks.parts[0][1].group
    sent = []
    for strategy in ("serial", "iso:2", "iso:3+rs", "tiles:4"):
        before = group.bytes_sent
        ranks.logits([prompt], strategy)
        sent.append(group.bytes_sent - before)
    a_row = ranks.config.hidden * 4
    last = 2 * a_row  # of the last layer the wanted row alone, but where each rank has its part of the rows only
    told = 16  # of the logits
    # two-shot: N - 1 shards of 1/N, twice
    assert sent[0] == 2 * (ranks.config.layers - 1) * 600 * a_row + last + told
    assert sent[1] == sent[0] and sent[2] == 2 * ranks.config.layers * 600 * a_row + told
    assert sent[3] <= sent[0] * 2  # small tiles go one-shot, which sends everything


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso@5,300", "tiles:4"])
def test_parallel_blocks_send_half_the_messages(split, strategy: str) -> None:
    """One GPT-NeoX with attention and MLP beside each other, and behind each other."""
    sent, sums = [], []
    for name in ("gpt_neox", "gpt_neox-serial"):
        ranks = split(name, (1.0, 1.0))
        program = ranks.plan(one_prompt(600), strategy)
        group = ranks.parts[0][1].group
        before = group.bytes_sent
        ranks.run(one_prompt(600), prompt_of(600), program)
        sent.append(group.bytes_sent - before)
        sums.append(sum(step.kind is Kind.REDUCE for step in program))
    told, row = 16, ranks.config.hidden * 4  # of the logits; the last layer's sums are of the wanted row alone
    assert sums[1] == 2 * sums[0]
    if strategy != "tiles:4":  # small tiles go one-shot, which is more bytes
        assert sent == [601 * row + told, 2 * 601 * row + told]


@pytest.mark.parametrize("strategy", ["serial", "iso:2", "iso:2/4"])
def test_norms_over_all_heads_are_two_numbers_a_row(split, strategy: str) -> None:
    """On any wire as float32; nobody's error feedback."""
    ranks, prompt = split("olmo2", (1.0, 1.0)), prompt_of(600)
    group, sent = ranks.parts[0][1].group, {}
    for wire in ("exact", "int8"):
        before = group.bytes_sent
        ranks.logits([prompt], strategy, wire)
        sent[wire] = group.bytes_sent - before
    row, told, aside = ranks.config.hidden * 4, 16, 600 * 2 * 4
    assert sent["exact"] == 2 * 601 * row + told + ranks.config.layers * aside
    assert sent["int8"] < 0.4 * sent["exact"]
