"""`weft generate` as a user runs it: output, errors, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import WEFT, weft
from tests.tiny import Checkpoints


def test_text_and_what_it_achieved() -> None:
    done = weft(
        "generate", "The for statement is used to", "--tp", "2", "--overlap", "iso:2", "--threads", "1",
        "--max-tokens", "12", "--temperature", "0", "--compare", process=True,
    )  # fmt: skip
    assert len(done.stdout.strip()) > 10
    for part in ("first token after", "tokens/s", "iso:2 · attention", "bound", "serial", "rank 1 network"):
        assert part in done.stderr
    assert "overlap efficiency" in done.stderr or "next to nothing to hide" in done.stderr


def test_auto_explains_itself() -> None:
    """The default: the plan, what it is predicted to take, serial's time and the bound."""
    done = weft("generate", "--tp", "2", "--threads", "1", "--max-tokens", "3", "--seed", "1", text="import os\n" * 60)
    for part in ("plan", "predicted", "serial", "bound", " ms"):
        assert part in done.stderr
    result = json.loads(weft("generate", "--json", "--tp", "2", "--threads", "1", "--max-tokens", "3", "--seed", "1",
                             "--recalibrate", text="import os\n" * 60).stdout)  # fmt: skip
    assert 0 < result["predicted"]["bound"] <= result["predicted"]["serial"]
    assert "calibration" in weft("doctor").stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layout", "auto"), "--layout auto: not used, as one rank has all of the model"),
        (("--optimise", "throughput"), "--optimise throughput: not used without --layout auto"),
        (("--tp", "2", "--overlap", "pipe:2"), "--overlap pipe:2: pieces hide nothing in one section of layers"),
        (("--pp", "2", "--overlap", "iso:2"), "--overlap iso:2: sections of one rank have no sums to hide"),
        (("--pp", "2", "--layers", "2,4"), "tp 1 x pp 2, layers 2,4"),
    ],
)
def test_what_makes_no_difference_is_said_and_sections_are(options: tuple[str, ...], said: str) -> None:
    done = weft("generate", "Once", "--max-tokens", "2", "--threads", "1", *options)
    assert said in " ".join(done.stderr.split())


def test_json_and_timeline(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    done = weft(
        "generate", "--json", "--max-tokens", "5", "--tp", "2", "--threads", "1", "--timeline", str(path),
        "--overlap", "iso:2/4", "--seed", "3", text="import os\n" * 20,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["prompt"].startswith("import os") and len(result["token_ids"]) <= 5
    comparison = result["comparison"]
    assert comparison["tokens"] == result["prompt_tokens"]
    assert comparison["bound"] >= 0.99 * max(comparison["compute_alone"], comparison["network_alone"])
    assert len(comparison["seconds"]) == 5 and comparison["bytes_on_wire"] > 0
    drawn = weft("timeline", str(path), "--width", "60").stdout
    assert "rank 1 network" in drawn and "% of the communication is hidden" in " ".join(drawn.split())
    picture = tmp_path / "t.svg"
    weft("timeline", str(path), str(path), "--out", str(picture))
    assert picture.read_text().count("iso:2/4, wire exact") == 2
    assert "t.png: give a name that ends in one of .svg" in weft("timeline", str(path), "--out", "t.png", code=2).stderr


def test_the_same_seed_at_any_number_of_ranks() -> None:
    def tokens(ranks: str) -> list[int]:
        run = weft(
            "generate", "def area(", "--json", "--seed", "5", "--max-tokens", "16", "--tp", ranks, "--threads", "1"
        )
        return json.loads(run.stdout)["token_ids"]

    assert tokens("1") == tokens("2")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--overlap", "magic"), "weft: --overlap 'magic' is not a strategy; allowed: auto, serial, iso"),
        (("--wire", "int3"), "weft: --wire 'int3' is not known; allowed: exact, bf16"),
        (("--tp", "0"), "weft: --tp 0 is not allowed"),
        (("--tp", "2", "--shares", "a,b"), "weft: --shares 'a,b' is not a list of numbers"),
        (("--temperature", "-1"), "weft: temperature -1.0 is not allowed; give a number from 0 to 100"),
        (("--max-tokens", "0"), "weft: max_tokens 0 is not allowed"),
        (("--timeline", "x.png"), "weft: --timeline x.png: give a name that ends in one of .json"),
    ],
)
def test_options_that_are_not_allowed(arguments: tuple[str, ...], line: str) -> None:
    done = weft("generate", "hello", *arguments, code=2)
    assert done.stderr.strip().splitlines()[-1].startswith(line) and done.stdout == ""


def test_unknown_options_are_refused() -> None:
    assert "No such option" in weft("generate", "hello", "--fast", code=2).stderr


def test_prompts_that_can_not_be_run() -> None:
    assert "the prompt is empty" in weft("generate", text="", code=2).stderr
    assert "the context holds 2048" in weft("generate", text="import os\n" * 3000, code=2).stderr


def test_models_that_can_not_be_run(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert "is not a directory; give" in weft("generate", "./nowhere", "hi", code=2).stderr
    assert "config.json is missing" in weft("generate", str(tmp_path), "hi", code=2).stderr
    assert "has no tokenizer" in weft("generate", str(checkpoints.directory("llama")), "hi", code=2).stderr
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    assert (
        "MambaForCausalLM (mamba) is not known; its configuration says too little"
        in weft("generate", str(tmp_path), "x", code=2).stderr
    )


def test_more_ranks_than_cores_is_a_warning() -> None:
    many = str(len(os.sched_getaffinity(0)) + 1) if hasattr(os, "sched_getaffinity") else "65"
    done = weft("generate", "hello", "--tp", many, "--max-tokens", "2", "--threads", "1")
    assert f"warning: {many} ranks share" in done.stderr


def started(writing: bool) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """`weft generate` with its two workers: while they start, or while text is written."""
    process = subprocess.Popen(
        [*WEFT, "generate", "hello", "--tp", "2", "--threads", "1", "--max-tokens", "1900"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline, children = time.monotonic() + 30, []
    while len(children) < 2 and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    assert len(children) == 2
    if writing:
        assert process.stdout is not None and process.stdout.read(1)
    return process, children


@pytest.mark.parametrize("writing", [False, True])
def test_ctrl_c_leaves_no_process_and_no_traceback(writing: bool) -> None:
    process, children = started(writing)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.parametrize("writing", [False, True])
def test_workers_end_with_a_killed_engine(writing: bool) -> None:
    process, children = started(writing)
    process.kill()
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{' '.join(WEFT)} generate 'hello' --max-tokens 400 --threads 1 --seed 1 | head -c 20"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
