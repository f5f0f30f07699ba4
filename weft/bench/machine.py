"""What a measurement ran on: names, versions, and the two rates that bound computation. Knows nothing of programs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import psutil

from weft.config import ModelConfig, available_cores, processor_name
from weft.model.families import blueprint_of
from weft.model.shares import tensor_shares
from weft.timeline.timeline import median

COPIED = 64 << 20  # bytes: more than caches hold


def describe(model: ModelConfig, threads: int) -> dict[str, Any]:
    """Names and versions, and what `threads` threads reach here: GFLOP/s of a matrix product, GB/s of a copy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm, copy = gemm_rate(model), copy_rate()
    finally:
        torch.set_num_threads(before)
    return {
        "processor": processor_name(), "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
        "torch": torch.__version__, "weft": version("weft"), "date": str(date.today()), "threads_of_a_rank": threads,
        "gemm_gflops": round(gemm / 1e9, 1), "copy_gb_per_s": round(copy / 1e9, 1),
    }  # fmt: skip


def gemm_rate(model: ModelConfig) -> float:
    """FLOP/s of the product that the model's MLP begins with, 1024 rows, by weft's own kernel."""
    import torch

    from weft.model.kernels.choice import Kernels

    product = Kernels().linear(torch.randn(model.intermediate, model.hidden))
    rows = torch.randn(1024, model.hidden)
    return 2 * 1024 * model.hidden * model.intermediate / _seconds(lambda: product(rows))


def copy_rate() -> float:
    """Bytes a second that a copy in memory reads (and writes as many)."""
    import torch

    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return COPIED / _seconds(lambda: target.copy_(source))


def _seconds(work: Callable[[], object]) -> float:
    def once() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    once()
    return median(once() for _ in range(7))


def prefill_flops(model: ModelConfig, tokens: int) -> float:
    """Floating-point operations of all ranks' matrix products for a prompt; attention's own products not counted.

    Of the last layer only keys and values (with the queries beside them) are needed of all rows.
    """
    blueprint = blueprint_of(model)
    [share] = tensor_shares(blueprint, (1.0,))
    layer = sum(share.numbers(matrix) for parts in blueprint.layer for matrix in parts.matrices)
    stored = sum(share.numbers(matrix) for matrix in blueprint.stored)
    return 2.0 * tokens * max(0, (model.layers - 1) * layer + stored)


def cores_of(ranks: int, threads: int) -> tuple[int, ...]:
    """The first cores that this process may use, one a thread."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(available_cores())
    return tuple(allowed[: ranks * threads])
