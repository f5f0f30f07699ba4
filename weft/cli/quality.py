"""`weft bench quality`: what wires and formats of few bits do to the answers of the user's own model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from weft.cli.options import words
from weft.cli.terminal import bar
from weft.config import KEPT, WEIGHTS, positive
from weft.errors import InputError
from weft.hub import locate
from weft.quality import ENOUGH, Assessment, Quality
from weft.timeline.files import demand_writable, write
from weft.wires import WIRES

HELP = """Measure what wires and formats of few bits do to the answers of MODEL, on a text.

The same windows of the text run exact and otherwise, and each position is compared: perplexity, the Kullback-Leibler
divergence of the distributions of the next token, and how often the likeliest token is the same. Exact are sums, and
weights, keys and values in float32. What was found is kept: --wire auto:bf16, auto:int8 and auto:int4 leave out a wire
that exceeds its limit.

Examples:

  weft bench quality

  weft bench quality ./llama --weights int8,int4 --kv int8

  weft bench quality ./llama --tokens 32768 --wire int8,int4 --tp 2 --json quality.json

  weft bench quality Qwen/Qwen3-0.6B --text my-text.txt
"""


def quality(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    wire: Annotated[
        str | None, typer.Option(help="Wires: bf16, int8, int4; all of them where no formats are asked for.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Formats of weights: bfloat16, int8, int4.")] = None,
    kv: Annotated[str | None, typer.Option(help="Formats of keys and values: int8.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 16384,
    text: Annotated[Path | None, typer.Option(help="Another text, UTF-8.", show_default=False)] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", help="Number of ranks; for wires 2 or more.", show_default="2, or 1")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each rank; default: cores / ranks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """See HELP."""
    from weft.bench.quality import TEXT, measure  # torch, which no other command waits for

    wires = words(wire or "bf16,int8,int4", "--wire") if wire or not (weights or kv) else []
    formats = [words(given, name) if given else [] for given, name in ((weights, "--weights"), (kv, "--kv"))]
    _demand(wires, "--wire", "wire", WIRES)
    _demand(formats[0], "--weights", "format of weights", WEIGHTS[1:])
    _demand(formats[1], "--kv", "format of keys and values", KEPT[1:])
    positive(tokens, "--tokens")
    ranks = tp if tp is not None else 2 if wires else 1
    positive(ranks, "--tp")
    if wires and ranks < 2:
        raise InputError(f"--tp {tp}: one rank sends nothing; give 2 or more, or --weights or --kv alone")
    if json_file is not None:
        demand_writable(json_file, "--json")
    path = locate(model)
    with bar(Console(stderr=True)) as progress:
        task = progress.add_task("scoring the text", total=1.0)
        given = path, wires, ranks, tokens, text or TEXT, threads
        measured = measure(*given, lambda share: progress.update(task, completed=share), *formats)
    _show(measured)
    if wires and measured.tokens < ENOUGH:
        Console(stderr=True).print(f"not kept for auto: so few tokens say little; give --tokens {ENOUGH} or more")
    elif wires:
        line = f"kept: --wire auto:… on {measured.ranks} ranks leaves out what exceeds its limit"
        Console(stderr=True).print(line)
    if json_file is not None:
        write(json_file, msgspec.json.format(msgspec.json.encode(measured), indent=1).decode() + "\n")


def _demand(given: Sequence[str], option: str, what: str, allowed: Sequence[str]) -> None:
    for each in given:
        if each not in allowed:
            raise InputError(f"{option} {each!r} is not a {what}; allowed: {', '.join(allowed)}")


def _show(measured: Assessment) -> None:
    title = f"{measured.text}, {measured.tokens} tokens, {measured.ranks} rank{'s' if measured.ranks > 1 else ''}"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    names = ("", "bytes", "perplexity", "above exact", "±", "limit", "divergence", "99%", "same token", " ")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for each in measured.wires:
        table.add_row(*_cells(each), style="red" if each.exceeds else "")
    console = Console(width=max(Console().width, 110))
    console.print(table)
    console.print(
        "bytes: of a number; ±: standard error, over windows; divergence: Kullback-Leibler from exact, nats a token, "
        "in the mean and at the 99th percentile",
        style="dim",
    )


def _cells(each: Quality) -> tuple[str, ...]:
    first = each.wire, f"{each.bytes:.3f}", f"{each.perplexity:.3f}"
    if each.limit is None:
        return (*first, "", "", "", "", "", "", "")
    return (
        *first, f"{each.above:+.3%}", f"{each.unsure:.3%}", f"{each.limit:.1%}", f"{each.divergence:.5f}",
        f"{each.divergence_99:.4f}", f"{each.agreement:.2%}", "too much" if each.exceeds else "ok",
    )  # fmt: skip
