"""Shaped links between network namespaces: real ones, where this machine allows them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest

from weft import LLM, InputError, SamplingParams
from weft.compare import compare
from weft.launch import namespaces
from weft.launch.namespaces import NamespaceLauncher

possible = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
needs_namespaces = pytest.mark.skipif(not possible, reason="needs root and iproute2")


def ours() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith("weft-")]


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs ip and tc; install the package iproute2"):
        NamespaceLauncher(100e6)
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="needs root"):
        NamespaceLauncher(100e6)


@needs_namespaces
def test_a_shaped_pair_is_as_fast_as_said_and_bytes_agree(packaged) -> None:
    """Network alone takes what the line rate says; the program's count of bytes is the kernel's to 3%."""
    launcher = NamespaceLauncher(40e6)
    with LLM(packaged, tensor_parallel_size=2, num_threads=1, launcher=launcher, overlap="serial") as llm:
        tokens = [n % 1000 for n in range(512)]
        compare(llm.engine, tokens, ["iso:2"], rounds=1)  # connections are made
        before = launcher.sent()[0]
        _, measured = compare(llm.engine, tokens, ["iso:2"], rounds=2)
        on_device = launcher.sent()[0] - before
        runs = 4  # serial, iso:2, the messages alone and what their threads take beside a computation
        counted = measured.bytes_on_wire * runs * 3  # a warm-up and two rounds
        assert on_device == pytest.approx(counted, rel=0.03)
        assert measured.bytes_on_wire >= 10 * 512 * 256 * 4  # of the last layer, the wanted row alone
        by_line_rate = measured.bytes_on_wire * 8 / 40e6
        assert by_line_rate * 0.9 < measured.network_alone < by_line_rate * 1.5
    assert ours() == []


@needs_namespaces
def test_three_machines_and_a_change_of_speed(packaged) -> None:
    launcher = NamespaceLauncher(None)
    with LLM(packaged, tensor_parallel_size=3, num_threads=1, launcher=launcher, overlap="serial") as llm:
        assert len(ours()) == 4  # three ranks and the bridge
        params = SamplingParams(temperature=0, max_tokens=8)
        free = llm.generate("import os\n", params)[0].outputs[0].token_ids
        launcher.shape(20e6)
        assert llm.generate("import os\n", params)[0].outputs[0].token_ids == free
    assert ours() == []


@needs_namespaces
def test_leftovers_of_a_killed_run_are_removed(packaged) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    time.sleep(0.05)
    subprocess.run(["ip", "netns", "add", f"weft-{gone.pid}-0"], check=True)
    subprocess.run(["ip", "netns", "add", "weft-1-0"], check=True)  # process 1 lives: not a leftover
    try:
        with LLM(packaged, num_threads=1, launcher=NamespaceLauncher(None)) as llm:
            assert llm.generate("x", SamplingParams(max_tokens=2))[0].finished
            assert f"weft-{gone.pid}-0" not in ours() and "weft-1-0" in ours()
    finally:
        subprocess.run(["ip", "netns", "delete", "weft-1-0"], check=True)
    assert ours() == []
