"""`weft serve`: the OpenAI API over HTTP. Knows options and terminals; the work is done in server/."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress as Bar

from weft.cli.options import (
    DTYPE,
    KV,
    LAYERS,
    LAYOUT,
    LINK,
    MODEL,
    OPTIMISE,
    OVERLAP,
    PP,
    RECALIBRATE,
    REPRODUCIBLE,
    SHARES,
    STORED,
    THREADS,
    TP,
    TRANSPORT,
    WIRE,
    layers_or_auto,
    ranks_or_auto,
    shares_or_auto,
)
from weft.cli.sites import Site, Sites, joining
from weft.cli.terminal import bar, warn_of_shared_cores
from weft.config import EngineConfig, ModelConfig
from weft.engine import Engine
from weft.errors import InputError
from weft.launch.addresses import is_loopback, resolved
from weft.opening import GIVEN, open_engine
from weft.program.strategy import AUTO, canonical
from weft.text import leave_torch_out
from weft.units import counted
from weft.workers import Progress

if TYPE_CHECKING:
    from weft.server.client import EngineClient

HELP = """Serve MODEL behind the OpenAI API, with a page at /.

MODEL is a directory in Hugging Face format, a .gguf file or a hub id (owner/repo:Q4_K_M); without it, the small model
in the package. Requests are batched continuously; what a prompt shares with an earlier one is not computed again; a
rank that is lost is started again and no request with it. Ctrl-C or SIGTERM lets requests under way end; a second one
doesn't.

Examples:

  weft serve

  weft serve Qwen/Qwen3-0.6B --tp 2 --port 9000

  WEFT_API_KEY=secret weft serve ./llama --tp 2 --host 0.0.0.0

  weft serve ./llama --tp 2 --join-address 10.0.0.1:7000     # prints what to run on the other machine

  weft serve --replicas 2                                    # two engines, each with half of the cores

Then:  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def main("}'
"""

PACKAGED_NAME = "weft-packaged"


KEYS = Annotated[
    list[str] | None,
    typer.Option(
        help="Who may ask; may be repeated, and turns are fair between keys. Better in the environment.",
        envvar="WEFT_API_KEY", show_envvar=True, show_default=False,
    ),
]  # fmt: skip
ANYONE = Annotated[
    bool, typer.Option("--allow-anyone", help="Beyond loopback without a key: everyone who reaches the port.")
]
ORIGINS = Annotated[
    list[str] | None,
    typer.Option(
        help="Of a web page that may ask from a browser, as in https://chat.example; may be repeated; * is any.",
        show_default=False,
    ),
]
LENGTH = Annotated[int | None, typer.Option(help="Tokens of prompt and answer; default: the model's.")]
SEQUENCES = Annotated[int, typer.Option(help="Completions that run at once, in each replica.")]
BATCH = Annotated[int, typer.Option(help="Tokens of a batch at most.")]
WAITING = Annotated[int, typer.Option(help="Completions that wait for a slot; more get 429.")]
INTERVAL = Annotated[float, typer.Option(help="Seconds between tokens that prompts should leave to answers under way.")]
CACHING = Annotated[bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse what prompts share.")]
ISOLATED = Annotated[
    bool,
    typer.Option("--isolate-prefixes", help="Within a key alone: how fast an answer begins tells what others said."),
]
LOGGED = Annotated[
    bool, typer.Option("--log-requests", help="A line of JSON for each, to standard output: no text, no keys.")
]
LOG_TEXT = Annotated[bool, typer.Option("--log-text", help="With --log-requests: bodies too, 10,000 characters each.")]
PATIENCE = Annotated[
    float, typer.Option(help="Seconds a client has to send a request, and to take each piece of an answer.")
]
PORTS = Annotated[
    int,
    typer.Option(
        min=0, max=65000, show_default=False,
        help="With --join-address: first of the ports that ranks use here, one for each and one more for each replica "
        "that others join; default: any that are free.",
    ),
]  # fmt: skip
CONTENT = Annotated[
    bool, typer.Option("--check-content", help="With --join-address: compare weights whole, not by their headers.")
]
PLAIN = Annotated[
    bool, typer.Option("--plain-data", help="With --join-address: don't encrypt what ranks send each other.")
]
LOCAL = Annotated[int, typer.Option(help="With --join-address: ranks on this machine.")]
REPLICAS = Annotated[
    int | None,
    typer.Option(
        min=1, show_default=False,
        help="Engines of --tp x --pp ranks each: a request goes to the one with most of its prompt, unless that is too "
        "busy. Default: 1, or what --layout auto finds.",
    ),
]  # fmt: skip
JOINED = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT at which ranks on other machines join (weft worker). Their token is new at each start, or "
        "follows from a secret in WEFT_TOKEN here."
    ),
]


def serve_command(
    model: MODEL = None,
    tp: TP = "1", pp: PP = 1, layers: LAYERS = None, layout: LAYOUT = None, optimise: OPTIMISE = "latency",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback wants --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    api_key: KEYS = None, allow_anyone: ANYONE = False, allow_origin: ORIGINS = None, replicas: REPLICAS = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    overlap: OVERLAP = "auto", wire: WIRE = "exact", transport: TRANSPORT = "auto", link: LINK = "none",
    dtype: DTYPE = "float32", weights: STORED = "auto", kv: KV = "auto", shares: SHARES = None,
    reproducible: REPRODUCIBLE = False, recalibrate: RECALIBRATE = False, threads: THREADS = None,
    max_model_len: LENGTH = None, max_num_seqs: SEQUENCES = 16, max_num_batched_tokens: BATCH = 8192,
    max_waiting: WAITING = 256, token_interval: INTERVAL = 0.2, prefix_caching: CACHING = True,
    isolate_prefixes: ISOLATED = False, log_requests: LOGGED = False, log_text: LOG_TEXT = False,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take.")] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request; more get 413.")] = 4 << 20,
    client_timeout: PATIENCE = 30.0,
    drain: Annotated[float, typer.Option(help="Seconds that requests under way have when the server ends.")] = 30.0,
    join_address: JOINED = None, local_ranks: LOCAL = 1, rank_ports: PORTS = 0, check_content: CONTENT = False,
    plain_data: PLAIN = False,
) -> None:  # fmt: skip
    """See HELP."""
    leave_torch_out()
    from weft.server.app import Settings, application
    from weft.server.run import bound, serve

    host, out, name = host.strip("[]"), Console(stderr=True), served_model_name or _name(model)
    keys, origins, ranks = _keys(api_key, isolate_prefixes), _origins(allow_origin), ranks_or_auto(tp)
    _demand_guarded(host, bool(keys) or allow_anyone)
    world = ranks if ranks == "auto" else ranks * pp
    with (
        bound(host, port) as listening, bar(out) as showing,
        joining(join_address, world, replicas or 1, local_ranks, rank_ports, check_content or plain_data) as hub,
    ):  # fmt: skip
        if layout is None:  # it is thought of already by who writes these
            layout = GIVEN if hub is None or world == 1 or pp != 1 or layers or shares or overlap != AUTO else AUTO
        sites = Sites(hub, world, replicas or 1, local_ranks, rank_ports)
        warn_of_shared_cores(out, world if ranks == "auto" else sum(site.local for site in sites.all))

        def opened(site: Site, tell: Progress, may_part: bool = False, **found: Any) -> Engine:
            split = {"ranks": ranks, "sections": pp, "layers": layers_or_auto(layers), "layout": layout}
            return open_engine(
                model, **split | {"weights": weights, "optimise": optimise} | found, kv=kv, dtype=dtype, link=link,
                may_part=may_part and replicas is None, overlap=overlap, wire=wire, transport=transport,
                shares=shares_or_auto(shares), reproducible=reproducible, threads=threads, recalibrate=recalibrate,
                max_length=max_model_len, max_sequences=max_num_seqs, max_batch_tokens=max_num_batched_tokens,
                prefixes=prefix_caching, token_interval=token_interval, check_content=check_content,
                plain_data=plain_data, progress=_both(tell, showing, site), **sites.place(site),
            )  # fmt: skip

        sites.opened = opened
        fitting = partial(_demand_fitting, ranks, pp, layers, shares, overlap, wire, max_model_len)
        sites.invited = partial(sites.invite, out, model, fitting)
        service = _client(sites, max_waiting, out, name, layout == AUTO and replicas is None)
        settings = Settings(
            name, keys, is_loopback(host), max_body_bytes, client_timeout, request_timeout, origins, isolate_prefixes,
            _log(log_requests, log_text), log_text,
        )  # fmt: skip
        ready = partial(_welcome, out, showing, service, name, host, listening)
        serve(application(service, settings), service, listening, drain, ready)


def _demand_fitting(
    ranks: int | Literal["auto"], sections: int, layers: str | None, shares: str | None, overlap: str, wire: str,
    length: int | None, model: ModelConfig,
) -> None:  # fmt: skip
    """Raises `InputError` for options that don't go with the model."""
    canonical(overlap)
    counts, parts = layers_or_auto(layers), shares_or_auto(shares)
    EngineConfig.resolve(
        model, ranks=1 if ranks == "auto" else ranks, sections=sections, overlap=overlap, wire=wire, max_length=length,
        layers=None if isinstance(counts, str) else counts, shares=None if isinstance(parts, str) else parts,
    )  # fmt: skip


def _log(asked: bool, text: bool) -> Callable[[str], None] | None:
    """Where lines of requests go. Raises `InputError`."""
    if text and not asked:
        raise InputError("--log-text says what --log-requests writes; give that too")
    return partial(print, flush=True) if asked else None


def _both(tell: Progress, showing: Bar, site: Site) -> Progress:
    """Tells the server's state of what goes on, and the terminal."""
    if site.task is not None:  # of an engine that has become several
        showing.remove_task(site.task)
    task = site.task = showing.add_task(f"{site.prefix}starting", total=1.0)

    def told(what: str, share: float) -> None:
        tell(what, share)
        showing.update(task, description=f"{site.prefix}{what}", completed=share)

    return told


def _client(sites: Sites, most_waiting: int, out: Console, name: str, may_part: bool) -> EngineClient:
    """Each engine on a thread; what they tell goes to the terminal. `may_part`: one may become several."""
    from weft.server.lately import Live
    from weft.server.metrics import Metrics
    from weft.server.replicas import Replicas
    from weft.server.service import Service

    def told(site: Site | None, line: str) -> None:
        out.print(f"{site.prefix if site is not None else ''}{line}", style="dim", markup=False, soft_wrap=True)

    def service_of(site: Site) -> Service:
        made = Service(partial(sites.make, site), most_waiting, interrupt, partial(told, site), metrics, live)
        site.tells(made.tell)
        return made

    metrics, live = Metrics(), Live()
    metrics.named(name)
    interrupt = sites.hub.interrupted.set if sites.hub is not None else lambda: None
    services = [service_of(site) for site in sites.all]
    if len(services) == 1 and not may_part:
        client: EngineClient = services[0]
    else:
        client = replicas = Replicas(services, partial(told, None))
        sites.parted = lambda others: replicas.add([service_of(site) for site in others])
    if sites.hub is not None:  # who joins may join any replica
        sites.hub.told = lambda line: services[0].tell(line) if len(sites.all) == 1 else told(None, line)
    return client


def _demand_guarded(host: str, allowed: bool) -> None:
    """Raises `InputError` if everyone could reach the server and nobody asked for that."""
    resolved(host, "--host")
    if not (is_loopback(host) or allowed):
        raise InputError(
            f"--host {host} would let everyone who reaches this machine use the model; give --api-key (or "
            "WEFT_API_KEY in the environment), or --allow-anyone"
        )


def _welcome(out: Console, showing: Bar, client: EngineClient, name: str, host: str, listening: socket) -> None:
    """What is served, and where; nothing is under way any more that was shown."""
    showing.stop()
    about, host, port = client.about, f"[{host}]" if ":" in host else host, listening.getsockname()[1]
    for notice in about.notices:
        out.print(notice, style="dim")
    ranks, url = counted(about.ranks, "rank"), f"http://{host}:{port}"
    if " x " in about.layout:
        ranks += f" ({about.layout})"
    if about.replicas > 1:
        ranks = f"{about.replicas} replicas of {ranks}"
    out.print(
        f"[bold]{name}[/] on {ranks}: {url}/v1 for OpenAI's clients, {url}/ for a page",
        soft_wrap=True,
    )


def _keys(given: list[str] | None, isolate: bool) -> list[str]:
    """In the environment there is one; an empty one is a mistake. `isolate`: something is to be kept within one."""
    keys = list(given or ())
    if any(not key.strip() for key in keys):
        raise InputError("an API key is empty; give at least one character, or leave --api-key and WEFT_API_KEY out")
    if isolate and not keys:
        raise InputError("--isolate-prefixes keeps prefixes within an API key, and there is none; give --api-key too")
    return keys


def _origins(given: list[str] | None) -> list[str]:
    """As browsers write them: no path, not even a slash at the end."""
    given = [origin.removesuffix("/") for origin in given or ()]
    for origin in given:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise InputError(f"--allow-origin {origin!r} is not an origin; write it like https://chat.example, or *")
    return given


def _name(model: str | None) -> str:
    """What clients call it: a hub id, or a directory's or a file's name."""
    if model is None:
        return PACKAGED_NAME
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.stem if path.is_file() else model
