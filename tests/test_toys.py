"""What is added to weft touches one place: a stage with matrices of its own, a strategy, a lane."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.outlines import changed, decoder_outline
from tests.ranks import Ranks
from tests.simulate.costs import costs
from tests.tiny import Checkpoints, prompt_of
from weft.config import ModelConfig
from weft.model import families
from weft.model.blueprint import Blueprint, Branch, Matrix, Norm, StageParts
from weft.model.branches import BRANCHES, Making, Mlp
from weft.model.description import model_config
from weft.model.families import FAMILIES
from weft.model.family import Family, decoder
from weft.model.forward import Extent
from weft.model.shares import shard_bytes, tensor_shares
from weft.model.weights import BranchWeights
from weft.outlook.figures import shard_of
from weft.program.batch import Batch, Rows, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.fold import Issue, folded
from weft.program.stages import Kind, Outline, Stage
from weft.program.steps import Program
from weft.program.strategy import Strategy
from weft.program.text import parse, write
from weft.simulate.predicted import simulate
from weft.timeline.svg import svg

# A family: a Llama with one more stage in each layer, relu(x @ up) @ down, divided like the MLP.


@dataclass(frozen=True)
class ToyBranch(Branch):
    """Declares it."""


def toy(config: ModelConfig, family: Family) -> Blueprint:
    plain = decoder(config, family)
    width = plain.axis("width")
    up, down = Matrix("toy.up_proj", width, plain.hidden), Matrix("toy.down_proj", plain.hidden, width)
    stage = StageParts(Stage("toy", Kind.REDUCE), (ToyBranch((up,), down, Norm("toy_layernorm"), 2.0),))
    return replace(plain, layer=(*plain.layer, stage))


def made(making: Making, branch: Branch, layer: int, weights: BranchWeights) -> Mlp:
    return Mlp(weights, torch.relu)


@pytest.fixture
def toys(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the toy family."""
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], declare=toy))
    monkeypatch.setitem(BRANCHES, ToyBranch, made)
    source = checkpoints.directory("llama")
    tensors, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(4)
    config = model_config(source)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.toy"
        tensors[f"{prefix}.up_proj.weight"] = torch.randn(config.intermediate, config.hidden, generator=generator)
        tensors[f"{prefix}.down_proj.weight"] = torch.randn(config.hidden, config.intermediate, generator=generator)
        tensors[f"{prefix}_layernorm.weight"] = torch.rand(config.hidden, generator=generator)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    return tmp_path


def test_a_family_with_one_more_stage(toys: Path) -> None:
    tokens, batch = prompt_of(90), one_prompt(90)
    alone = Ranks(toys, (1.0,))
    expected = alone.run(batch, tokens, "serial")[0].logits
    weights, config = load_file(toys / "model.safetensors"), alone.config
    functions, _, slabs = alone.parts[0]
    hidden = torch.randn(5, config.hidden)
    stage, extent = functions.stages["toy", 1], Extent(Rows(0, 5), Rows(0, 5))
    forward = functions.begin(one_prompt(5), tokens[:5], slabs)
    got = stage.tail(forward, extent, stage.body(forward, extent, stage.enter(forward, extent, hidden)))
    normed = torch.nn.functional.rms_norm(
        hidden, (config.hidden,), weights["model.layers.1.toy_layernorm.weight"], config.norm_epsilon
    )
    up, down = (weights[f"model.layers.1.toy.{name}_proj.weight"] for name in ("up", "down"))
    assert torch.allclose(got, (normed @ up.T).relu() @ down.T, rtol=1e-3, atol=1e-3)
    alone.close()
    for shares in ((1.0, 1.0), (2.0, 1.0, 1.0)):
        ranks = Ranks(toys, shares)
        for strategy in ("serial", "iso:2", "iso:3+ahead", "iso:2/4", "iso:2+rs", "tiles:3"):
            logits = ranks.run(batch, tokens, strategy)[0].logits
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max(), strategy
        ranks.close()


def test_memory_costs_and_programs_know_of_it(toys: Path) -> None:
    config = model_config(toys)
    blueprint, plain = families.blueprint_of(config), decoder(config, FAMILIES["llama"])
    more = config.layers * 2 * config.hidden * config.intermediate
    for made_of, numbers in ((blueprint, plain.numbers + more), (plain, plain.numbers)):
        [share] = tensor_shares(made_of, (1.0,))
        assert made_of.numbers == numbers and shard_bytes(made_of, share, "bfloat16") == 2 * numbers
    half = tensor_shares(blueprint, (1.0, 1.0))[0]
    other = tensor_shares(plain, (1.0, 1.0))[0]
    assert shard_bytes(blueprint, half, "float32") - shard_bytes(plain, other, "float32") == 4 * more // 2
    assert [part for part, _ in shard_of(blueprint, half).layer] == ["attention", "mlp", "toy"]
    program = build(Strategy.parse("iso:2"), blueprint.outline, one_prompt(50))
    check(program, blueprint.outline, one_prompt(50))
    assert "reduce   L0.toy        a" in write(program)


# A strategy: attention in two chunks, and each sum goes as soon as the other chunk's computation is issued.


def late(outline: Outline) -> list[Issue]:
    issues: list[Issue] = []
    sums: dict[Rows, int] = {}
    for place, stage in enumerate(outline.stages):
        halves = [Rows(0, 1), Rows(1, 2)] if stage.collective is Kind.REDUCE else [Rows(0, 2)]
        wanted, summed = place >= outline.narrow_from, {}
        for rows in halves:
            after = tuple(index for chunk, index in sums.items() if chunk.intersects(rows))
            issues.append(Issue(Kind.COMPUTE, stage.part, stage.layer, rows, after, wanted))
        for rows in halves if stage.collective else []:
            issues.append(Issue(stage.collective, stage.part, stage.layer, rows, wanted=wanted))
            summed[rows] = len(issues) - 1
        sums = summed
    return issues


def test_a_strategy(checkpoints: Checkpoints) -> None:
    outline, batch = decoder_outline(80), one_prompt(1000)
    program = Program(folded(outline, late), (0, 500, 1000))
    check(program, outline, batch)
    assert parse(write(program)) == program and len(write(program).splitlines()) < 40
    timeline = simulate(program, batch, costs(), "exact")
    assert timeline.seconds > simulate(build(Strategy.parse("iso:2"), outline, batch), batch, costs(), "exact").seconds
    ranks = Ranks(checkpoints.directory("llama"), (1.0, 1.0))
    program, tokens = Program(folded(ranks.outline, late), (0, 30, 70)), prompt_of(70)
    expected, got = (ranks.run(one_prompt(70), tokens, each)[0].logits for each in ("serial", program))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    ranks.close()


# A lane: every other sum on a network of its own.


def test_a_lane(checkpoints: Checkpoints) -> None:
    ranks, tokens, batch = Ranks(checkpoints.directory("llama"), (1.0, 1.0, 1.0)), prompt_of(80), one_prompt(80)
    plain = ranks.plan(batch, "iso:2")
    program = changed(plain, lambda step: step._replace(on="wifi") if step.kind is Kind.REDUCE and step.chunk else step)
    check(program, ranks.outline, batch)
    assert parse(write(program)) == program and "on wifi" in write(program)
    timeline = simulate(program, batch, costs(), "exact")
    assert timeline.lanes == ("compute", "network", "wifi") and "wifi" in svg([timeline])
    expected, got = (ranks.run(Batch(batch.segments), tokens, each)[0] for each in (plain, program))
    assert torch.equal(got.logits, expected.logits) and got.busy["wifi"] > 0
    ranks.close()
