"""`weft worker`: a rank on another machine. Knows options and terminals; the work is done in launch/."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from weft.errors import InputError
from weft.formats.fingerprint import agree
from weft.hub import locate
from weft.launch.launcher import MODEL_VARIABLE, TOKEN_VARIABLE
from weft.launch.machine import Machine

HELP = """Be a rank of a server on another machine: weft serve --join-address prints what to run.

Waits for the server, starts a rank when it is told to, starts it again after it was lost, and waits on when the server
ends. MODEL says where this machine has the model; default: where the server has it, and where that is not here, this
machine's part of it is fetched from the server, once. The token is in the environment, because a command line is seen
by everyone.

Examples:

  WEFT_TOKEN=weft-… weft worker --join 10.0.0.1:7000

  WEFT_TOKEN=weft-… weft worker --join 10.0.0.1:7000 ./llama --address eth1
"""


def worker(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    join: Annotated[str, typer.Option(help="HOST:PORT of the server's --join-address.")] = "",
    address: Annotated[
        str | None,
        typer.Option(
            help="This machine's, or a network device, at which others reach it; default: by the way to HOST."
        ),
    ] = None,
    rank_port: Annotated[
        int, typer.Option(min=0, max=65535, show_default=False, help="Its port for other ranks; default: any.")
    ] = 0,
) -> None:
    """See HELP."""
    out = Console(stderr=True)
    if not join:
        raise InputError("--join is missing; weft serve --join-address prints what to run")
    token = os.environ.pop(TOKEN_VARIABLE, "")
    if not token:
        raise InputError(f"{TOKEN_VARIABLE} is not in the environment; weft serve --join-address prints it")
    if model is not None:
        os.environ[MODEL_VARIABLE] = str(_located(model).absolute())

    def told(line: str) -> None:
        out.print(line, style="dim", markup=False, soft_wrap=True)

    machine = Machine(join, token, address, told, partial(agree, given=os.environ.get(MODEL_VARIABLE)), rank_port)
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        machine.serve()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _located(model: str) -> Path:
    try:
        return locate(model)
    except InputError as error:
        raise InputError(f"{error}; or leave MODEL out: then this machine's part comes from the server's") from None


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
