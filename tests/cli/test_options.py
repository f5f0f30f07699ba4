"""Options that users of other engines type, models that are none, and texts of any bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.launch.test_joined import SECRET, joining
from tests.processes import WEFT, Command, free_port, weft
from weft.cli.options import ELSEWHERE
from weft.launch.keys import new_key

HARDWARE = "--hardware", "2x rtx4090", "--tokens", "128"


def test_version() -> None:
    assert weft("--version", process=True).stdout == f"weft {version('weft')}\n"


@pytest.mark.parametrize("option", sorted(ELSEWHERE))
def test_options_of_other_engines_lead_to_ours(option: str) -> None:
    command = "generate" if option == "--replicas" else "serve"  # which has that one
    said = weft(command, f"{option}=1", code=2).stderr
    assert said.startswith(f"weft: {option} is not an option here: ") and said.count("\n") == 1


def test_names_that_vllms_users_type(packaged: Path) -> None:
    said = weft("generate", "--tensor-parallel-size", "2", "--dtype", "bfloat16", "--max-tokens", "4", "def main(",
                "--overlap", "serial", "--threads", "1", process=True).stderr  # fmt: skip
    assert "answer" in said and "4 tokens" in said
    wrong = weft("generate", "--dtype", "int8", "def main(", code=2, process=True).stderr
    assert wrong == "weft: --dtype 'int8' is not known; allowed: float32, bfloat16\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.gguf", "x.gguf is missing; give a .gguf file"), ("dir/x.Q4_K_M.GGUF", "is missing; give a .gguf file"),
     ("someone/model-GGUF:Q4_K_M", "not in the hub's cache")],
)  # fmt: skip
@pytest.mark.parametrize("command", [("generate",), ("serve",), ("bench",), ("plan", *HARDWARE), ("doctor",)])
def test_gguf_that_is_not_there(command: tuple[str, ...], name: str, said: str, tmp_path: Path) -> None:
    given = [command[0], name, *(["def main("] if command[0] == "generate" else []), *command[1:]]
    assert said in weft(*given, code=2).stderr
    if ":" not in name:
        there = tmp_path / Path(name).name
        there.write_bytes(b"GGUF")
        assert "is no GGUF file" in weft(command[0], str(there), *given[2:], code=2).stderr


def test_what_weights_are_kept_in(packaged: Path) -> None:
    said = "--weights 'q4' is not known; allowed: auto, float32, bfloat16, int8, int4"
    assert said in weft("generate", "--weights", "q4", "def main(", code=2).stderr
    weft("generate", "--weights", "int8", "--max-tokens", "1", "--threads", "1", "def main(")


def test_a_configuration_of_any_name_is_enough_for_a_plan(packaged: Path, tmp_path: Path) -> None:
    other = shutil.copy(packaged / "config.json", tmp_path / "llama-70b.json")
    assert (
        weft("plan", str(other), *HARDWARE, "--json").stdout == weft("plan", str(packaged), *HARDWARE, "--json").stdout
    )
    wrong = tmp_path / "notes.txt"
    wrong.write_text("no configuration")
    assert "can't be read as JSON" in weft("plan", str(wrong), *HARDWARE, code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [("generate", "\udcff"), ("generate", "a\udcff/b", "x"), ("serve", "\udcff"), ("chat", "a\0b"), ("bench", ""),
     ("serve", "--served-model-name", "\udcff"), ("serve", "--api-key", "\udcff"), ("plan", "no-such.json", *HARDWARE),
     ("generate", "caf\udce9"), ("serve", "nobody/nothing", "--dtype", "float16"), ("serve", "-tp", "2"),
     ("serve", "--swap_space", "4"),
     ("timeline", "\udcff"), ("plan", "\udcff", *HARDWARE), ("serve", "--host", "\udcff", "--allow-anyone"),
     ("serve", "--host", "no.such.host.invalid", "--allow-anyone"), ("serve", "--allow-origin", "http://a/b"),
     ("serve", "--tp", "2", "--join-address", "no.such.host.invalid:7000")],
)  # fmt: skip
def test_texts_that_can_not_be_used_are_one_line(arguments: tuple[str, ...]) -> None:
    said = weft(*arguments, code=2).stderr
    assert said.startswith("weft: ") and said.count("\n") == 1


def test_a_terminal_that_can_show_ascii_only_is_no_reason_to_end() -> None:
    command = [*WEFT, "generate", "caf", "--json", "--max-tokens", "1", "--threads", "1"]
    ascii_only = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, timeout=60, env=ascii_only, check=False)
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr


def test_nothing_is_printed_before_the_model_was_found() -> None:
    said = weft("serve", "/no/such/model", "--tp", "2", "--join-address", f"127.0.0.1:{free_port()}", "--port", "0",
                code=2, process=True).stderr  # fmt: skip
    assert said.startswith("weft: /no/such/model is not a directory") and said.count("\n") == 1


def test_the_line_to_run_elsewhere_says_where_the_model_comes_from(packaged: Path, tmp_path: Path) -> None:
    model = shutil.copytree(packaged, tmp_path / "a model")
    port = free_port()
    with Command("serve", str(model), "--tp", "2", "--join-address", f"localhost:{port}", "--port", "0") as server:
        server.until(f"weft worker --join localhost:{port}")
        server.until("without the model it comes from here")


def test_a_server_that_waits_for_a_machine_ends_at_the_first_signal(packaged: Path) -> None:
    port = free_port()
    with Command(
        "serve", "--tp", "2", "--join-address", f"127.0.0.1:{port}", "--port", "0", WEFT_TOKEN=SECRET
    ) as server:
        server.until("waiting for 1 more machine")
        server.child.terminate()
        assert server.child.wait(10) == 0, server.said
        assert "Traceback" not in server.said and "does not start" not in server.said


def test_a_worker_without_an_answer_says_which(packaged: Path) -> None:
    port = free_port()
    with (
        joining(free_port()) as alone,
        Command(
            "serve", "--tp", "2", "--join-address", f"127.0.0.1:{port}", "--port", "0", WEFT_TOKEN=SECRET
        ) as server,
        joining(port, new_key().token) as machine,
    ):
        server.until("waiting for 1 more machine")
        machine.until("WEFT_TOKEN is not the one", 30)
        alone.until("no server answers at 127.0.0.1", 30)
