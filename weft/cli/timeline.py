"""`weft timeline`: a saved timeline, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weft.timeline.files import demand_form, demand_writable, read_timeline, timelines_as, write
from weft.timeline.terminal import terminal

HELP = """Draw saved timelines: in the terminal, or as a picture in a file.

FILES come from weft generate or weft bench (--timeline FILE.json). Several are drawn on one scale, such as serial
beside overlapped, or measured beside predicted. The same .json opens in Perfetto and chrome://tracing.

Examples:

  weft generate "def main(" --tp 2 --overlap iso:2 --timeline t.json

  weft timeline t.json

  weft timeline serial.json iso.json --out both.html
"""


def timeline(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Write a picture to this .svg or .html file instead.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of the drawing; default: the terminal's.", min=20)] = None,
) -> None:
    """See HELP."""
    timelines = [read_timeline(path) for path in files]
    if out is not None:
        demand_form(out, "--out", (".svg", ".html"))
        demand_writable(out, "--out")
        write(out, timelines_as(out, timelines))
        return
    console = Console(width=width)
    for each in timelines:
        console.print(terminal(each, console.width - 18))
