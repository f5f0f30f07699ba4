"""`--overlap auto` on live ranks: measured once, kept, corrected, and the same tokens as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weft import LLM, SamplingParams
from weft.calibration import key_of
from weft.compare import Comparing, Variant
from weft.errors import InputError
from weft.plan import kept
from weft.plan.calibrate import BUDGET
from weft.program.batch import one_prompt
from weft.program.stages import COMPUTE, NETWORK

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


def file_of(llm: LLM) -> Path:
    engine = llm.engine
    return kept.path_of(key_of(engine.model, engine.config, engine.workers.controller.launcher.link_name))


def told_of(llm: LLM) -> list[str]:
    """What users are told, but for how many ranks are worth it."""
    *others, ranks = llm.engine.notices
    assert ranks.startswith("2 ranks (predicted): ")
    return others


def test_measured_once_then_kept(packaged: Path) -> None:
    told: list[tuple[str, float]] = []
    prompt = {"prompt_token_ids": list(range(300))}
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, progress=lambda *what: told.append(what)) as llm:
        tokens = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids  # type: ignore[arg-type]
        path, costs = file_of(llm), llm.engine.planner.costs
        assert told_of(llm) == [] and llm.engine.planner.overlap == "auto"
    assert "measuring costs" in {what for what, _ in told}
    found = kept.read(path)
    assert found.costs == costs and found.seconds < BUDGET + 1.5
    written = path.stat().st_mtime_ns
    with LLM(packaged, tensor_parallel_size=2, num_threads=1) as llm:
        assert llm.engine.planner.costs == costs and path.stat().st_mtime_ns == written
        assert llm.engine.planner.plan(one_prompt(300)).predicted is not None
    with LLM(packaged, num_threads=1) as llm:
        assert llm.engine.planner.costs is None  # one rank has nothing to overlap
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == tokens  # type: ignore[arg-type]
    path.write_text("not this")
    with LLM(packaged, tensor_parallel_size=2, num_threads=1) as llm:
        assert told_of(llm) == [f"the calibration in {path} can't be read: measuring again"]
    assert kept.read(path).key == found.key


def test_recalibrated_and_shared_by_speed(packaged: Path) -> None:
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, shares="auto", recalibrate=True) as llm:
        [notice] = told_of(llm)
        assert notice.startswith("shares by speed: ")
        [shares] = llm.engine.config.layout.shares
        assert max(shares) == 1.0 and min(shares) > 0.3
        assert llm.generate("import os", GREEDY)[0].outputs[0].token_ids
        assert file_of(llm).is_file()


def test_predicted_beside_measured(packaged: Path) -> None:
    """Same program, same steps in both timelines; equal programs are run once."""
    with LLM(packaged, tensor_parallel_size=2, num_threads=1) as llm:
        variants = [Variant(overlap, "exact") for overlap in ("serial", "iso:2", "auto")]
        comparing = Comparing(llm.engine, one_prompt(400), list(range(400)), variants)
        for _ in range(3):
            comparing.round()
        results = {measured.overlap: measured for measured in comparing.result()}
    cut = results["iso:2"]
    assert cut.predicted is not None and cut.predicted_timeline is not None
    assert 0.3 < cut.predicted / cut.median < 3
    for lane in (COMPUTE, NETWORK):
        pair = (cut.timeline.lane(0, lane), cut.predicted_timeline.lane(0, lane))
        names = [{(event.kind, event.stage, event.rows) for event in events} for events in pair]
        assert names[0] == names[1] and names[0]
    chosen = results["auto"]
    same = [m for m in (results["serial"], cut) if m.plan == chosen.plan]
    assert all(m.seconds == chosen.seconds for m in same)


def test_reproducible_too(packaged: Path) -> None:
    """Where cuts have to stand on the granule, also those that are tried."""
    prompt = {"prompt_token_ids": list(range(500))}
    outputs = []
    for options in ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "overlap": "serial"}):
        with LLM(packaged, num_threads=1, reproducible=True, **options) as llm:  # type: ignore[arg-type]
            outputs.append(llm.generate(prompt, GREEDY)[0].outputs[0].token_ids)  # type: ignore[arg-type]
    assert outputs[0] == outputs[1]


def test_the_layout_is_chosen_by_cost(packaged: Path) -> None:
    """Over a long link one message a pass beats two sums a layer; the line says what the other one would give."""
    with LLM(packaged, num_threads=1) as llm:
        expected = llm.generate("import os", GREEDY)[0].outputs[0].token_ids
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, layout="auto", link="none,5ms") as llm:
        [said] = [line for line in llm.engine.notices if line.startswith("layout")]
        assert all(each in said for each in ("layout tp 1 x pp 2 by cost (latency of ", "; tp 2: ", "; 2 replicas of "))
        assert llm.engine.config.layout.several and llm.engine.planner.costs is not None
        assert llm.generate("import os", GREEDY)[0].outputs[0].token_ids == expected
        plan = llm.engine.planner.plan(one_prompt(300))
        assert (plan.predicted is not None and plan.strategy.piece_cuts) or plan.strategy.pieces > 1


def test_layers_by_speed(packaged: Path) -> None:
    with LLM(packaged, pipeline_parallel_size=2, num_threads=1, layers="auto") as llm:
        [said] = [line for line in llm.engine.notices if line.startswith("layers by speed: ")]
        assert "of the least possible" in said and sum(llm.engine.config.layout.layers) == llm.engine.model.layers
        assert llm.generate("import os", GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "auto", "layers": (2, 2)}, "leave out --layers and --shares"),
        ({"layout": "auto", "shares": (1, 1)}, "leave out --layers and --shares"),
        ({"layout": "best"}, "--layout 'best' is not known; allowed: given, auto"),
        ({"layout": "auto", "optimise": "speed"}, "--optimise 'speed' is not known"),
        ({"tensor_parallel_size": "auto", "layout": "auto"}, "--tp auto finds a number of ranks for all layers"),
        ({"tensor_parallel_size": "auto", "pipeline_parallel_size": 2}, "--tp auto finds a number of ranks"),
    ],
)
def test_what_auto_does_not_go_with(packaged: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LLM(packaged, num_threads=1, **({"tensor_parallel_size": 2} | options))
