"""From what a user chose to a running engine: finds the model, resolves the options, starts the workers.

Knows options and checkpoints; knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from weft.admission import settled
from weft.batching.params import SamplingParams
from weft.config import EngineConfig, one_of
from weft.engine import Engine
from weft.errors import InputError
from weft.hub import locate
from weft.launch.launcher import Launcher
from weft.launch.namespaces import NamespaceLauncher
from weft.links import NO_LINK, Link
from weft.model.description import generation_defaults
from weft.model.description import model_config as described
from weft.plan.layouts import LATENCY, Aim
from weft.program.strategy import AUTO, Strategy, canonical
from weft.quality import within_limits
from weft.workers import Progress
from weft.yardstick import best_of, counts, judged

GIVEN = "given"  # the layout that --tp and --pp say


def open_engine(
    model: str | Path | None = None, *, ranks: int | Literal["auto"] = 1, sections: int = 1,
    layers: Sequence[int] | Literal["auto"] | None = None, layout: str = GIVEN, optimise: str = LATENCY,
    overlap: str = AUTO, wire: str = "exact",
    transport: str = "auto", link: str | Link = NO_LINK, shares: Sequence[float] | Literal["auto"] | None = None,
    reproducible: bool = False, threads: int | None = None, dtype: str = "float32", weights: str = "auto",
    kv: str = "auto", max_length: int | None = None,
    max_sequences: int = 16, max_batch_tokens: int = 8192, cores: Sequence[int] | None = None, prefixes: bool = True,
    token_interval: float | None = None, launcher: Launcher | None = None, progress: Progress | None = None,
    recalibrate: bool = False, check_content: bool = False, plain_data: bool = False,
    replicas: int = 1, replica: int = 0, may_part: bool = False,
) -> Engine:  # fmt: skip
    """The engine of a directory, a .gguf file, a hub id, or the model in the package; options as `LLM` has them.
    `may_part`: where replicas would be better than any layout, `engine.workers.decision` says which.

    Raises `InputError` for whatever the caller can change.
    """
    one_of(layout, "--layout", (GIVEN, AUTO))
    aim = replace(Aim.parse(optimise), replicas=may_part) if layout == AUTO else None
    unused = _unused(aim, optimise, canonical(overlap), 1 if ranks == "auto" else ranks, sections)
    link = Link.parse(link) if isinstance(link, str) else link
    _demand_launcher(launcher, link, transport, plain_data)
    if ranks == "auto":
        _demand_countable(
            sections != 1 or layers is not None or aim is not None or replicas != 1,
            link.shaped or launcher is not None or shares is not None or threads is not None,
        )
    if aim is not None and (layers is not None or shares is not None):
        raise InputError("--layout auto finds layers and shares itself; leave out --layers and --shares")
    if aim is not None and canonical(overlap) != AUTO and Strategy.parse(overlap).scattered:
        raise InputError("--layout auto may be a pipeline, where sums can't be scattered; leave out --overlap rs")
    if link.shaped and launcher is None:
        launcher = NamespaceLauncher()
    path = locate(model)
    model_config = described(path)
    wire, left_out = within_limits(path, wire, ranks if isinstance(ranks, int) else 2, dtype)
    resolve = partial(
        EngineConfig.resolve, model_config, overlap=overlap, wire=wire, transport=transport, link=link,
        plain_data=plain_data, check_content=check_content, reproducible=reproducible, dtype=dtype,
        weights=weights, kv=kv, max_length=max_length, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens,
        cores=tuple(cores) if cores else None,
        prefixes=max_sequences if prefixes else 0, token_interval=token_interval, replicas=replicas, replica=replica,
        here=launcher.here if launcher is not None else lambda ranks: ranks,
    )  # fmt: skip
    line = None
    if ranks == "auto":
        configs = [settled(path, model_config, resolve(ranks=count)) for count in counts(model_config)]
        config, line = best_of(path, model_config, configs, progress or (lambda what, share: None), recalibrate)
    else:
        given = tuple(shares) if shares and not isinstance(shares, str) else None
        counted = tuple(layers) if layers is not None and not isinstance(layers, str) else None
        if aim is not None and sections == 1 and 1 < ranks <= model_config.layers:  # whole layers tell of parts of them
            ranks, sections = 1, ranks
        config = resolve(ranks=ranks, sections=sections, layers=counted, shares=given, threads=threads)
    by_speed = AUTO in (shares, layers)
    engine = Engine(path, config, model_config, launcher, progress, recalibrate, by_speed, aim)
    notices = line or judged(engine), _secured(launcher, plain_data), *left_out, *unused, *_proposed(path)[1]
    engine.notices += [notice for notice in notices if notice]
    return engine


def _unused(aim: Aim | None, optimise: str, overlap: str, ranks: int, sections: int) -> list[str]:
    """A line on each wish that makes no difference here."""
    lines = []
    if aim is not None and ranks * sections == 1:
        lines.append("--layout auto: not used, as one rank has all of the model")
    if aim is None and optimise != LATENCY:
        lines.append(f"--optimise {optimise}: not used without --layout auto")
    if aim is None and sections == 1 and overlap != AUTO and Strategy.parse(overlap).piped:
        lines.append(f"--overlap {overlap}: pieces hide nothing in one section of layers; give --pp, or iso")
    if aim is None and sections > 1 and ranks == 1 and overlap != AUTO:
        strategy = Strategy.parse(overlap)
        if strategy != Strategy() and not strategy.piped:
            lines.append(f"--overlap {overlap}: sections of one rank have no sums to hide; give pipe:8, say")
    return lines


def _demand_countable(divided: bool, unlike: bool) -> None:
    """Raises `InputError` for what doesn't go with a number of ranks that is to be found."""
    if divided:
        raise InputError(
            "--tp auto finds a number of ranks for all layers; give one with --pp, --layers, --layout and --replicas"
        )
    if unlike:
        raise InputError(
            "--tp auto takes this machine's cores as they are: no shaped link, shares, threads or machines"
        )


def _demand_launcher(launcher: Launcher | None, link: Link, transport: str, plain_data: bool) -> None:
    """Raises `InputError` for what doesn't go with where ranks are started."""
    if launcher is None:
        return
    if not link.free and not launcher.one_clock:
        raise InputError(f"--link {link} is for ranks of this machine; leave it out where other machines join")
    if not link.free and link.shaped != isinstance(launcher, NamespaceLauncher):
        raise InputError(f"--link {link} is not for this launcher, which has its own; leave it out")
    if transport == "gloo" and launcher.leaves_machine and not plain_data:
        raise InputError(
            "--transport gloo can't encrypt what leaves this machine; leave it out, or give --plain-data too"
        )


def _secured(launcher: Launcher | None, plain_data: bool) -> str | None:
    """A line on what others could read."""
    if launcher is None or not launcher.leaves_machine:
        return None
    return (
        f"what ranks send each other is {'not encrypted, as --plain-data says' if plain_data else 'encrypted: TLS 1.3'}"
    )


def default_params(path: Path, **changes: Any) -> SamplingParams:
    """What a checkpoint's `generation_config.json` proposes, with these changes."""
    usable, _ = _proposed(path)
    return SamplingParams(**{**usable, **changes})


def _proposed(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's proposals, and a line for each that can't be used."""
    proposed, _ = generation_defaults(path)  # what is wrong with the file, the engine says
    usable: dict[str, Any] = {}
    lines = []
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if (value := proposed.get(name)) is None:
            continue
        try:
            usable[name] = getattr(SamplingParams(**{name: value}), name)
        except InputError as error:
            lines.append(f"generation_config.json: {error}; left out")
    if proposed.get("do_sample") is False:
        usable["temperature"] = 0.0
    return usable, lines
