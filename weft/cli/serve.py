"""`weft serve`: the OpenAI API over HTTP. Knows options and terminals; the work is done in server/."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress as Bar

from weft.about import About
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
from weft.cli.terminal import bar, warn_of_shared_cores
from weft.engine import Engine
from weft.errors import InputError
from weft.hub import locate
from weft.launch.addresses import endpoint, is_loopback, parse_address, resolved
from weft.launch.joined import JoinedLauncher
from weft.launch.launcher import TOKEN_VARIABLE
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.opening import GIVEN, open_engine
from weft.program.strategy import AUTO
from weft.text import leave_torch_out
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
MOST_PORT = 65535


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
        help="With --join-address: first of 1 + local ranks ports that the ranks use here; default: any that are free.",
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
    int,
    typer.Option(
        min=1, help="Engines of --tp x --pp ranks each: a request goes to the one with most of its prompt, unless that "
        "is too busy. With --join-address the next one's machines join at the next port.",
    ),
]  # fmt: skip
JOINED = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT at which ranks on other machines join (weft worker). Their token is new at each start, or "
        "follows from a secret in WEFT_TOKEN here."
    ),
]


FOR_OTHERS = "--rank-ports, --local-ranks, --check-content and --plain-data"


def serve_command(
    model: MODEL = None,
    tp: TP = "1", pp: PP = 1, layers: LAYERS = None, layout: LAYOUT = None, optimise: OPTIMISE = "latency",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback wants --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    api_key: KEYS = None, allow_anyone: ANYONE = False, allow_origin: ORIGINS = None, replicas: REPLICAS = 1,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    overlap: OVERLAP = "auto", wire: WIRE = "exact", transport: TRANSPORT = "auto", link: LINK = "none",
    dtype: DTYPE = "float32", weights: STORED = "auto", kv: KV = "auto", shares: SHARES = None,
    reproducible: REPRODUCIBLE = False, recalibrate: RECALIBRATE = False, threads: THREADS = None,
    max_model_len: LENGTH = None,
    max_num_seqs: SEQUENCES = 16, max_num_batched_tokens: BATCH = 8192, max_waiting: WAITING = 256,
    token_interval: INTERVAL = 0.2, prefix_caching: CACHING = True, isolate_prefixes: ISOLATED = False,
    log_requests: LOGGED = False, log_text: LOG_TEXT = False,
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
    with bound(host, port) as listening, bar(out) as showing:
        thought_of = pp != 1 or layers or shares or overlap != AUTO  # a layout, by whoever wrote these
        world = ranks if ranks == "auto" else ranks * pp
        sites = _sites(join_address, world, replicas, local_ranks, rank_ports, check_content or plain_data)
        here = [site for site in sites if site.local]
        warn_of_shared_cores(out, world if ranks == "auto" else sum(site.local for site in sites))

        def make(site: Site, tell: Progress) -> Engine:
            if site is sites[0]:
                _invite(out, sites, model)
            usual = AUTO if site.launcher and ranks != 1 and not thought_of else GIVEN
            return open_engine(
                model, ranks=ranks, sections=pp, layers=layers_or_auto(layers), layout=layout or usual,
                optimise=optimise, overlap=overlap, wire=wire, transport=transport, link=link, kv=kv, weights=weights,
                shares=shares_or_auto(shares), reproducible=reproducible, threads=threads, recalibrate=recalibrate,
                max_length=max_model_len, max_sequences=max_num_seqs, max_batch_tokens=max_num_batched_tokens,
                launcher=site.launcher, dtype=dtype, prefixes=prefix_caching, token_interval=token_interval,
                check_content=check_content, plain_data=plain_data, progress=_both(tell, showing, site),
                replicas=len(here) if site.local else 1, replica=here.index(site) if site.local else 0,
            )  # fmt: skip

        def ready() -> None:
            showing.stop()
            _welcome(out, service.about, name, f"[{host}]" if ":" in host else host, listening.getsockname()[1])

        service = _client(make, max_waiting, sites, out, name)
        settings = Settings(
            name, keys, is_loopback(host), max_body_bytes, client_timeout, request_timeout, origins, isolate_prefixes,
            _log(log_requests, log_text), log_text,
        )  # fmt: skip
        serve(application(service, settings), service, listening, drain, ready)


def _log(asked: bool, text: bool) -> Callable[[str], None] | None:
    """Where lines of requests go. Raises `InputError`."""
    if text and not asked:
        raise InputError("--log-text says what --log-requests writes; give that too")
    return partial(print, flush=True) if asked else None


def _both(tell: Progress, showing: Bar, site: Site) -> Progress:
    """Tells the server's state of what goes on, and the terminal."""
    task = showing.add_task(f"{site.prefix}starting", total=1.0)

    def told(what: str, share: float) -> None:
        tell(what, share)
        showing.update(task, description=f"{site.prefix}{what}", completed=share)

    return told


def _client(
    make: Callable[[Site, Progress], Engine], most_waiting: int, sites: Sequence[Site], out: Console, name: str
) -> EngineClient:  # fmt: skip
    """Each engine on a thread; what they tell goes to the terminal."""
    from weft.server.lately import Live
    from weft.server.metrics import Metrics
    from weft.server.replicas import Replicas
    from weft.server.service import Service

    def told(prefix: str, line: str) -> None:
        out.print(prefix + line, style="dim", markup=False, soft_wrap=True)

    metrics, live, services = Metrics(), Live(), list[Service]()
    metrics.named(name)
    for site in sites:
        launcher = site.launcher
        interrupt = launcher.interrupted.set if launcher is not None else lambda: None
        service = Service(partial(make, site), most_waiting, interrupt, partial(told, site.prefix), metrics, live)
        if launcher is not None:
            launcher.told = service.tell
        services.append(service)
    return services[0] if len(services) == 1 else Replicas(services, partial(told, ""))


def _demand_guarded(host: str, allowed: bool) -> None:
    """Raises `InputError` if everyone could reach the server and nobody asked for that."""
    resolved(host, "--host")
    if not (is_loopback(host) or allowed):
        raise InputError(
            f"--host {host} would let everyone who reaches this machine use the model; give --api-key (or "
            "WEFT_API_KEY in the environment), or --allow-anyone"
        )


def _welcome(out: Console, about: About, name: str, host: str, port: int) -> None:
    """What is served, and where."""
    for notice in about.notices:
        out.print(notice, style="dim")
    ranks, url = f"{about.ranks} rank{'s' if about.ranks > 1 else ''}", f"http://{host}:{port}"
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


class Site(NamedTuple):
    """Of one replica: ranks on this machine, ranks elsewhere and how those are started; what its lines begin with."""

    local: int
    others: int
    launcher: JoinedLauncher | None
    prefix: str


def _sites(
    join_address: str | None, ranks: int | Literal["auto"], replicas: int, local: int, ports: int, others: bool
) -> list[Site]:  # fmt: skip
    """Replicas of so many ranks. This machine's go to the first ones; those with ranks elsewhere have ports of their
    own, one after the other. `others`: one more option was given that is for machines that join alone."""
    prefixes = [f"replica {number + 1}: " if replicas > 1 else "" for number in range(replicas)]
    if join_address is None:
        if ports or local != 1 or others:
            raise InputError(f"{FOR_OTHERS} are for ranks on other machines: give --join-address too")
        return [Site(1 if ranks == "auto" else ranks, 0, None, prefix) for prefix in prefixes]
    if ranks == "auto":
        raise InputError("--tp auto is for one machine; with --join-address give the number of ranks, as in --tp 2")
    if not 0 <= local < ranks * replicas:
        raise InputError(
            f"--local-ranks {local} of {ranks * replicas} leaves no rank for another machine; give --tp, --pp or "
            "--replicas more"
        )
    host, port = parse_address(join_address, "--join-address")
    _demand_ports(port, replicas - local // ranks, ports, local % ranks + replicas - local // ranks)
    secret, sites = os.environ.get(TOKEN_VARIABLE), list[Site]()
    for prefix in prefixes:
        here = min(local, ranks)
        launcher, local = None, local - here
        if here < ranks:
            address = endpoint(host, port).removeprefix("tcp://")
            launcher, port = JoinedLauncher(address, here, secret, lambda line: None, ports), port + 1
            ports += here + 1 if ports else 0
        sites.append(Site(here, ranks - here, launcher, prefix))
    return sites


def _demand_ports(first: int, joined: int, ranks_first: int, ranks: int) -> None:
    """Of so many replicas that others join, one after the other; and of their ranks on this machine, if they have given
    ones. Raises `InputError`."""
    last = first + joined - 1
    if joined > 1 and last > MOST_PORT:
        raise InputError(f"{joined} replicas that others join need ports {first} to {last}; give a lower one")
    if ranks_first and joined > 1 and first <= ranks_first + ranks - 1 and ranks_first <= last:
        raise InputError(
            f"--rank-ports {ranks_first} to {ranks_first + ranks - 1} and those of --join-address, {first} to {last}, "
            "overlap"
        )


def _invite(out: Console, sites: Sequence[Site], model: str | None) -> None:
    """Says what to run on other machines, if some are to join; nobody is invited to what can't run."""
    joined = [(site, site.launcher) for site in sites if site.launcher is not None]
    if not joined:
        return
    blueprint_of(model_config(locate(model)))
    at_the_hub = model is not None and not Path(model).exists()
    named = f" {shlex.quote(model)}" if model is not None and at_the_hub else ""
    for site, launcher in joined:
        command = f"{TOKEN_VARIABLE}={launcher.token} weft worker --join {shlex.quote(launcher.address)}{named}"
        out.print(f"{site.prefix}on {site.others} other machine{'s' if site.others > 1 else ''}, run:")
        out.print(f"  {command}", markup=False, soft_wrap=True)
    if model is not None and not at_the_hub:
        out.print("with where the model is behind it, if it is elsewhere there; without the model it comes from here")
