"""Memory as it is: what each machine has, and what a container's limit leaves of it."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from tests.processes import Command, free_port
from weft.admission import demand_memory, memory_tokens, weights_needed
from weft.config import EngineConfig
from weft.errors import InputError
from weft.execute.process import GROUPS, free_memory, machine_name
from weft.execute.protocol import Hello, Loaded
from weft.launch.keys import key_of
from weft.launch.launcher import VERSION
from weft.layout import Layout
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.shares import shard_bytes, shares_of

MIB = 1 << 20


def files(folder: Path, **content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    return folder


def limits(version: int, most: object, used: int, cached: int = 0) -> dict[str, object]:
    if version == 1:
        names, stat = ("memory__limit_in_bytes", "memory__usage_in_bytes"), f"total_inactive_file {cached}"
    else:
        names, stat = ("memory__max", "memory__current"), f"inactive_file {cached}"
    return {names[0]: most, names[1]: used, "memory__stat": f"cache 1\n{stat}"}


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_limit_above_a_process_counts(version: int, tmp_path: Path) -> None:
    root = tmp_path / "groups"
    top = root / "memory" if version == 1 else root
    own = files(tmp_path, cgroup="5:cpu:/x\n4:memory:/a/b" if version == 1 else "0::/a/b") / "cgroup"
    files(top / "a" / "b", **limits(version, 500 * MIB, 100 * MIB, 50 * MIB))
    files(top / "a", **limits(version, 700 * MIB, 600 * MIB, 100 * MIB))
    files(top, **limits(version, "max" if version == 2 else 1 << 62, 900 * MIB))
    assert free_memory(own, root) == 200 * MIB
    files(top / "a", **limits(version, "max" if version == 2 else 1 << 62, 600 * MIB))
    assert free_memory(own, root) == 450 * MIB
    files(top / "a" / "b", **limits(version, 100 * MIB, 130 * MIB))
    assert free_memory(own, root) == 0


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    own = files(tmp_path, cgroup="0::/docker/abc") / "cgroup"
    files(tmp_path / "groups", **limits(2, 300 * MIB, 100 * MIB))
    assert free_memory(own, tmp_path / "groups") == 200 * MIB


def test_without_groups_what_the_machine_has() -> None:
    assert free_memory(Path("/nowhere"), Path("/nowhere")) > 100 * MIB
    assert machine_name() == machine_name()


def test_who_takes_memory_from_the_same_is_one_machine(tmp_path: Path) -> None:
    """Two sessions of one machine, or of one container: a limit further in is its own."""
    groups = tmp_path / "groups"
    names = {}
    for session in ("one", "two"):
        own = tmp_path / session
        own.write_text(f"0::/slice/{session}\n")
        (groups / "slice" / session).mkdir(parents=True)
        names[session] = own
    assert machine_name(names["one"], groups) == machine_name(names["two"], groups)
    (groups / "slice" / "memory.max").write_text(str(900 * MIB))
    (groups / "slice" / "memory.current").write_text(str(100 * MIB))  # and no memory.stat
    assert machine_name(names["one"], groups) == machine_name(names["two"], groups)
    assert free_memory(names["one"], groups) == 800 * MIB
    (groups / "slice" / "memory.max").write_text("max")
    for session in names:
        (groups / "slice" / session / "memory.max").write_text(str(400 * MIB))
        (groups / "slice" / session / "memory.current").write_text("0")
    assert machine_name(names["one"], groups) != machine_name(names["two"], groups)


def hello(place: int, machine: str, free: int) -> Hello:
    return Hello(VERSION, place, "", f"host-{machine}", 1, "127.0.0.1", machine, free, 8)


def test_floats_of_a_quantised_checkpoint_count_as_floats(packaged: Path) -> None:
    """Whoever quantises with AWQ, GPTQ and their like leaves the embedding and the head as they were."""
    model = model_config(packaged)
    config = EngineConfig(Layout.tensor(model.layers, (1.0, 1.0)), weights="auto:int4")
    rounded = weights_needed(model, config)
    quantised = replace(model, fields={**model.fields, "quantization_config": {"quant_method": "awq"}})
    table = model.fields["vocab_size"] * model.fields["hidden_size"]  # whole on each rank, and tied
    for floats, few in zip(weights_needed(quantised, config), rounded, strict=True):
        assert few + 2 * table < floats < few + 4 * table
    assert weights_needed(quantised, replace(config, weights="int4")) == rounded, "asked for, all are rounded"


def test_each_machine_is_asked_for_its_own_ranks_only(packaged: Path) -> None:
    model = model_config(packaged)
    config = EngineConfig(Layout.tensor(model.layers, (1.0, 1.0, 2.0)))
    parts = [
        shard_bytes(blueprint_of(model), share, "float32") for share in shares_of(blueprint_of(model), config.layout)
    ]
    ranks = [hello(0, "a", parts[0] + parts[1]), hello(1, "a", parts[0] + parts[1]), hello(2, "b", parts[2])]
    demand_memory(model, config, ranks)
    with pytest.raises(InputError, match=r"for 2 of 3 ranks on host-a, and 0\.0 GiB are free there"):
        demand_memory(model, config, [hello(0, "a", parts[0]), *ranks[1:]])
    with pytest.raises(InputError, match="for 1 of 3 ranks on host-b"):
        demand_memory(model, config, [*ranks[:2], hello(2, "b", parts[2] - 1)])


def test_keys_and_values_fit_where_there_is_least_room() -> None:
    ranks = [hello(0, "a", 0), hello(1, "a", 0), hello(2, "b", 0)]
    loaded = [Loaded(0, 0, a_token, free) for a_token, free in ((10, 3000), (10, 2000), (40, 2000))]
    assert memory_tokens(ranks, loaded) == int(0.9 * 2000 / 40)
    assert memory_tokens(ranks[:2], loaded[:2]) == int(0.9 * 2000 / 20)


def memory_root() -> Path | None:
    """Where groups with a memory limit can be made, or None."""
    root = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    there = (root / "memory.limit_in_bytes").is_file() or "memory" in _text(root / "cgroup.subtree_control")
    return root if there and os.access(root, os.W_OK) else None


def _text(path: Path) -> str:
    return path.read_text("ascii") if path.is_file() else ""


@contextmanager
def limited(mebibytes: int) -> Iterator[Sequence[str]]:
    """A group with a limit of memory: what goes before a command that runs in it."""
    root = memory_root()
    assert root is not None
    group = root / f"weft-test-{secrets.token_hex(4)}"
    group.mkdir()
    name = "memory.limit_in_bytes" if root.name == "memory" else "memory.max"
    (group / name).write_text(str(mebibytes * MIB))
    try:
        yield "sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"
    finally:
        for number in _text(group / "cgroup.procs").split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        end = time.monotonic() + 20
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                assert time.monotonic() < end, "a process stays in the group"
                time.sleep(0.05)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 780 MiB in float32, half of that on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("large") / "llama"
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632,
        vocab_size=256, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


needs_groups = pytest.mark.skipif(memory_root() is None, reason="needs root, and control groups with memory limits")
SIDE = 850  # MiB: enough for the engine, a rank and half of the model; not for all of it


@needs_groups
def test_more_than_a_containers_limit_is_refused_before_the_kernel_kills(large: Path) -> None:
    with limited(SIDE) as before, Command("serve", str(large), "--port", "0", before=before) as server:
        assert server.child.wait(60) == 2
        assert "GiB in float32 for 1 ranks on" in server.said and "GiB are free there" in server.said


@needs_groups
def test_a_model_that_fits_only_over_two_machines_starts(large: Path) -> None:
    port = free_port()
    secret = "a secret between us"
    with (
        limited(SIDE) as here, limited(SIDE) as there,
        Command("worker", "--join", f"127.0.0.1:{port}", before=there, WEFT_TOKEN=key_of(secret).token),
        Command("serve", str(large), "--tp", "2", "--overlap", "serial", "--port", "0", "--threads", "1",
                "--join-address", f"127.0.0.1:{port}", before=here, WEFT_TOKEN=secret) as server,
    ):  # fmt: skip
        said = server.until("for OpenAI's clients", 120)
        url = said[said.rindex("http://") :].split()[0].rstrip("/")
        asked = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
        answer = httpx2.post(f"{url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4


def test_replicas_of_one_machine_share_what_is_free() -> None:
    weights, whole = 100, 1000

    def tokens(replica: int, replicas: int) -> int:  # of one rank a replica, loaded one after the other
        one, loaded = hello(0, "a", whole), Loaded(0, 0, 1, whole - (replica + 1) * weights)
        return memory_tokens([one], [loaded], replicas, [(replicas - 1 - replica) * weights], [0])

    for replicas in (2, 3, 4):
        each = [tokens(replica, replicas) for replica in range(replicas)]
        assert len(set(each)) == 1, "all have as much"
        assert 0 < sum(each) <= 0.9 * (whole - replicas * weights)
    elsewhere = memory_tokens([hello(0, "a", whole)], [Loaded(0, 0, 1, 900)], 2, [100], [])
    assert elsewhere == int(0.9 * 900), "what is free on another machine isn't shared"
