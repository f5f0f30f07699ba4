"""`weft bench`: strategies, wires and links against each other, on the user's own model and machine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from weft.bench.grid import Bench, Grid, Point
from weft.bench.machine import describe
from weft.bench.plot import groups, saving_plot
from weft.bench.report import (
    COLUMNS,
    as_json,
    bounds,
    cells,
    conclusion,
    heading,
    most_to_hide,
    report,
    timelines,
    wires_chosen,
)
from weft.cli.options import STORED, WIRE, layers_or_auto, numbers, relative_shares, words
from weft.config import ModelConfig
from weft.errors import InputError, WorkerFailed
from weft.hub import locate
from weft.launch.namespaces import demand_namespaces
from weft.links import links_of
from weft.model.description import model_config
from weft.timeline.files import demand_form, demand_writable, timelines_as, write
from weft.wires import allowed

WIDE = 160  # columns of the tables: in a narrow terminal lines are better wrapped than cells

HELP = """Measure strategies, wires and links against each other with MODEL, on this machine.

Lists are separated by commas, and every combination is measured, beside serial and both terms of the bound:
computation alone and the same messages alone. Rounds are interleaved; figures are medians of per-round ratios.

A link is none (as fast as this machine is), a speed such as 500mbit or 2.5gbit, or a multiple of the speed at which
communication takes as long as computation: 0.5x, 1x, 2x; with a delay as in 200mbit,5ms, or both directions in one
as in 200mbit,shared. weft's transport keeps to it. shaped:500mbit has the kernel do that instead, between network
namespaces: that needs root and iproute2, and everything is removed at the end.

Examples:

  weft bench

  weft bench ./llama --tokens 512,2048 --link 0.5x,1x,2x --overlap iso:2,iso:2/4,tiles:4,rs --html report.html

  weft bench --tp 1 --pp 2 --link 100mbit --tokens 2048 --overlap pipe:4,pipe:8,auto

  weft bench --link 0.4x --wire exact,int8,auto:int8

  weft bench quality                                what wires do to answers; see its --help

  weft bench ./llama --prompts 4 --tokens 2048 --link 200mbit --overlap requests:2,iso:2 --wire exact,bf16
"""


def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    tokens: Annotated[str, typer.Option(help="Lengths of the batch.")] = "512",
    tp: Annotated[str, typer.Option("--tp", help="Numbers of ranks; of each section, where there are several.")] = "2",
    pp: Annotated[int, typer.Option("--pp", help="Sections of layers: a pipeline.")] = 1,
    layers: Annotated[str | None, typer.Option(help="Layers of each section, as in 20,12; default: even.")] = None,
    link: Annotated[
        str, typer.Option(help="none, speeds such as 500mbit or 200mbit,5ms, multiples of balance such as 1x.")
    ] = "none",
    overlap: Annotated[
        str, typer.Option(help="Strategies; see docs/strategies.md. serial is always measured.")
    ] = "iso:2,iso:3,auto",
    wire: WIRE = "exact",
    prompts: Annotated[int, typer.Option(help="Prompts that the tokens of a batch are divided over.")] = 1,
    mixed: Annotated[bool, typer.Option("--mixed", help="Prompts of random lengths instead of even ones.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds of each point, one more to warm up not counted.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of each rank; default: cores / ranks.")] = None,
    shares: Annotated[str | None, typer.Option(help="Relative sizes of the ranks' parts, as in 2,1.")] = None,
    transport: Annotated[str, typer.Option(help="Between ranks: auto, shm, tcp, tls, gloo.")] = "auto",
    weights: STORED = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots and timelines to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write saving against link speed to this .svg file.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write serial's and the best's timeline to this .json, .svg or .html file.")
    ] = None,
) -> None:
    """See HELP."""
    path = locate(model)
    config = model_config(path)
    grid = Grid(
        tokens=numbers(tokens, "--tokens"), ranks=numbers(tp, "--tp"),
        links=links_of(link), overlaps=words(overlap, "--overlap"),
        wires=words(wire, "--wire"), prompts=prompts, mixed=mixed, rounds=rounds, threads=threads,
        shares=relative_shares(shares), transport=transport, weights=weights, sections=pp,
        layers=_given(layers),
    )  # fmt: skip
    for name in grid.wires:
        allowed(name)
    for option, file in (("--json", json_file), ("--html", html), ("--plot", plot), ("--timeline", timeline)):
        demand_writable(file, option)
    if timeline is not None:
        demand_form(timeline, "--timeline")
    if plot is not None and (plot.suffix != ".svg" or sum(not speed.unlimited for speed in grid.links) < 2):
        raise InputError(f"--plot {plot}: give a name that ends in .svg, and at least two links with a speed")
    grid.demand(config)
    if grid.shaped:
        demand_namespaces()
    machine = describe(config, grid.threads_of(max(grid.ranks) * grid.sections))
    files = _Files(json_file, html, plot, timeline, machine, _about(path, config) | {"weights": weights})
    _measure_and_tell(path, config, grid, files)


def _given(layers: str | None) -> tuple[int, ...] | None:
    """Layers of each section. Raises `InputError` for auto: what is measured here is what was given."""
    found = layers_or_auto(layers)
    if found == "auto":
        raise InputError("--layers auto is for weft generate and serve, which say what they found; give them here")
    return found


def _measure_and_tell(path: Path, config: ModelConfig, grid: Grid, files: _Files) -> None:
    """Whatever ends the measurement, what there is by then is shown and written."""
    console, ended = Console(stderr=True), None
    with _progress(console) as watch, _interruptible():
        measuring = Bench(path, config, grid, watch, files.keep)
        try:
            measuring.run()
        except (KeyboardInterrupt, InputError, WorkerFailed) as error:
            ended = error
    wide = max(Console().width, WIDE)
    _show(Console(width=wide), measuring.points, files.machine)
    files.write(measuring.points, complete=ended is None)
    if isinstance(ended, KeyboardInterrupt):
        console.print(f"interrupted; {len(measuring.points)} points were measured, the last one perhaps in part")
        raise typer.Exit(130)
    if ended is not None:
        raise ended


@dataclass(frozen=True)
class _Files:
    """What the user wants written, and what goes into it."""

    json: Path | None
    html: Path | None
    plot: Path | None
    timeline: Path | None
    machine: dict[str, Any]
    model: dict[str, Any]

    def keep(self, points: Sequence[Point]) -> None:
        """After every point: a crash of the machine then costs one point. A full disk is told of at the end."""
        if self.json is not None:
            with suppress(InputError):
                write(self.json, as_json(self.machine, self.model, points, complete=False))

    def write(self, points: Sequence[Point], complete: bool) -> None:
        """All of them; raises `InputError` for the first that can't be written when the others are."""
        texts: list[tuple[Path, Callable[[], str]]] = []
        if self.json is not None:
            texts.append((self.json, lambda: as_json(self.machine, self.model, points, complete)))
        if self.html is not None:
            texts.append((self.html, lambda: report(self.machine, self.model, points, complete)))
        if self.plot is not None and groups(points):
            group = max(groups(points), key=lambda points: most_to_hide(points).measured[0].saving_bound)
            texts.append((self.plot, lambda: saving_plot(group)))
        if self.timeline is not None and points:
            path, shown = self.timeline, timelines(most_to_hide(points))
            texts.append((path, lambda: timelines_as(path, shown[::-1])))  # .json holds one: the best
        errors = []
        for path, text in texts:
            try:
                write(path, text())
            except InputError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _about(path: Path, config: ModelConfig) -> dict[str, Any]:
    return {
        "name": path.name, "type": config.model_type, "layers": config.layers, "hidden": config.hidden,
        "intermediate": config.intermediate, "heads": config.heads, "kv_heads": config.kv_heads,
        "vocabulary": config.vocabulary,
    }  # fmt: skip


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with what is running and how long is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("")
        yield lambda done, everything, text: bar.update(task, completed=done, total=everything, description=text)


@contextmanager
def _interruptible() -> Iterator[None]:
    """An end asked for by another process is treated like Ctrl-C: namespaces are removed, results kept."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(console: Console, points: Sequence[Point], machine: dict[str, Any]) -> None:
    for point in points:
        table = Table(
            box=SIMPLE_HEAD,
            title=heading(point),
            title_justify="left",
            caption=bounds(point, machine),
            caption_justify="left",
        )
        rows = [cells(measured) for measured in point.measured]
        kept = [number for number in range(len(COLUMNS)) if any(row[number].strip("–") for row in rows)]
        for number in kept:
            table.add_column(COLUMNS[number], justify="left" if number < 2 else "right", no_wrap=True)
        for measured, row in zip(point.measured, rows, strict=True):
            table.add_row(*(row[number] for number in kept), style="bold" if measured is point.best else "")
        console.print(table)
        for line in wires_chosen(point):
            console.print(line, style="dim")
    if points:
        console.print(
            "seconds: medians of rounds; saved, possible: medians of each round's own; efficiency: of both's seconds; "
            "to floor: the same where sending takes processor time; exposed: beyond computation; x exact: times as "
            "fast as serial with all sums exact (docs/measuring.md)",
            style="dim",
        )
        console.print(conclusion(points), style="bold")
        console.print(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}")
