"""Why weft reads GGUF by itself: headers and blocks, against the `gguf` package and transformers.

    python benchmarks/formats.py [--rounds 7] [--json FILE]

Header: SmolLM2's, of a vocabulary of 49,152, with its tokens and merges. Blocks: nanoseconds a number to float32, on
one thread, of a matrix of 2048 by 2048; medians of rounds, in turns, with memory that was used before. The bound beside
them is copying so many float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, quants
from models import smollm2
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.integrations.gguf.dequant import dequantize as by_transformers
from transformers.integrations.gguf.reader import read_gguf_metadata

from weft.formats.gguf.blocks import UNPACK, unpacked
from weft.formats.gguf.header import GgufHeader
from weft.formats.gguf.types import TYPES
from weft.formats.packed import Packed

SIDE = 2048
LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def taken(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    return {name: each[1:] for name, each in seconds.items()}  # the first one warms up


def headers() -> dict[str, Callable[[], object]]:
    """Ways to read SmolLM2's."""
    path = smollm2()

    def package() -> None:
        reader = GGUFReader(str(path))
        for key in LISTS:
            reader.fields[key].contents()

    def weft() -> None:
        header = GgufHeader(path)
        for key in LISTS:
            header.listed(key)

    return {"gguf": package, "transformers": lambda: read_gguf_metadata(str(path), LISTS), "weft": weft}


def blocks(name: str) -> dict[str, Callable[[], object]]:
    """Ways to read a matrix of a type."""
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (SIDE, SIDE // kind.numbers * kind.bytes), dtype=np.uint8)
    tensor, out, other = torch.from_numpy(raw), torch.empty(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    part = Packed(SIDE, range(SIDE), lambda rows: unpacked(tensor[rows.start : rows.stop], kind))

    def package() -> None:
        with np.errstate(all="ignore"):
            quants.dequantize(raw, Type[name])

    number = Type[name].value
    ways: dict[str, Callable[[], object]] = {"gguf": package}
    if number in GGML_BLOCK:
        ways["transformers"] = lambda: by_transformers(tensor, number, torch.float32)
    return ways | {"weft": lambda: part.into(out), "copying": lambda: out.copy_(other)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="every round's seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    header = taken(headers(), given.rounds)
    print("header, ms:  " + "   ".join(f"{name} {median(each) * 1e3:.0f}" for name, each in header.items()))
    columns = ("gguf", "transformers", "weft", "copying")
    print(f"{'ns a number':12s}" + "".join(f"{name:>14s}" for name in columns))
    rounds = {}
    for name in UNPACK:
        rounds[name] = taken(blocks(name), given.rounds)
        found = {way: median(seconds) / SIDE**2 * 1e9 for way, seconds in rounds[name].items()}
        print(f"{name:12s}" + "".join(f"{found[way]:14.2f}" if way in found else f"{'-':>14s}" for way in columns))
    if given.json:
        result = {"date": time.strftime("%Y-%m-%d"), "header": header, "blocks": rounds}
        given.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
