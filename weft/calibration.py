"""What a calibration is of: the key under which its result is kept, and what is measured. Knows models and groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from random import Random

from weft.config import EngineConfig, ModelConfig, processor_name
from weft.execute.results import RunOptions, RunResult
from weft.layout import Layout
from weft.model.families import blueprint_of
from weft.parallel.sizes import LIKELIEST_BYTES, ONE_SHOT_BYTES, algorithms, row_bytes
from weft.plan.calibrate import MOST, Probe, calibrate, measure_message, measure_sums
from weft.plan.layouts import divisions
from weft.plan.planner import Plan
from weft.plan.samples import Sample, Subject
from weft.program.batch import Batch
from weft.program.steps import Program
from weft.program.strategy import GRANULE, Strategy
from weft.simulate.cost import Costs, Table
from weft.wires import needed

Run = Callable[[Batch, list[int], Plan, RunOptions], RunResult]
COSTS = 9  # counts what of them was given another meaning
LONG = 4096  # positions of a context, from which on a longer one is measured alike


def key_of(model: ModelConfig, config: EngineConfig, link: str) -> dict[str, str]:
    """Everything that costs depend on."""
    shape = (model.layers, model.hidden, model.intermediate, model.heads, model.kv_heads, model.head_dim,
             model.vocabulary)  # fmt: skip
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''} a rank"
    return {
        "weft": f"{version('weft')}, costs {COSTS}",
        "model": f"{model.model_type} {'x'.join(map(str, shape))} {config.dtype}",
        "kept": f"weights {config.weights}, keys and values {config.kv}",
        "context": str(min(config.max_length, LONG)),
        "ranks": _said(config.layout), "wires": ",".join(needed(config.wire)),
        "link": f"{link}, {config.transport}, {config.link}" + (", plain" if config.plain_data else ""),
        "device": f"{processor_name()}, {threads}" + (", pinned" if config.cores else ""),
        "kernels": "reproducible" if config.reproducible else "fastest",
    }  # fmt: skip


def _said(layout: Layout) -> str:
    """As in `2,1`, or for several sections `20 of 1,1; 12 of 1`."""
    shares = [",".join(f"{share:g}" for share in section.shares) for section in layout.sections]
    pairs = zip(layout.layers, shares, strict=True)
    return "; ".join(f"{layers} of {each}" for layers, each in pairs) if layout.several else shares[0]


def granule_of(config: EngineConfig) -> int:
    """Positions on whose multiples a sequence may be cut; see `strategy.place`."""
    return GRANULE if config.reproducible else 1


def subject_of(
    model: ModelConfig, config: EngineConfig, wires: tuple[str, ...], machines: Sequence[int]
) -> Subject:  # fmt: skip
    """What is measured for these wires."""
    blueprint, summing = blueprint_of(model), max((s.ranks for s in config.layout.sections), key=len)
    return Subject(
        outline=blueprint.outline, width=model.hidden, logits=LIKELIEST_BYTES, world=config.ranks,
        length=config.max_length, slots=config.max_sequences, limit=ONE_SHOT_BYTES,
        algorithms=algorithms([machines[rank] for rank in summing]),
        elements={wire: row_bytes(wire, config.dtype, model.hidden) / model.hidden for wire in wires},
        windows=blueprint.windows, granule=granule_of(config), kept=blueprint.kept,
        layout=config.layout if config.layout.several else None,
    )  # fmt: skip


def measured(
    run: Run, model: ModelConfig, config: EngineConfig,
    wires: tuple[str, ...], machines: Sequence[int], watch: Callable[[float], None],
) -> Costs:  # fmt: skip
    """What steps cost on these ranks, for these wires. `run`: runs a batch of random tokens by a plan; `machines`: of
    each rank, a number."""
    return calibrate(_probe(run, model), subject_of(model, config, wires, machines), watch)


def messages_measured(
    run: Run, model: ModelConfig, config: EngineConfig, machines: Sequence[int]
) -> dict[int, Table]:  # fmt: skip
    """What sums of 2, 3, … of these ranks cost, as far as a layout may have so many in each section; and under 1 what a
    message costs, where the layout that is there has none."""
    counts = sorted({tp for tp, pp, _ in divisions(config.ranks, model.layers, model.heads) if tp > 1})
    probe, subject = _probe(run, model), subject_of(model, config, ("exact",), machines)
    return measure_sums(probe, subject, counts) | ({} if config.layout.several else measure_message(probe, subject))


def _probe(run: Run, model: ModelConfig) -> Probe:
    random = Random(0)
    tokens = [random.randrange(model.vocabulary) for _ in range(MOST)]

    def probe(batch: Batch, program: Program, wire: str, scope: str) -> Sample:
        options = RunOptions(scope, timeline=True)
        result = run(batch, tokens[: batch.tokens], Plan(Strategy(), program, wire), options)
        assert result.timeline is not None
        return Sample(result.seconds, result.processor, result.timeline)

    return probe
