"""How long weft takes to its first token, and what its processes take of memory.

    python benchmarks/starting.py [--rounds 5] [--model h1024] [--real] [--json FILE]

First token: from the start of `weft generate` with the model in the package until the first character is there, beside
what `python -c 'import torch'` takes in the same round; medians of rounds, in turns. Costs are known already, as after
the first start on a machine.

Memory: a server with one of the models of benchmarks/models.py after a prompt of 512 tokens; private memory of each
process, beside the weights and the keys and values that a rank holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil
from models import SIZES, random_model, smollm2
from servers import OFFLINE, WEFT, serving

PROMPT = "def main("
ASKED = [PROMPT, "--max-tokens", "2"]


def ways(real: bool) -> dict[str, list[str]]:
    """Commands whose first output is awaited. `real`: with SmolLM2 from its GGUF file too."""
    found = {
        "import torch": [sys.executable, "-c", "import torch; print(1)"],
        "weft generate": [*WEFT, "generate", *ASKED, "--threads", "1"],
        "weft generate --tp 2": [*WEFT, "generate", *ASKED, "--threads", "1", "--tp", "2"],
    }
    if real:
        model = str(smollm2())
        found |= {
            "weft generate SmolLM2": [*WEFT, "generate", model, *ASKED],
            "weft generate SmolLM2 --tp 2": [*WEFT, "generate", model, *ASKED, "--tp", "2"],
        }
    return found


def first_output(command: list[str]) -> float:
    """Seconds until there is something on standard output."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=OFFLINE) as child:
        assert child.stdout is not None
        if not child.stdout.read(1):
            raise SystemExit(f"{' '.join(command)} printed nothing")
        taken = time.perf_counter() - begin
        child.stdout.read()
    return taken


def memory(name: str) -> dict[str, float]:
    """MiB of each process, and of what a rank must hold."""
    directory, size = random_model(name), SIZES[name]
    tokens = 512
    found: dict[str, float] = {"weights": sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**20}
    width = size.hidden // size.heads * size.kv_heads
    found["keys and values"] = 2 * 4 * size.layers * width * (tokens + 8) / 2**20
    with serving(str(directory), "--max-model-len", "1024") as (pid, url):
        asked: dict[str, Any] = {"prompt": [7] * tokens, "max_tokens": 8, "ignore_eos": True}
        httpx2.post(f"{url}/v1/completions", json=asked, timeout=120).raise_for_status()
        engine = psutil.Process(pid)
        for process in (engine, *engine.children(recursive=True)):
            module = next((part for part in process.cmdline() if part.startswith("weft.")), "?")
            found[module] = process.memory_full_info().uss / 2**20
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=SIZES, default="h1024", help="whose memory is looked at")
    parser.add_argument("--real", action="store_true", help="SmolLM2's first token too, from its GGUF file")
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    commands = ways(given.real)
    for command in commands.values():  # what is measured once is kept, and files are in the page cache
        first_output(command)
    seconds: dict[str, list[float]] = {way: [] for way in commands}
    for _ in range(given.rounds):
        for way, command in commands.items():
            seconds[way].append(first_output(command))
    base = seconds["import torch"]
    print(f"{'seconds to the first output':28s} {'median':>8s} {'more than import torch':>24s}")
    for way, taken in seconds.items():
        more = median(one - other for one, other in zip(taken, base, strict=True))
        print(f"{way:28s} {median(taken):8.2f} {more:24.2f}")
    mebibytes = memory(given.model)
    print(f"\n{'MiB, ' + given.model:28s}")
    for what, size in mebibytes.items():
        print(f"{what:28s} {size:8.0f}")
    if given.json:
        result = {"date": time.strftime("%Y-%m-%d"), "seconds": seconds, "model": given.model, "MiB": mebibytes}
        given.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
