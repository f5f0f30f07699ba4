"""`weft plan`: what to expect of a model on hardware that one doesn't have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from weft.cli.options import KV, STORED, WIRE, numbers, relative_shares, words
from weft.config import ModelConfig
from weft.errors import InputError
from weft.hub import locate_config
from weft.model.description import model_config
from weft.outlook.figures import NOTHING, NoMemory, Outlook, Question, demand_shares, would_fit
from weft.outlook.layouts import Offer, Row, compared, conclusion, offers
from weft.outlook.report import (
    ASSUMING,
    COLUMNS,
    COMPARED,
    OFFERED,
    TEXT,
    as_json,
    beside,
    cells,
    heading,
    listing,
    offered,
    page,
    priced,
    remarks,
)  # fmt: skip
from weft.simulate.hardware import Hardware, catalogue, parse_hardware
from weft.text import leave_torch_out
from weft.timeline.files import demand_writable, write

WIDTH = 116  # columns that tables need
FOLDED = ("plan", "layout", "memory, GiB")  # what is long where something is long
LAYOUT = 28  # columns that layouts have at least

HELP = """Predict what MODEL does on hardware from the catalogue: every way to share it, beside a single device.

The table has the time to the first token with overlap (and what no schedule goes below), the time of one more token,
requests a second where many run at a time, and memory. --details shows every strategy and wire, group by group.

MODEL is a configuration file, a directory with a config.json, a .gguf file, or a hub id; weights are not needed. A
link is a name from the catalogue or a speed such as 10gbit; without --link it is the first device's usual one. Own
devices and links go into a TOML file (docs/predictions.md shows one).

Examples:

  weft plan --list

  weft plan ./llama-70b/config.json --hardware "8x rtx4090" --tokens 1024,8192 --wire exact,int8 --html plan.html

  weft plan ./llama-70b --hardware "1x rtx3090" --hardware "2x rtx3090" --weights int4 --tokens 8k

  weft plan Qwen/Qwen3-8B --hardware "1x ryzen-7950x + 1x i5-8500" --link 2.5gbit --overlap serial,iso:2,auto

  weft plan ./llama-70b --hardware "8x rtx4090" --hardware "4x h100" --price rtx4090=0.35,h100=2.5 --ttft 3
"""


def plan(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    hardware: Annotated[
        list[str] | None, typer.Option(help="A group such as '4x rtx4090'; may be repeated.", show_default=False)
    ] = None,
    link: Annotated[str | None, typer.Option(help="What joins the ranks: a name or a speed.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of the prompt; default: 1024,4096, as far as the context goes.")
    ] = None,
    overlap: Annotated[str, typer.Option(help="Strategies; serial is always there.")] = "iso:2,auto",
    wire: WIRE = "exact",
    prompts: Annotated[int, typer.Option(help="Prompts in one batch, each of so many tokens.")] = 1,
    decoding: Annotated[
        int | None, typer.Option(help="Requests at a time; default: 8, or as many as memory holds.")
    ] = None,
    weights: STORED = "auto",
    kv: KV = "auto",
    shares: Annotated[
        str | None,
        typer.Option(help="Relative sizes of the parts, where layers are shared over all; default: by speed."),
    ] = None,
    price: Annotated[str | None, typer.Option(help="Of a device for an hour, as in rtx4090=0.35,h100=2.5.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Seconds that the first token may take.")] = None,
    own: Annotated[Path | None, typer.Option("--catalogue", help="Your own devices and links, in TOML.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the catalogue with its sources.")] = False,
    details: Annotated[bool, typer.Option("--details", help="Also every strategy and wire, group by group.")] = False,
    json_wanted: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and timelines to this file.")] = None,
) -> None:
    """See HELP."""
    leave_torch_out()
    if show:
        _list(own)
        return
    if not hardware:
        raise InputError("give --hardware, such as --hardware '4x rtx4090'; weft plan --list shows what there is")
    if ttft is not None and not 0 < ttft < float("inf"):
        raise InputError(f"--ttft {ttft:g} is not a time; give seconds above 0")
    demand_writable(html, "--html")
    prices, config = _prices(price), model_config(locate_config(model))
    lengths = numbers(tokens, "--tokens") if tokens is not None else _usual(config)
    strategies, wires, parts = words(overlap, "--overlap"), words(wire, "--wire"), relative_shares(shares)
    question = Question(lengths, strategies, wires, prompts, decoding, parts, weights, kv)
    question.demand(config)
    groups = [parse_hardware(name, link, own) for name in dict.fromkeys(hardware)]
    if parts and all(len(parts) != group.world for group in groups):
        demand_shares(parts, groups[0])
    rows = [row for group in groups for length in question.tokens for row in compared(config, group, question, length)]
    ranked = offers(rows, prices, ttft) if prices else []
    concluded = conclusion(rows, question, ttft)
    outlooks, failed = _outlooks(config, groups, question)
    fits = any(row.rating for row in rows)
    if html is not None and fits:
        write(html, page(config, outlooks, ranked, rows, concluded, ttft))
    if json_wanted:
        print(as_json(config, outlooks, ranked, rows, concluded))
    else:
        _show(rows, concluded, outlooks if details else [], ranked, ttft)
    if not fits:
        raise failed[0] if len(groups) == 1 else InputError(_what_would_fit(config, groups, question, failed))


def _what_would_fit(
    config: ModelConfig, groups: Sequence[Hardware], question: Question, failed: Sequence[InputError]
) -> str:  # fmt: skip
    """One line, where none of several groups does."""
    tokens = min(question.tokens)
    small = [group for group, error in zip(groups, failed, strict=True) if isinstance(error, NoMemory)]
    others = [str(error) for error in failed if not isinstance(error, NoMemory)]
    found = dict.fromkeys(other for group in small for other in would_fit(config, group, question, tokens))
    names = ", ".join(group.text for group in small)
    line = f"none of {names} holds this model with {tokens} tokens; what would fit: {'; '.join(found) or NOTHING}"
    return "; ".join([*([line] if small else []), *others])


def _outlooks(
    config: ModelConfig, groups: Sequence[Hardware], question: Question
) -> tuple[list[Outlook], list[InputError]]:  # fmt: skip
    """Of the groups that hold the model divided over all of them, and what is wrong with the others."""
    found, failed = list[Outlook](), list[InputError]()
    for group in groups:
        try:
            found.append(Outlook(config, group, question))
        except InputError as error:
            failed.append(error)
    return found, failed


def _usual(config: ModelConfig) -> tuple[int, ...]:
    """Lengths that are looked at unless others are asked for."""
    return tuple(sorted({min(tokens, config.max_length) for tokens in (1024, 4096)}))


def _prices(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        pairs = [part.split("=") for part in words(text, "--price")]
        prices = {name: float(value) for name, value in pairs}
    except ValueError:
        raise InputError(f"--price {text!r} is not a list of prices; write it like rtx4090=0.35,h100=2.5") from None
    if not all(0 < value < float("inf") for value in prices.values()):
        raise InputError(f"--price {text!r}: every price must be above 0")
    return prices


def _show(
    rows: Sequence[Row], concluded: str, outlooks: Sequence[Outlook], ranked: Sequence[Offer], ttft: float | None
) -> None:  # fmt: skip
    console, text = _wide(), Console()
    timed = None if ttft is not None else -1
    console.print(_table("layouts beside each other", COMPARED[:timed], [r[:timed] for r in beside(rows, ttft)]))
    text.print(concluded)
    for outlook in outlooks:
        console.print(_table(heading(outlook), COLUMNS, [cells(forecast) for forecast in outlook.forecasts]))
        for remark in remarks(outlook):
            text.print(remark)
    if ranked:
        told = [offered(offer)[:timed] for offer in ranked]
        console.print(_table(priced(rows), OFFERED[:timed], told))
    text.print(ASSUMING, style="dim")


def _wide() -> Console:
    """Where a table's columns keep their words."""
    return Console(width=max(Console().width, WIDTH))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in TEXT else "right"
        least = LAYOUT if column == "layout" else None
        table.add_column(column, justify=justify, no_wrap=column not in FOLDED, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*row, style="bold" if not any(row[1:]) else "")
    return table


def _list(own: Path | None) -> None:
    table = Table(box=SIMPLE_HEAD)
    for column in ("name", "what", "figures", "source"):
        table.add_column(column, no_wrap=column == "name")
    for row in listing(catalogue(own)):
        table.add_row(*row)
    _wide().print(table)
