"""Are so many ranks worth it? A prompt and the tokens after it, by numbers of ranks.

What ranks take is predicted from their costs, or measured and kept; fewer of them as well, where they were measured on
this machine, else by what one of them alone would take. Knows engines, costs and files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from random import Random

import msgspec
from platformdirs import user_cache_path

from weft.admission import demand_memory
from weft.calibration import key_of
from weft.config import EngineConfig, ModelConfig, available_cores
from weft.engine import Engine
from weft.errors import NoRoom
from weft.execute.results import RunOptions
from weft.launch.local import LocalLauncher
from weft.layout import Layout
from weft.links import NO_LINK
from weft.plan.derived import derived
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment, one_prompt
from weft.simulate.cost import ComputeCosts, Contention, Costs, Table
from weft.timeline.timeline import median
from weft.units import duration
from weft.workers import Progress

PROMPT, ANSWER = 512, 128  # tokens of the usual request
WORTH = 0.95  # of the time: less than that is not said to be faster


class Yardstick(msgspec.Struct, frozen=True):
    """Seconds of the prompt, and of each token after it; `when` it was measured, or empty."""

    prompt: float
    token: float
    when: str = ""

    @property
    def seconds(self) -> float:
        """Of the usual request."""
        return self.prompt + ANSWER * self.token

    def describe(self) -> str:
        """In words."""
        return f"a prompt of {PROMPT} in {duration(self.prompt)}, then {duration(self.token)} a greedy token"


def measured(engine: Engine) -> Yardstick:
    """By running it, and kept for later starts."""
    random = Random(0)
    length = min(PROMPT, engine.config.max_length - 1)
    ids = [random.randrange(engine.model.vocabulary) for _ in range(length)]

    def seconds(batch: Batch, tokens: list[int], times: int) -> float:
        plan = engine.planner.plan(batch)
        runs = [engine.probe(batch, tokens, plan, RunOptions()) for _ in range(times + 1)]
        return median(run.seconds for run in runs[1:])

    prompt = seconds(one_prompt(length), ids, 3)
    token = seconds(Batch((Segment(0, length, 1),)), ids[:1], 20)  # its past is what the prompts left
    engine.workers.controller.release([0])
    found = Yardstick(prompt, token, str(date.today()))
    _keep(_path(engine.model, engine.config, engine.workers.controller.launcher.link_name), found)
    return found


def _keep(path: Path, found: Yardstick) -> None:
    with suppress(OSError):  # then it is measured once more
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(found))


def recalled(model: ModelConfig, config: EngineConfig, link: str) -> Yardstick | None:
    """What was measured on an earlier start."""
    try:
        return msgspec.json.decode(_path(model, config, link).read_bytes(), type=Yardstick)
    except (OSError, msgspec.MsgspecError):
        return None


def predicted(planner: Planner) -> Yardstick:
    """From the planner's costs; there must be some."""
    prompt, token = (planner.plan(batch).predicted for batch in (one_prompt(PROMPT), Batch((Segment(0, PROMPT, 1),))))
    assert prompt is not None and token is not None, "nothing can be predicted without costs"
    return Yardstick(prompt.seconds, token.seconds)


def alone(planner: Planner) -> Yardstick:
    """One of the ranks with the whole model, as if all that it computes grew with its part of it, which is the most."""
    assert planner.costs is not None, "nothing can be predicted without costs"
    return predicted(_computing(planner, planner.costs.world))


def _computing(planner: Planner, times: float) -> Planner:
    """Of a rank that computes so many times as long, and sends nothing."""
    assert planner.costs is not None, "nothing can be predicted without costs"
    costs = planner.costs
    rank = ComputeCosts.slowest(costs.ranks).scaled(times)
    free = Table((0.0, 1e6), (0.0, 0.0))
    wires = {name: replace(wire, sums={"exchange": free}, hop=free) for name, wire in costs.wires.items()}
    whole = Costs((rank,), wires, Contention(), costs.width, costs.logits, 1)
    return Planner(planner.outline, "serial", planner.wire, planner.granule, whole)


def judged(engine: Engine) -> str | None:
    """One line on the ranks that there are and on fewer; None where nothing is known."""
    config, planner, link = engine.config, engine.planner, engine.workers.controller.launcher.link_name
    if config.ranks == 1 or planner.costs is None:
        return None
    if config.layout.several:
        return _sections_judged(engine)
    known = {ranks: recalled(engine.model, with_ranks(config, ranks), link) for ranks in range(1, config.ranks)}
    own, fewer = predicted(planner), {ranks: each for ranks, each in known.items() if each is not None}
    ranks = min(fewer, key=lambda ranks: fewer[ranks].seconds, default=1)
    line = f"{config.ranks} ranks (predicted): {own.describe()}; "
    if fewer:
        other = fewer[ranks]
        line += f"{ranks} rank{'s' if ranks > 1 else ''} (measured {other.when}): {other.describe()}"
    else:
        other, least = alone(planner), predicted(_computing(planner, 1.0))
        prompts, tokens = (
            f"{duration(a)} to {duration(b)}" for a, b in ((least.prompt, other.prompt), (least.token, other.token))
        )
        line += f"one of them alone: a prompt in {prompts}, then {tokens} a token"
    if other.seconds < WORTH * own.seconds:
        return f"{line}. --tp {ranks} would be faster"
    several = engine.workers.controller.launcher.may_change  # --tp auto is for one machine
    return line if fewer or several else f"{line}; --tp auto measures it"


def _sections_judged(engine: Engine) -> str | None:
    """One line, where the first rank with all layers would be faster for a lone request, and has the memory."""
    config, planner = engine.config, engine.planner
    one = Layout.tensor(engine.model.layers, (1.0,))
    assert planner.costs is not None, "nothing can be judged without costs"
    with suppress(NoRoom):
        demand_memory(engine.model, replace(config, layout=one), engine.workers.started.hellos[:1])
        costs = derived(planner.costs, config.layout, one, planner.outline, {})
        whole = predicted(Planner(planner.outline, "serial", planner.wire, planner.granule, costs))
        own = predicted(planner)
        if whole.seconds < WORTH * own.seconds:
            return (
                f"{len(config.layout.sections)} sections (predicted): {own.describe()}; one rank with all layers: "
                f"{whole.describe()}. --pp 1 would be faster for a request by itself"
            )
    return None


def counts(model: ModelConfig) -> list[int]:
    """Numbers of ranks among which to choose on this machine: powers of two, up to its cores and the model's heads."""
    most = min(available_cores(), model.heads)
    return [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= most]


def best_of(
    path: Path, model: ModelConfig, configs: Sequence[EngineConfig], progress: Progress, again: bool
) -> tuple[EngineConfig, str]:  # fmt: skip
    """The number of ranks with which the usual request takes shortest, and a line on all of them. What was not measured
    on an earlier start, or is to be `again`, is now: each number is started once."""
    found, kept = dict[int, Yardstick](), list[str]()
    for config in configs:
        ranks, link = config.ranks, LocalLauncher().link_name
        known = None if again else recalled(model, config, link)
        if known is None:
            progress(f"trying {ranks} rank{'s' if ranks > 1 else ''}", 0.0)
            with closing(Engine(path, config, model, progress=progress)) as engine:
                known = measured(engine)
        else:
            kept.append(known.when)
        found[ranks] = known
    best = min(configs, key=lambda config: found[config.ranks].seconds)
    told = "; ".join(f"{ranks}: {known.describe()}" for ranks, known in found.items())
    when = f", as measured {' and '.join(dict.fromkeys(kept))} (--recalibrate measures anew)" if kept else ""
    return best, f"--tp auto takes {best.ranks}. By the number of ranks{when}: {told}"


def with_ranks(config: EngineConfig, ranks: int) -> EngineConfig:
    """The same cores for another number of ranks."""
    threads = max(1, config.threads * config.ranks // ranks)
    fewer = replace(config, layout=Layout.tensor(sum(config.layout.layers), (1.0,) * ranks), threads=threads)
    return fewer if ranks > 1 else replace(fewer, link=NO_LINK, transport="auto")  # one rank sends nothing


def _path(model: ModelConfig, config: EngineConfig, link: str) -> Path:
    key = key_of(model, config, link) | {"overlap": config.overlap, "length": str(config.max_length)}
    name = hashlib.sha256(msgspec.json.encode(sorted(key.items()))).hexdigest()[:20]
    return user_cache_path("weft") / "yardsticks" / f"{name}.json"
