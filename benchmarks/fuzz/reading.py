"""The process that reads damaged files for files.py: a path on each line of its standard input, and what came of it, as
JSON, on each line of its standard output. With a name of benchmarks.fuzz.planted it has that fault.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants

from weft.errors import InputError
from weft.model.description import generation_defaults, model_config
from weft.model.families import blueprint_of
from weft.model.opening import open_model
from weft.model.shares import tensor_shares
from weft.model.weights import load
from weft.text import tokenizer_of

MIB = 100
LONGEST = 1000  # characters of an error


def read(path: Path) -> None:
    """All that weft would look at before it runs a model on two ranks. Raises `InputError`."""
    config = model_config(path)
    blueprint = blueprint_of(config)
    generation_defaults(path)
    with closing(open_model(path, config)) as checkpoint:
        for share in tensor_shares(blueprint, (1.0, 2.0)):
            load(checkpoint, blueprint, share)
        if path.suffix == ".gguf":
            tokenizer_of(path)
            _compare(path, checkpoint, [*blueprint.tensors], config.heads, config.kv_heads)


def _compare(path: Path, checkpoint: Any, names: list[str], heads: int, kv_heads: int) -> None:
    """With the package's reader, where that reads the file too."""
    try:
        reader = GGUFReader(str(path))
        there = {tensor.name: tensor for tensor in reader.tensors}
        with np.errstate(all="ignore"):
            expected = {name: quants.dequantize(np.array(there[name].data), there[name].tensor_type)
                        for name in map(checkpoint.stored_name, names) if name in there}  # fmt: skip
    except Exception:  # whatever it doesn't like
        return
    for name in names:
        if (stored := checkpoint.stored_name(name)) in expected:
            found = checkpoint.read(name).numbers(torch.float32).numpy()
            values = expected[stored].astype(np.float32).reshape(found.shape)
            for part, count in (("attn_q", heads), ("attn_k", kv_heads)):
                if f".{part}." in stored:
                    pairs = values.reshape(count, values.shape[0] // count // 2, 2, -1)
                    values = pairs.swapaxes(1, 2).reshape(values.shape)
            if not np.array_equal(found, values, equal_nan=True):
                raise AssertionError(f"{name} is not what the package reads")


def outcome(path: Path) -> dict[str, Any]:
    """What came of a file."""
    try:
        read(path)
    except InputError as error:
        said = str(error)
        return (
            {"wrong": f"an error of several lines: {said!r:.200}"}
            if "\n" in said or len(said) > LONGEST
            else {"refused": said}
        )
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"wrong": f"{type(error).__name__}: {error}"[:300] + f" in {where.name}, line {where.lineno}"}
    return {"read": 1}


def main() -> None:
    """Until there are no more."""
    if sys.argv[1:]:
        getattr(importlib.import_module("benchmarks.fuzz.planted"), sys.argv[1])()
    before: int | None = None
    for line in sys.stdin:
        said = outcome(Path(line.strip()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        before = before or peak
        if peak - before > MIB and "wrong" not in said:
            said = {"wrong": f"{peak - before} MiB of memory"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
