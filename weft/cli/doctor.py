"""`weft doctor`: what this machine has, and what is missing for what."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weft.cli.options import DTYPE, KV, MODEL, STORED, TP, ranks_or_auto
from weft.config import positive
from weft.errors import InputError
from weft.finding import Finding

HELP = """Say what this machine has, and what is missing for what; with MODEL, what that is, and what weft does with it.

Exits with 1 if MODEL can be read and not be run, with 2 if it can't be read.

Examples:

  weft doctor

  weft doctor ./Qwen3-8B-Q4_K_M.gguf --tp 2

  weft doctor --json

  weft doctor --calibrations
"""


def doctor(
    model: MODEL = None,
    tp: TP = "1",
    dtype: DTYPE = "float32",
    weights: STORED = "auto",
    kv: KV = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    calibrations: Annotated[bool, typer.Option("--calibrations", help="Each one that is kept, too.")] = False,
) -> None:
    """See HELP."""
    checks, runs = _surveyed(model, tp, dtype, weights, kv) if model is not None else (findings(calibrations), True)
    if as_json:
        named = {} if model is None else {"model": model}
        print(json.dumps({"weft": version("weft"), **named, "findings": [asdict(finding) for finding in checks]}))
    else:
        of = f"with {model}" if model is not None else "on this machine"
        Console().print(_table(f"weft {version('weft')} {of}", checks))
    if not runs:
        raise typer.Exit(1)


def _table(title: str, checks: Sequence[Finding]) -> Table:
    table = Table(title=escape(title), expand=False)
    for column in ("", "what", "found", "what it is for"):
        table.add_column(column, overflow="fold")  # what is to be typed is not cut off
    for finding in checks:
        told = map(escape, (finding.what, finding.value, finding.meaning))
        table.add_row("[green]✓[/]" if finding.ok else "[yellow]–[/]", *told)
    return table


def _surveyed(model: str, tp: str, dtype: str, weights: str, kv: str) -> tuple[list[Finding], bool]:
    from weft.hub import locate
    from weft.survey import survey

    ranks = ranks_or_auto(tp)
    if ranks == "auto":
        raise InputError("weft doctor MODEL wants a number of ranks, as in --tp 2")
    positive(ranks, "--tp")
    return survey(locate(model), ranks, dtype, weights, kv)


def findings(calibrations: bool) -> list[Finding]:
    """Everything that weft makes use of, in the order of weight. `calibrations`: each that is kept."""
    kept = _each_calibration() if calibrations else []
    return [_system(), *_processor(), *_kernels(), *_devices(), *_links(), _hub(), _calibrations(), *kept]


def _system() -> Finding:
    import torch

    text = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}"
    return Finding("system", sys.version_info >= (3, 11), text, "Python 3.11 or newer")


def _processor() -> list[Finding]:
    from weft.config import available_cores
    from weft.execute.process import free_memory

    cores, memory = available_cores(), psutil.virtual_memory().total
    pinning = hasattr(os, "sched_setaffinity")
    return [
        Finding("cores", True, str(cores), f"up to {cores} ranks of one thread without sharing a core"),
        Finding("memory", True, f"{free_memory() / 2**30:.1f} of {memory / 2**30:.1f} GiB free",
                "weights (4 bytes a parameter in float32) and key/value memory"),
        Finding("pinning", pinning, "yes" if pinning else "not on this system",
                "LLM(cores=...): ranks that keep to their cores" + ("" if pinning else "; ranks wander instead")),
    ]  # fmt: skip


def _kernels() -> list[Finding]:
    import torch

    from weft.model.attention import fused_attention_works

    fused = fused_attention_works()
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        Finding("instructions", True, capability, "vector instructions that torch uses"),
        _compiled(),
        *_chosen(),
        Finding("fused attention", fused, "yes" if fused else "missing",
                "attention without a mask matrix" + ("" if fused else "; plain operations instead, slower")),
    ]  # fmt: skip


def _compiled() -> Finding:
    """weft's own kernels, compiled now if they aren't yet."""
    from weft.compiled.library import COMPILER_VARIABLE, library, why_none

    if found := library():
        return Finding(
            "compiled kernels", True, found.weft_form().decode(), "decoding at the rate at which memory is read"
        )
    return Finding(
        "compiled kernels",
        False,
        why_none(),
        f"torch's do it all, decoding in few bits takes twice as long; install gcc, or say {COMPILER_VARIABLE}=...",
    )


def _chosen() -> Iterator[Finding]:
    """For each format, which kernels were found to be fastest, and how fast that is for the largest weight."""
    from weft.model.kernels.choice import KERNELS, all_kept

    known = list(all_kept())
    for format_ in KERNELS:
        found = [each for each in known if each.format == format_]
        if not found:
            yield Finding(f"kernels, {format_}", True, "not tried yet", "they are at the first start with such weights")
            continue
        counts = Counter(each.choice.kernel for each in found)
        exact, largest = all(each.choice.exact for each in found), max(found, key=lambda each: each.shape)
        bytes_, flops = (f"{speed / 1e9:,.0f}" for speed in largest.speeds)
        height, width = largest.shape
        told = f"{height} x {width}, {largest.threads} threads: {bytes_} GB/s with one row, {flops} GFLOP/s with many"
        told += "" if exact else "; but for --reproducible a row's bits change with its batch"
        kernels = ", ".join(f"{name} for {count}" for name, count in counts.most_common())
        yield Finding(f"kernels, {format_}", exact, f"{kernels} shape{'s' if len(found) > 1 else ''}", told)


def _devices() -> list[Finding]:
    import torch

    from weft.parallel import gloo, ring

    cuda, memory = torch.cuda.is_available(), ring.available
    return [
        Finding("shared memory", memory, "yes" if memory else "no", "--transport shm, between ranks of one machine"),
        Finding("gloo", gloo.available(), "yes" if gloo.available() else "missing", "--transport gloo"),
        Finding("GPU", cuda, torch.cuda.get_device_name() if cuda else "none",
                "lanes for GPUs are not built yet: weft computes on the CPU"),
    ]  # fmt: skip


def _links() -> list[Finding]:
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    tools = [name for name in ("ip", "tc") if shutil.which(name) is None]
    missing = ([] if root else ["root"]) + ([f"iproute2 ({', '.join(tools)})"] if tools else [])
    return [
        Finding("shaped links", not missing, "yes" if not missing else "missing: " + ", ".join(missing),
                "benchmarks over a link of known speed, between network namespaces"),
        *_tcp(Path("/proc/sys/net/ipv4")),
    ]  # fmt: skip


def _tcp(settings: Path) -> list[Finding]:
    """What the system does to a connection between machines: it is one for each way. Nothing where it doesn't say."""
    try:
        slow = (settings / "tcp_slow_start_after_idle").read_text().strip() != "0"
        most = int((settings / "tcp_wmem").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return []
    starts = "messages between machines" + "; sysctl -w net.ipv4.tcp_slow_start_after_idle=0 keeps speed" * slow
    return [
        Finding("TCP after pauses", not slow, "starts slowly again" if slow else "as fast as before", starts),
        Finding("TCP buffers", True, f"{most / 2**20:.3g} MiB",
                f"up to {most * 8 / 0.01 / 1e9:.2g} Gbit/s between machines 10 ms apart and back"),
    ]  # fmt: skip


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return Finding("hub", not offline, "offline, by HF_HUB_OFFLINE" if offline else "allowed; not asked now",
                   "models by id; HF_HUB_OFFLINE=1 keeps to the cache")  # fmt: skip


def _calibrations() -> Finding:
    """How much was measured on earlier starts."""
    from weft.plan.kept import all_kept, folder

    kept = list(all_kept())
    if not kept:
        meaning = "weft measures what steps cost at the first start with several ranks and --overlap auto"
        return Finding("calibrations", True, "none yet", meaning)
    newest = next((f", the newest of {each.when[:16]}" for _, each in kept if each is not None), "")
    meaning = f"what steps cost, in {folder()}; --calibrations lists them, --recalibrate measures anew"
    return Finding("calibrations", True, f"{len(kept)} kept{newest}", meaning)


def _each_calibration() -> list[Finding]:
    """The newest first."""
    from weft.plan.kept import all_kept

    lines = []
    for path, calibration in all_kept():
        if calibration is None:
            lines.append(Finding("calibration", False, path.name, "can't be read; it will be measured again"))
            continue
        key, costs = calibration.key, calibration.costs
        wire = next(iter(costs.wires.values()), None)
        speed = f"; a sum {wire.fixed * 1e3:.2f} ms + {wire.per_byte * 1e9:.3g} ns a byte" if wire else ""
        what = f"{key['model']}, {len(key['ranks'].split(','))} ranks, {key['link']}, {key['device']}"
        lines.append(
            Finding("calibration", True, f"{calibration.when[:16]}, {calibration.seconds:.1f} s", what + speed)
        )
    return lines
