"""A machine that has not got the model: what it lacks of its part comes from the engine's, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.formats.test_gguf import mixed, written
from tests.launch.test_joined import SECRET, TOKEN
from tests.processes import Command, free_port
from weft import LLM, SamplingParams
from weft.execute import sending
from weft.formats.fingerprint import Wanted, WeightFile, cut_out
from weft.launch.hub import Hub
from weft.launch.joined import JoinedLauncher


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs a directory that only one process has")
def test_what_a_machine_lacks_comes_from_the_engines_once(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own part of it."""
    shutil.copytree(packaged, tmp_path / "model")
    port, asked, cache = free_port(), list[int](), tmp_path / "cache"
    said: list[str] = []
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET, said.append), 1)

    def counted(directory: Path, files: list[WeightFile], wanted: Wanted) -> bytes:
        asked.append(wanted.length * wanted.times)
        return cut_out(directory, files, wanted)

    monkeypatch.setattr(sending, "cut_out", counted)
    params, answers = SamplingParams(temperature=0, max_tokens=12), []
    with Command("worker", "--join", f"127.0.0.1:{port}", WEFT_TOKEN=TOKEN, XDG_CACHE_HOME=str(cache)) as machine:
        monkeypatch.chdir(tmp_path)  # not that machine's
        options = {"tensor_parallel_size": 2, "num_threads": 1, "launcher": launcher, "overlap": "serial"}
        with LLM("/proc/self/cwd/model", **options) as llm:
            answers.append(llm.generate("def main(", params)[0].outputs[0].token_ids)
            [kept] = cache.glob("weft/checkpoints/*/model.safetensors")
            size, first = (packaged / "model.safetensors").stat().st_size, sum(asked)
            assert kept.stat().st_size == size and 0.3 * size < first < 0.8 * size
            machine.until("MB fetched in ")
            assert any("fetches its part of it from here" in line for line in said)
            llm.engine.workers.restart(RuntimeError("once more"))
            answers.append(llm.generate("def main(", params)[0].outputs[0].token_ids)
    assert sum(asked) == first
    with LLM(packaged, num_threads=1) as llm:
        assert answers == [llm.generate("def main(", params)[0].outputs[0].token_ids] * 2


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs a directory that only one process has")
def test_a_gguf_model_comes_from_the_engines_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the machine has the file, that is used."""
    path = written(tmp_path / "tiny.gguf", "llama", mixed)
    params, answers = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), []
    for given in ((), (str(path),)):
        monkeypatch.chdir("/")
        port, cache = free_port(), tmp_path / f"cache{len(given)}"
        launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 1)
        variables = {"WEFT_TOKEN": TOKEN, "XDG_CACHE_HOME": str(cache)}
        with Command("worker", "--join", f"127.0.0.1:{port}", *given, **variables) as machine:
            monkeypatch.chdir(tmp_path)  # not that machine's
            options = {"tensor_parallel_size": 2, "num_threads": 1, "launcher": launcher, "overlap": "serial"}
            with LLM("/proc/self/cwd/tiny.gguf", **options) as llm:
                answers.append(llm.generate("some text", params)[0].outputs[0].token_ids)
                machine.until("is the server's, by its files'" if given else "MB fetched in ")
        assert bool([*cache.glob("weft/checkpoints/*/tiny.gguf")]) == (not given)
    with LLM(path, num_threads=1) as llm:
        assert answers == [llm.generate("some text", params)[0].outputs[0].token_ids] * 2
