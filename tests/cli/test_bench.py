"""`weft bench` as a user runs it: tables, files, errors, interruptions; nothing is left behind."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.test_namespaces import needs_namespaces, ours
from tests.processes import WEFT, weft

SMALL = ("--tokens", "64", "--threads", "1")


def test_table_and_files(tmp_path: Path) -> None:
    files = {option: tmp_path / f"out{suffix}" for option, suffix in
             (("--json", ".json"), ("--html", ".html"), ("--timeline", ".svg"))}  # fmt: skip
    written = [str(part) for pair in files.items() for part in pair]
    done = weft("bench", *SMALL, "--rounds", "2", "--overlap", "iso:2,rs,iso@20,40/30", *written, process=True)
    for part in ("64 tokens, 2 ranks, link none", "iso@20,40/30", "possible", "GFLOP/s a rank"):
        assert part in done.stdout
    assert "Best strategy of each point" in done.stdout or "there was next to nothing to hide" in done.stdout
    data = json.loads(files["--json"].read_text())
    assert data["complete"] and [run["overlap"] for run in data["runs"]] == ["serial", "iso:2", "rs", "iso@20,40/30"]
    assert data["machine"]["gemm_gflops"] > 0 and data["model"]["hidden"] == 256
    assert files["--html"].read_text().startswith("<!doctype html>")
    assert files["--timeline"].read_text().count("link none") == 3  # serial, predicted, best


def test_layers_of_sections(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--tp", "1", "--pp", "2", "--rounds", "1", "--overlap", "pipe:2", "--json", str(out))
    said = weft("bench", *SMALL, *options, "--layers", "1,5", process=True).stdout
    [_, uneven] = json.loads(out.read_text())["runs"]
    assert "2 ranks (tp 1 x pp 2, layers 1,5), link none" in said and uneven["layers"] == [1, 5]
    assert (uneven["ranks"], uneven["tp"], uneven["pp"]) == (2, 1, 2)
    weft("bench", *SMALL, *options, "--layers", "3,3", process=True)
    [_, even] = json.loads(out.read_text())["runs"]
    assert uneven["gflops"] * uneven["compute_alone"] > 1.5 * even["gflops"] * even["compute_alone"], (
        "of the larger one"
    )
    said = weft("bench", *SMALL, *options, "--layers", "9,9", code=2).stderr
    assert "--layers 9,9 does not go with --pp 2 and a model of 6 layers" in said
    assert "give them here" in weft("bench", *SMALL, *options, "--layers", "auto", code=2).stderr


def test_paced_links_need_nothing(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    done = weft(
        "bench", "--tokens", "256", "--threads", "1", "--link", "100mbit,1ms,1x", "--overlap", "iso:2", "--rounds", "2",
        "--json", str(out), "--plot", str(plot), process=True,
    )  # fmt: skip
    assert "link 100mbit,1ms" in done.stdout and "(1 x balance)" in done.stdout
    slow, _, balanced, _ = json.loads(out.read_text())["runs"]
    assert slow["link"] == "100mbit,1ms" and slow["serial_median"] > balanced["serial_median"]
    wire = slow["bytes_on_wire"] * 8 / 100e6
    assert wire < slow["network_alone"] < 2 * wire + 0.1 and plot.read_text().startswith("<svg")


@needs_namespaces
def test_shaped_links_and_the_devices_counters(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    done = weft(
        "bench", "--tokens", "512", "--threads", "1", "--link", "shaped:100mbit,shaped:1x", "--overlap", "iso:2",
        "--rounds", "2", "--json", str(out), "--plot", str(plot), process=True,
    )  # fmt: skip
    assert "(1 x balance)" in done.stdout and plot.read_text().startswith("<svg")
    slow, _, balanced, _ = json.loads(out.read_text())["runs"]
    rate = slow["bytes_on_wire"] * 8 / slow["network_alone"]
    assert 0.8e8 < rate < 1.1e8
    assert 0.4 < balanced["network_alone"] / balanced["compute_alone"] < 2.5
    for run in (slow, balanced):
        assert 1.0 <= run["bytes_on_device"] / run["bytes_on_wire"] <= 1.03
    assert ours() == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--tokens", "0"), "weft: --tokens 0 is not allowed"),
        (("--tokens", "many"), "weft: --tokens 'many' is not a list of whole numbers; write it like 512,2048"),
        (("--tokens", "512,,1024"), "weft: --tokens '512,,1024' has an empty entry"),
        (("--tokens", "99999"), "weft: --tokens 99999 is more than the model's context"),
        (("--link", "fast"), "weft: --link 'fast' is not a link: 'fast' isn't known there; write it like 500mbit"),
        (("--tp", "500"), "weft: --tp 500 with 1 thread a rank needs 500 cores"),
        (("--wire", "int3"), "weft: --wire 'int3' is not known; allowed: exact, bf16"),
        (("--overlap", "iso:2,magic"), "weft: --overlap 'magic' is not a strategy"),
        (("--json", "/nowhere/out.json"), "weft: --json /nowhere/out.json can't be written (No such file"),
        (("--timeline", "t.png"), "weft: --timeline t.png: give a name that ends in one of .json"),
        (("--plot", "p.svg"), "weft: --plot p.svg: give a name that ends in .svg, and at least two links"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], line: str) -> None:
    done = weft("bench", *arguments, code=2)
    assert done.stderr.strip().splitlines()[-1].startswith(line) and done.stdout == ""


def test_a_disk_that_is_full_at_the_end_loses_no_table(tmp_path: Path) -> None:
    """The report is larger than files may get here; the smaller .json is written all the same."""
    small, large = tmp_path / "out.json", tmp_path / "out.html"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    done = subprocess.run(
        [*WEFT, "bench", *SMALL, "--rounds", "1", "--overlap", "iso:2", "--html", str(large), "--json", str(small),
         "--link", "20gbit"],  # through sockets: memory to share is a file too
        capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 2 and "iso:2" in done.stdout
    assert "out.html can't be written (File too large); choose another file" in done.stderr
    assert json.loads(small.read_text())["complete"]


def interrupted(arguments: list[str], number: signal.Signals) -> tuple[int, str, list[psutil.Process]]:
    """A bench that is interrupted during its second point, when the file of the first is there."""
    out = Path(arguments[arguments.index("--json") + 1])
    process = subprocess.Popen([*WEFT, "bench", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert "Traceback" not in stderr
    return process.returncode, stdout, children


LATER = "64," + ",".join(str(2048 - number) for number in range(8))  # the first point is measured long before the last


@pytest.mark.parametrize(
    ("number", "link"),
    [
        (signal.SIGINT, "none"),
        pytest.param(signal.SIGINT, "50mbit", marks=needs_namespaces),
        pytest.param(signal.SIGTERM, "50mbit", marks=needs_namespaces),
    ],
)
def test_an_interruption_keeps_results_and_removes_everything(tmp_path: Path, number, link: str) -> None:
    out = tmp_path / "out.json"
    arguments = ["--tokens", LATER, "--threads", "1", "--rounds", "1", "--link", link, "--json", str(out)]
    code, stdout, children = interrupted(arguments, number)
    assert code == 130 and "64 tokens, 2 ranks" in stdout
    data = json.loads(out.read_text())
    assert data["complete"] is False and data["runs"][0]["tokens"] == 64
    assert psutil.wait_procs(children, timeout=5)[1] == []
    if link != "none":
        assert ours() == []


@needs_namespaces
def test_what_a_killed_bench_left_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, _, _ = interrupted(
        ["--tokens", "64,2048", "--threads", "1", "--rounds", "1", "--link", "shaped:50mbit", "--json", str(out)],
        signal.SIGKILL,
    )
    assert code == -signal.SIGKILL and len(ours()) == 2
    weft("bench", *SMALL, "--rounds", "1", "--link", "shaped:200mbit", "--overlap", "iso:2", process=True)
    assert ours() == []


def test_links_need_root() -> None:
    code = "import os; os.geteuid = lambda: 1000; from weft.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "--link", "shaped:100mbit"], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and ("a shaped link needs root" in done.stderr or "iproute2" in done.stderr)
