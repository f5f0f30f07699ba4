"""`weft`: the commands, and how errors leave them.

What the user can change ends with one line and code 2, a failure with one line and code 1, Ctrl-C with 130.
Knows options and terminals; all work is done in the other rooms.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed
from io import TextIOWrapper
from typing import Annotated

import typer

from weft.cli import bench, chat, doctor, generate, plan, quality, serve, timeline, worker
from weft.cli.options import demand_known, demand_text
from weft.errors import InputError, RequestFailed, WorkerFailed

app = typer.Typer(
    name="weft", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="LLM inference over slow links: tensor parallelism that hides its communication.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command("generate", help=generate.HELP)(generate.generate)
app.command("chat", help=chat.HELP)(chat.chat)
app.command("serve", help=serve.HELP)(serve.serve_command)
app.command("worker", help=worker.HELP)(worker.worker)
app.command("bench", help=bench.HELP)(bench.bench)
app.command("bench quality", help=quality.HELP)(quality.quality)
app.command("plan", help=plan.HELP)(plan.plan)
app.command("timeline", help=timeline.HELP)(timeline.timeline)
app.command("doctor", help=doctor.HELP)(doctor.doctor)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"weft {installed('weft')}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Say which weft this is, and end.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `weft` command."""
    # Progress bars and hints of the libraries beneath would be mixed into weft's own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A locale that knows ASCII only is no reason to end, and UTF-8 is what everything else here reads.
            stream.reconfigure(encoding="utf-8" if stream.encoding == "ascii" else None, errors="backslashreplace")
    if sys.argv[1:3] == ["bench", "quality"]:  # goes before a model of that name, which is ./quality
        sys.argv[1:3] = ["bench quality"]
    try:
        demand_text(sys.argv[1:], os.environ)
        demand_known(sys.argv[1:], _options(sys.argv[1:2]))
        app()
    except InputError as error:
        _end(f"weft: {error}", 2)
    except (WorkerFailed, RequestFailed) as error:
        _end(f"weft: {error}", 1)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _options(command: list[str]) -> dict[str, bool]:
    """The options of a command, and whether a value follows each."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    options = commands[command[0]].params if command and command[0] in commands else []
    return {name: not getattr(option, "is_flag", True) for option in options for name in option.opts}


def _end(line: str, code: int) -> None:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
