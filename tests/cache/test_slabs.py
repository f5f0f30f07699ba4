"""Key/value memory: contiguous, lazily committed, given back."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest
import torch

from weft.cache.slabs import Slabs


def test_writes_are_read_back_per_slot_and_layer() -> None:
    slabs = Slabs(slots=3, layers=2, kv_heads=2, length=50, head_dim=4)
    first, second = torch.randn(5, 4, 4), torch.randn(3, 4, 4)
    slabs.write(1, 0, 0, first)
    slabs.write(1, 0, 5, second)
    slabs.write(2, 1, 0, second)
    keys, values = slabs.read(1, 0)
    everything = torch.cat([first, second]).transpose(0, 1)
    assert torch.equal(keys[:, :8], everything[:2]) and torch.equal(values[:, :8], everything[2:])
    assert torch.equal(slabs.read(2, 1)[0][:, :3], second.transpose(0, 1)[:2])
    assert slabs.used_bytes == (8 + 3) * slabs.bytes_per_token == 11 * 2 * 4 * 4 * 4
    slabs.check_integrity()
    slabs.release(1)
    assert slabs.used_bytes == 3 * slabs.bytes_per_token
    slabs.check_integrity()


@pytest.mark.skipif(sys.platform != "linux", reason="reads committed memory from Linux")
def test_only_what_is_touched_costs_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    slabs = Slabs(slots=100, layers=8, kv_heads=8, length=131072, head_dim=128)  # 800 GiB of addresses
    slabs.write(7, 0, 0, torch.randn(2000, 16, 128))
    written = process.memory_info().rss - before
    assert 16e6 < written < 100e6
    slabs.release(7)
    assert process.memory_info().rss - before < written - 10e6


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="reads how memory is mapped from Linux")
def test_no_huge_page_is_taken_whatever_the_system_prefers() -> None:
    """With `always` 16 tokens of this slab took 1026 MiB instead of 6."""
    slabs = Slabs(slots=1, layers=32, kv_heads=8, length=8192, head_dim=128)
    address, flags = slabs.read(0, 0)[0].data_ptr(), ""
    inside = False
    for line in Path("/proc/self/smaps").read_text("ascii", "replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert "nh" in flags.split()


def test_a_rank_without_heads_has_an_empty_slab() -> None:
    slabs = Slabs(slots=2, layers=2, kv_heads=0, length=10, head_dim=4)
    slabs.write(0, 0, 0, torch.empty(3, 0, 4))
    slabs.check_integrity()
    slabs.release(0)


def test_a_beginning_is_copied_and_both_go_on_apart() -> None:
    slabs = Slabs(2, 2, 3, 16, 4)
    for layer in range(2):
        slabs.write(0, layer, 0, torch.randn(10, 6, 4))
    slabs.copy(0, 1, 7)
    for layer in range(2):
        for one, other in zip(slabs.read(0, layer), slabs.read(1, layer), strict=True):
            assert torch.equal(one[:, :7], other[:, :7])
    slabs.write(1, 0, 3, torch.zeros(1, 6, 4))
    assert slabs.read(0, 0)[0][:, 3].abs().sum() > 0
    assert slabs.used_bytes == 17 * slabs.bytes_per_token
    slabs.check_integrity()
