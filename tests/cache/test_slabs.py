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
    keys, values = slabs.read(1, 0).span(0, 8)
    everything = torch.cat([first, second]).transpose(0, 1)
    assert torch.equal(keys, everything[:2]) and torch.equal(values, everything[2:])
    assert torch.equal(slabs.read(2, 1).span(0, 3)[0], second.transpose(0, 1)[:2])
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
    address, flags = slabs.read(0, 0).span(0, 1)[0].data_ptr(), ""
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


@pytest.mark.parametrize("rounded", [False, True])
def test_a_beginning_is_copied_and_both_go_on_apart(rounded: bool) -> None:
    slabs = Slabs(2, 2, 3, 16, 4, rounded=rounded)
    for layer in range(2):
        slabs.write(0, layer, 0, torch.randn(10, 6, 4))
    slabs.copy(0, 1, 7)
    for layer in range(2):
        for one, other in zip(slabs.read(0, layer).span(0, 7), slabs.read(1, layer).span(0, 7), strict=True):
            assert torch.equal(one, other)
    slabs.write(1, 0, 3, torch.zeros(1, 6, 4))
    assert slabs.read(0, 0).span(3, 4)[0].abs().sum() > 0
    assert slabs.read(1, 0).span(3, 4)[0].abs().sum() == 0
    assert slabs.used_bytes == 17 * slabs.bytes_per_token
    slabs.check_integrity()


def test_in_int8_each_token_and_head_has_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.cache.slabs.PIECE", 4)
    slabs = Slabs(slots=2, layers=1, kv_heads=3, length=50, head_dim=64, rounded=True)
    assert slabs.bytes_per_token == 6 * (64 + 4)  # of 6 * 64 * 4
    written = torch.randn(10, 6, 64)
    written[3] *= 1e4  # a token beside one ten thousand times as large
    written[:, 4] *= 1e-4
    slabs.write(1, 0, 0, written)
    memory = slabs.read(1, 0)
    keys, values = memory.span(0, 10)
    expected = written.transpose(0, 1)
    error = (torch.cat([keys, values]) - expected).norm(dim=2) / expected.norm(dim=2)
    assert float(error.max()) < 0.02
    pieces = list(memory.pieces(10))
    assert [piece.shape[1] for piece, _ in pieces] == [4, 4, 2]
    assert torch.equal(torch.cat([piece for piece, _ in pieces], 1), keys)
    some = memory.heads(slice(1, 3))
    assert some.codes.untyped_storage().data_ptr() == memory.codes.untyped_storage().data_ptr()  # nothing is copied
    assert torch.equal(some.span(2, 5)[0], keys[1:3, 2:5]) and torch.equal(some.span(2, 5)[1], values[1:3, 2:5])
    slabs.release(1)
    slabs.check_integrity()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_in_int8_what_is_no_number_stays_none(bad: float) -> None:
    slabs = Slabs(1, 1, 1, 4, 8, rounded=True)
    written = torch.randn(2, 2, 8)
    written[0, 0, 3] = bad
    slabs.write(0, 0, 0, written)
    keys, values = slabs.read(0, 0).span(0, 2)
    assert not keys[0, 0].isfinite().any() and keys[0, 1].isfinite().all() and values.isfinite().all()
