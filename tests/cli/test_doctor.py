"""`weft doctor`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.formats.test_gguf import mixed, written
from tests.formats.test_quantised import saved
from tests.processes import weft
from tests.tiny import Checkpoints
from weft.cli.doctor import _tcp


def test_says_what_there_is_and_what_it_is_for() -> None:
    done = weft("doctor")
    for part in ("cores", "memory", "kernels", "gloo", "GPU", "shaped links", "hub", "calibration"):
        assert part in done.stdout


def test_json() -> None:
    findings = json.loads(weft("doctor", "--json").stdout)["findings"]
    assert {"what", "ok", "value", "meaning"} == set(findings[0])
    assert {finding["what"] for finding in findings} >= {"cores", "kernels, int8", "shaped links"}


def test_what_the_system_does_to_connections(tmp_path: Path) -> None:
    assert _tcp(tmp_path) == []  # a system that doesn't say
    (tmp_path / "tcp_wmem").write_text("4096\t16384\t4194304\n")
    for slow, ok in (("1\n", False), ("0\n", True)):
        (tmp_path / "tcp_slow_start_after_idle").write_text(slow)
        pauses, buffers = _tcp(tmp_path)
        assert pauses.ok is ok and ("sysctl -w" in pauses.meaning) is not ok
        assert buffers.value == "4 MiB" and "up to 3.4 Gbit/s" in buffers.meaning


def test_help_has_examples() -> None:
    for command in ("generate", "doctor"):
        assert f"weft {command}" in weft(command, "--help").stdout
    assert "generate" in weft("--help").stdout


def test_what_a_gguf_model_is(tmp_path: Path) -> None:
    path = written(tmp_path / "tiny.Q8_0.gguf", "llama", mixed)
    said = json.loads(weft("doctor", str(path), "--tp", "2", "--json").stdout)
    found = {finding["what"]: finding for finding in said["findings"]}
    assert said["model"] == str(path) and all(finding["ok"] for finding in said["findings"])
    assert "tiny.Q8_0.gguf" in found["model"]["value"] and found["model"]["meaning"] == "GGUF, architecture llama"
    assert (
        "Q4_K" in found["stored"]["value"]
        and found["stored"]["meaning"] == "computed in float32; 8 bits kept in int8, 4 in int4 or int8, if faster"
    )
    assert found["family"]["value"].startswith("llama: 2 layers of 256, 8 heads over 2")
    assert "GiB a rank" in found["weights, --tp 2"]["value"] and found["end tokens"]["value"] == "<end>"
    assert found["chat template"]["value"] == "yes" and found["tokenizer"]["value"] == "BPE, 258 tokens"
    half = json.loads(weft("doctor", str(path), "--dtype", "bfloat16", "--json").stdout)["findings"]
    assert any(
        finding["meaning"] == "computed in bfloat16; 8 bits kept in int8, 4 in int4 or int8, if faster"
        for finding in half
    )


def test_what_a_quantised_checkpoint_is(tmp_path: Path) -> None:
    saved(tmp_path / "tiny", "gptq-4")
    said = " ".join(weft("doctor", str(tmp_path / "tiny")).stdout.split())
    assert "gptq, 4 bits" in said and "prompts as token ids only" in said


def test_what_is_missing_is_said_before_anything_is_loaded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    shutil.copytree(checkpoints.directory("llama"), tmp_path / "tiny")
    tensors = load_file(tmp_path / "tiny" / "model.safetensors")
    gone, cut = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    del tensors[gone]
    tensors[cut] = tensors[cut][:-1].clone()
    save_file(tensors, tmp_path / "tiny" / "model.safetensors")
    said = json.loads(weft("doctor", str(tmp_path / "tiny"), "--json", code=1).stdout)["findings"]
    [line] = [finding for finding in said if finding["what"] == "tensors"]
    assert not line["ok"] and line["value"] == f"1 missing: {gone}; 1 not as the configuration says: {cut}"


def test_a_tokenizer_that_is_not_known_is_one_line_of_the_report(tmp_path: Path) -> None:
    path = written(tmp_path / "tiny.gguf", "llama", "Q8_0")
    data = path.read_bytes()
    assert data.count(b"gpt-2") == 1
    path.write_bytes(data.replace(b"gpt-2", b"gpt-x"))
    said = json.loads(weft("doctor", str(path), "--json", code=1).stdout)["findings"]
    [line] = [finding for finding in said if finding["what"] == "tokenizer"]
    assert not line["ok"] and "'gpt-x', which is not known" in line["meaning"]
    assert any(finding["what"] == "tensors" and finding["ok"] for finding in said)


def test_models_that_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(100))
    assert "is no GGUF file" in weft("doctor", str(tmp_path / "x.gguf"), code=2).stderr
    assert "is not a directory" in weft("doctor", "./nowhere", code=2).stderr
    assert "wants a number of ranks" in weft("doctor", str(tmp_path / "x.gguf"), "--tp", "auto", code=2).stderr
