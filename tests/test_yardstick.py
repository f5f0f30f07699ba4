"""How many ranks: what is said of them at the start, and what `--tp auto` takes."""

from __future__ import annotations

import re
import time
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.outlines import decoder_outline
from tests.processes import free_port
from tests.simulate.costs import costs
from tests.test_choosing import hello
from weft import LLM, InputError, SamplingParams, yardstick
from weft.config import EngineConfig, available_cores
from weft.launch.hub import Hub
from weft.launch.joined import JoinedLauncher
from weft.links import Link
from weft.model.description import model_config
from weft.opening import open_engine
from weft.plan.planner import Planner
from weft.simulate.cost import Table
from weft.yardstick import Yardstick, alone, best_of, counts, judged, measured, predicted, recalled, with_ranks

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def engine_with(packaged: Path, times: float, ranks: int = 2) -> SimpleNamespace:
    """What `judged` looks at."""
    model = model_config(packaged)
    launcher = SimpleNamespace(link_name="somewhere", may_change=False)
    return SimpleNamespace(
        config=EngineConfig.resolve(model, ranks=ranks, threads=1), model=model,
        planner=Planner(decoder_outline(6), "auto", "exact", 1, costs(times)),
        workers=SimpleNamespace(controller=SimpleNamespace(launcher=launcher)),
    )  # fmt: skip


@pytest.mark.parametrize(("times", "faster"), [(10.0, False), (0.05, True)])
def test_one_line_says_what_fewer_would_take(packaged: Path, times: float, faster: bool) -> None:
    line = judged(engine_with(packaged, times))  # type: ignore[arg-type]
    assert line is not None and line.startswith("2 ranks (predicted): a prompt of 512 in ")
    assert "; one of them alone: a prompt in " in line and ("--tp 1 would be faster" in line) == faster
    assert judged(engine_with(packaged, times, ranks=1)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("hop", "faster"), [(0.0, False), (0.05, True)])
def test_one_rank_is_named_where_sections_only_cost_a_lone_request(packaged: Path, hop: float, faster: bool) -> None:
    """Two sections take what one rank does, and their messages; where messages are for nothing, pieces gain."""
    engine = engine_with(packaged, 10.0)
    engine.config = EngineConfig.resolve(engine.model, ranks=1, sections=2, threads=1, weights="float32")
    known = costs(10.0)
    wires = {name: replace(wire, send=Table((0.0, 1e6), (hop, hop))) for name, wire in known.wires.items()}
    rank = known.ranks[0]
    known = replace(known, ranks=(rank, rank), wires=wires)
    engine.planner = Planner(decoder_outline(6), "auto", "exact", 1, known, layout=engine.config.layout)
    engine.workers.started = SimpleNamespace(hellos=[hello(rank, 8 << 30) for rank in range(2)])
    line = judged(engine)  # type: ignore[arg-type]
    assert (line is not None and line.endswith("--pp 1 would be faster for a request by itself")) == faster
    engine.workers.started = SimpleNamespace(hellos=[hello(0, 1000, "a"), hello(1, 8 << 30, "b")])
    assert judged(engine) is None, "one alone has no memory for it"  # type: ignore[arg-type]


def test_what_was_measured_counts_more_than_what_is_guessed(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        yardstick,
        "recalled",
        lambda model, config, link: Yardstick(0.001, 1e-6, "today") if config.ranks == 1 else None,
    )
    line = judged(engine_with(packaged, 10.0))  # type: ignore[arg-type]
    assert line is not None and "; 1 rank (measured today): a prompt of 512 in 1 ms, then 0.001 ms a greedy" in line
    assert line.endswith(". --tp 1 would be faster")


def test_one_of_them_alone_has_all_to_compute_and_nothing_to_send() -> None:
    whole = alone(Planner(decoder_outline(6), "serial", "exact", 1, costs(1.0)))
    known = predicted(Planner(decoder_outline(6), "serial", "exact", 1, costs(1e9)))  # over a link that takes nothing
    assert whole.prompt == pytest.approx(2 * known.prompt, rel=0.1) and whole.token < 2 * known.token


def test_alone_is_a_range_and_no_link_is_of_one_rank(packaged: Path) -> None:
    line = str(judged(engine_with(packaged, 10.0)))  # type: ignore[arg-type]
    found = re.search(r"alone: a prompt in ([\d.]+) ms to ([\d.]+) ms, then ([\d.]+) ms to ([\d.]+) ms a token", line)
    assert found is not None, line
    least, most, fast, slow = map(float, found.groups())
    assert most == pytest.approx(2 * least, rel=0.1) and fast < slow and line.endswith("--tp auto measures it")
    model = model_config(packaged)
    far = EngineConfig.resolve(model, ranks=2, threads=1, link=Link.parse("none,5ms"), transport="tcp")
    near = EngineConfig.resolve(model, ranks=2, threads=1)
    assert with_ranks(far, 1) == with_ranks(near, 1)


def test_the_same_cores_for_fewer_ranks(packaged: Path) -> None:
    config = EngineConfig.resolve(model_config(packaged), ranks=4, threads=2, shares=(1, 2, 3, 4))
    assert [(c.ranks, c.threads, c.layout.shares[0]) for c in (with_ranks(config, 1), with_ranks(config, 2))] == [
        (1, 8, (1.0,)), (2, 4, (1.0, 1.0)),
    ]  # fmt: skip


def test_auto_takes_the_best_and_tries_once(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = counts(model_config(packaged))
    assert numbers[0] == 1 and all(number <= available_cores() for number in numbers)
    tried: list[int] = []
    real = yardstick.measured

    def measuring(engine: object) -> Yardstick:
        tried.append(engine.config.ranks)  # type: ignore[attr-defined]
        return real(engine)  # type: ignore[arg-type]

    monkeypatch.setattr(yardstick, "measured", measuring)
    for again in (False, True):
        with LLM(packaged, tensor_parallel_size="auto", max_model_len=600) as llm:
            [line] = [notice for notice in llm.engine.notices if notice.startswith("--tp auto takes")]
            when = f", as measured {date.today()} (--recalibrate measures anew)" if again else ""
            assert f"takes {llm.engine.config.ranks}. By the number of ranks{when}: 1: a prompt of 512" in line
            assert llm.generate("def main(", PARAMS)[0].outputs[0].token_ids
        assert tried == numbers, f"{'kept' if again else 'measured'}"


def test_auto_weighs_prompt_and_tokens(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_config(packaged)
    configs = [EngineConfig.resolve(model, ranks=ranks, threads=1) for ranks in (1, 2, 4)]
    known = {1: Yardstick(1.0, 0.001, "then"), 2: Yardstick(0.5, 0.004, "then"), 4: Yardstick(0.3, 0.01, "now")}
    monkeypatch.setattr(yardstick, "recalled", lambda model, config, link: known[config.ranks])
    best, line = best_of(packaged, model, configs, lambda what, share: None, again=False)
    assert best.ranks == 2 and "4: a prompt of 512 in 300 ms, then 10 ms a greedy token" in line
    assert "as measured then and now (" in line


def test_what_is_measured_is_kept(packaged: Path) -> None:
    with closing(open_engine(packaged, ranks=1, threads=1, max_length=300)) as engine:
        found = measured(engine)
        assert 0 < found.token < found.prompt
        link = engine.workers.controller.launcher.link_name
        assert recalled(engine.model, engine.config, link) == found
        assert recalled(engine.model, with_ranks(engine.config, 1), "elsewhere") is None
        assert engine.add([5, 6, 7], PARAMS) and engine.step()  # memory was left as it was


@pytest.mark.parametrize("options", [{"num_threads": 1}, {"shares": (1, 1)}, {"link": "shaped:1x"}])
def test_auto_divides_the_cores_itself(packaged: Path, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"--tp auto takes this machine's cores as they are"):
        LLM(packaged, tensor_parallel_size="auto", **options)  # type: ignore[arg-type]


def test_a_paced_link_is_kept_also_after_a_loss(packaged: Path) -> None:
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, overlap="serial", link="none,4ms") as llm:
        assert "link none,4ms, emulated" in llm.engine.notices
        sums = sum(step.lane == "network" for step in llm.engine.planner.plan(yardstick.one_prompt(1)).program)

        def seconds() -> float:
            begin = time.perf_counter()
            assert len(llm.generate("def main(", PARAMS)[0].outputs[0].token_ids) == 8
            return time.perf_counter() - begin

        assert seconds() >= 8 * sums * 0.004
        llm.engine.workers.restart(RuntimeError("planted"))
        assert seconds() >= 8 * sums * 0.004


def test_a_multiple_of_the_balance_is_found(packaged: Path) -> None:
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, overlap="serial", link="2x,1ms") as llm:
        link = llm.engine.workers.controller.link
        assert link.times is None and 10e6 < (link.rate or 0) < 100e9 and link.delay == 0.001
        assert f"link {link}, emulated, 2 times the balance found here" in llm.engine.notices


def test_links_that_can_not_be_kept(packaged: Path) -> None:
    with pytest.raises(InputError, match="leave out --transport gloo"):
        LLM(packaged, tensor_parallel_size=2, link="1x", transport="gloo")
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{free_port()}"), 1)
    with closing(launcher), pytest.raises(InputError, match="for ranks of this machine"):
        LLM(packaged, tensor_parallel_size=2, link="1x", launcher=launcher)


@pytest.mark.parametrize("transport", ["shm", "tcp", "gloo"])
def test_every_transport_gives_the_same_tokens(packaged: Path, transport: str) -> None:
    with LLM(packaged, num_threads=1) as one:
        expected = one.generate("def main(", PARAMS)[0].outputs[0].token_ids
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, overlap="serial", transport=transport) as llm:
        assert llm.generate("def main(", PARAMS)[0].outputs[0].token_ids == expected
