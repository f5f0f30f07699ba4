"""Values of options that several commands share, from text. Knows text; knows nothing of what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import typer

from weft.config import DTYPES, KEPT, WEIGHTS, one_of
from weft.errors import InputError
from weft.plan.layouts import Aim

TP = Annotated[
    str,
    typer.Option(
        "--tp", "--tensor-parallel-size", metavar="N",
        help="Ranks that the model is split over; auto: as many as are fastest here, tried at the first start.",
    ),
]  # fmt: skip

PP = Annotated[
    int,
    typer.Option(
        "--pp", "--pipeline-parallel-size", metavar="N",
        help="Sections of layers that ranks of their own have, --tp ranks each: a pipeline.",
    ),
]  # fmt: skip
LAYERS = Annotated[str | None, typer.Option(help="Layers of each section, as in 20,12; auto: by speed and memory.")]

LAYOUT = Annotated[
    str | None,
    typer.Option(
        help="auto: the best way to share the model over as many ranks as --tp x --pp; given: that one; default: auto "
        "where other machines join, else given.", show_default=False,
    ),
]  # fmt: skip


def _known(option: str, values: tuple[str, ...]) -> Callable[[str], str]:
    """Refuses others before anything is looked at."""

    def check(given: str) -> str:
        one_of(given, option, values)
        return given

    return check


def _aim(given: str) -> str:
    """Refuses what is none before anything is looked at."""
    Aim.parse(given)
    return given


OPTIMISE = Annotated[
    str,
    typer.Option(callback=_aim, help="What --layout auto is for: latency or throughput; of what: latency:2048,64."),
]
DTYPE = Annotated[
    str,
    typer.Option(
        callback=_known("--dtype", DTYPES),
        help="What is computed in: float32, or bfloat16, which takes half the memory and on many processors longer.",
    ),
]
STORED = Annotated[
    str,
    typer.Option(
        "--weights", callback=_known("--weights", WEIGHTS),
        help="What weights are kept in: float32, bfloat16, int8, int4; auto: what the checkpoint has in few bits in no "
        "fewer, the rest as what is computed in.",
    ),
]  # fmt: skip
KV = Annotated[
    str,
    typer.Option(
        "--kv", "--kv-cache-dtype", callback=_known("--kv", KEPT),
        help="What keys and values are kept in: int8 takes a quarter of the memory; auto: what is computed in.",
    ),
]  # fmt: skip
OVERLAP = Annotated[
    str, typer.Option(help="auto, serial, iso:2, iso:2/4, iso@300,700, tiles:4, …; see docs/strategies.md.")
]
WIRE = Annotated[
    str, typer.Option(help="How partials travel: exact, bf16, int8, int4; auto:int8 and so on: int8 at the least.")
]
TRANSPORT = Annotated[
    str, typer.Option(help="Between ranks: shm, tcp, tls, gloo; auto: shared memory on one machine, TLS to others.")
]
LINK = Annotated[
    str, typer.Option(help="That ranks' messages seem to travel: 200mbit,5ms or 1x (of balance); shaped:200mbit.")
]
SHARES = Annotated[str | None, typer.Option(help="Sizes of the ranks' parts, as in 2,1; auto: by speed.")]
REPRODUCIBLE = Annotated[
    bool, typer.Option("--reproducible", help="The same bits whatever the strategy and the rest of the batch.")
]
RECALIBRATE = Annotated[
    bool, typer.Option("--recalibrate", help="Measure again what steps cost, instead of what is kept of it.")
]
THREADS = Annotated[int | None, typer.Option(help="Threads of each rank; default: cores / ranks.")]
MODEL = Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)]
# What users of other engines type, and weft has by another name, or not: what to do instead.
ELSEWHERE = {
    "--model": "give MODEL without an option",
    "--gpu-memory-utilization": "weft takes of each machine what is free there; leave it out",
    "--data-parallel-size": "give --replicas to weft serve",
    "--replicas": "they are for weft serve; leave it out",
    "--enable-prefix-caching": "that is on unless --no-prefix-caching; leave it out",
    "--no-enable-prefix-caching": "give --no-prefix-caching",
    "--enable-chunked-prefill": "prompts are always computed in pieces; leave it out",
    "--max-seq-len": "give --max-model-len",
    "--ctx-size": "give --max-model-len",
    "--allowed-origins": "give --allow-origin, once for each",
    "--quantization": "weft sees how a checkpoint is quantised; leave it out",
    "--trust-remote-code": "weft never runs a checkpoint's code; leave it out",
    "--enforce-eager": "there is nothing else here; leave it out",
    "-tp": "give --tp",
    "--swap-space": "weft has none: what memory doesn't hold waits; leave it out",
    "--load-format": "weft sees what a checkpoint is; leave it out",
    "--chat-template": "the checkpoint's own is used; put another one into its chat_template.jinja",
    "--seed": "requests have a seed each; leave it out",
    "--download-dir": "set HF_HOME in the environment",
    "--revision": "weft takes what the hub gives by default; download another one and give its directory",
    "--block-size": "memory is not kept in blocks; leave it out",
    "--distributed-executor-backend": "ranks are processes of weft's own; see --join-address for other machines",
    "--enable-auto-tool-choice": "models that know tools are served with them; leave it out",
    "--tool-call-parser": "weft sees by the template how a model calls tools; leave it out",
    "--ssl-keyfile": "weft speaks plain HTTP; put a proxy before it that speaks TLS",
    "--ssl-certfile": "weft speaks plain HTTP; put a proxy before it that speaks TLS",
    "--uvicorn-log-level": "requests are logged with --log-requests alone; leave it out",
    "--root-path": "weft answers at /; leave it out",
    "--device": "weft computes on CPUs; leave it out",
    "--disable-log-requests": "requests are logged with --log-requests alone; leave it out",
    "--tokenizer": "the checkpoint's own is used; leave it out",
    "--n-gpu-layers": "weft computes on CPUs; leave it out",
    "--max-new-tokens": "give --max-tokens",
    "--num-threads": "give --threads",
}


def demand_text(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises `InputError` for bytes that are no text: no tokenizer, header or message could take them."""
    texts = [("the argument", text) for text in arguments]
    texts += [(name, text) for name, text in environment.items() if name.startswith("WEFT_")]
    for name, text in texts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{name} {text[:100]!r} is not UTF-8; write it so, and rename a file that isn't")


def demand_known(arguments: Sequence[str], options: Mapping[str, bool]) -> None:
    """Raises `InputError` that leads from another engine's option to weft's. `options`: of the command, and whether a
    value follows each."""
    for before, argument in pairwise(["", *arguments[: arguments.index("--") if "--" in arguments else None]]):
        name = argument.partition("=")[0].replace("_", "-")
        if name in ELSEWHERE and name not in options and not options.get(before):
            raise InputError(f"{name} is not an option here: {ELSEWHERE[name]}")


def words(text: str, name: str) -> tuple[str, ...]:
    """A list separated by commas, each entry once. Raises `InputError` if it is empty or has a hole.

    What follows an @ sign, as in iso@300,700, stays together: the entry goes on while numbers follow.
    """
    parts: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if parts and "@" in parts[-1] and part[:1].isdigit():
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    if not all(parts):
        raise InputError(f"{name} {text!r} has an empty entry; separate entries by single commas")
    return tuple(dict.fromkeys(parts))


def numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers separated by commas; 8k is 8192. Raises `InputError`."""
    listed = words(text, name)
    try:
        return tuple(int(word[:-1]) * 1024 if word[-1] in "kK" else int(word) for word in listed)
    except ValueError:
        raise InputError(f"{name} {text!r} is not a list of whole numbers; write it like 512,2048 or 8k") from None


def ranks_or_auto(text: str) -> int | Literal["auto"]:
    """A number of ranks. Raises `InputError`."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.removeprefix("-").isdigit()) or len(text) > 9:
        raise InputError(f"--tp {text!r} is not a number of ranks; give a whole number from 1, or auto")
    return int(text)


def layers_or_auto(text: str | None) -> tuple[int, ...] | Literal["auto"] | None:
    """Layers of each section, or "auto". Raises `InputError`."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise InputError(f"--layers {text!r} is not a list of whole numbers; give one a section, as in 20,12, or auto")
    return tuple(map(int, parts))


def relative_shares(text: str | None) -> tuple[float, ...] | None:
    """Relative sizes of the ranks' parts. Raises `InputError`."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--shares {text!r} is not a list of numbers; give one a rank, as in 2,1") from None


def shares_or_auto(text: str | None) -> tuple[float, ...] | Literal["auto"] | None:
    """The same, or "auto": by the ranks' measured speed. Raises `InputError`."""
    return "auto" if text == "auto" else relative_shares(text)
