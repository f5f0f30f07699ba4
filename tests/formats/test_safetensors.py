"""Checkpoints as users have them, whole and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import Checkpoints
from weft.errors import InputError
from weft.execute.process import Peak
from weft.formats.safetensor import SafetensorsCheckpoint
from weft.model.description import generation_defaults, model_config
from weft.model.families import blueprint_of
from weft.model.kernels.choice import Kernels
from weft.model.kernels.floats import PlainProduct
from weft.model.kernels.linear import Linear, Stored
from weft.model.shares import tensor_shares
from weft.model.weights import load

MAPS = Path("/proc/self/maps")

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def copy(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoints.directory("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """The same in several files with an index."""
    checkpoints.model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def load_all(directory: Path) -> None:
    blueprint = blueprint_of(model_config(directory))
    load(SafetensorsCheckpoint(directory), blueprint, tensor_shares(blueprint, (1.0,))[0])


def test_reads_rows_and_columns_of_single_and_sharded_files(checkpoints, copy: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = checkpoints.model("llama").state_dict()[NAME]
    for directory in (copy, sharded):
        checkpoint = SafetensorsCheckpoint(directory)
        assert torch.equal(checkpoint.read(NAME).values, expected)
        assert torch.equal(checkpoint.read(NAME, rows=range(3, 9)).values, expected[3:9])
        assert torch.equal(checkpoint.read(NAME, columns=range(5, 50)).values, expected[:, 5:50])
        assert checkpoint.shape(NAME) == list(expected.shape)
        load_all(directory)


def test_missing_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is missing"):
        load_all(copy)


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"can't be read as JSON"):
        load_all(copy)


@pytest.mark.parametrize("keep", [0, 6, 5000, -7])
def test_truncated_file(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="model.safetensors is truncated or corrupt"):
        load_all(copy)


def test_corrupt_header(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:30] = b"\xff" * 22
    path.write_bytes(data)
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_all(copy)


def test_shard_missing_from_the_directory(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=f"{victim.name} is missing, but model.safetensors.index.json names it"):
        load_all(sharded)


def test_tensor_missing_from_the_index(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][NAME]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"no tensor '{NAME}'"):
        load_all(sharded)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": ["x"]}}', "[" * 100_000, '{"weight_map": ' * 50_000],
    ids=range(9),
)  # fmt: skip
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="index.json can't be read"):
        load_all(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize("inner", ["[]", "0" * 50])
def test_json_of_nothing_but_entries(sharded: Path, name: str, inner: str) -> None:
    """Some bytes each, and far more in memory."""
    (sharded / name).write_text('{"weight_map": {}, "a": [' + f"{inner}," * 600_000 + "0]}")
    with Peak() as peak:
        if name == "generation_config.json":
            assert "left out" in generation_defaults(sharded)[1][0]
        else:
            with pytest.raises(InputError, match="which no model needs"):
                load_all(sharded)
    assert peak.taken < 100 << 20


def test_an_index_can_not_point_out_of_the_directory(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for elsewhere in ("../../secret.safetensors", "", "."):
        index["weight_map"][NAME] = elsewhere
        path.write_text(json.dumps(index))
        with pytest.raises(InputError, match="not a file of this directory|is missing"):
            load_all(sharded)


def test_pickle_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle .* weft reads safetensors"):
        load_all(copy)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        load_all(copy)


def test_shapes_that_are_not_the_configurations(copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
    with pytest.raises(InputError, match=r"gate_proj.weight has the shape \[80, 48\], but the configuration calls for"):
        load_all(copy)


@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen3"])
def test_a_norm_is_folded_before_anything_is_rounded(checkpoints: Checkpoints, name: str) -> None:
    """bfloat16 weights are the float32 ones, rounded once: two roundings cost up to 0.6% an entry."""
    directory = checkpoints.directory(name)
    blueprint = blueprint_of(model_config(directory))
    share = tensor_shares(blueprint, (1.0,))[0]

    class Plainly(Kernels):
        """Packs nothing."""

        def linear(self, weight: Stored, bias_W: torch.Tensor | None = None, shared: bool = False) -> Linear:
            return PlainProduct(weight, bias_W)

    exact, rounded = (
        load(SafetensorsCheckpoint(directory), blueprint, share, dtype=dtype, kernels=Plainly())
        for dtype in (torch.float32, torch.bfloat16)
    )
    for stage, fine in exact.stages.items():
        pairs = zip(fine.branches, rounded.stages[stage].branches, strict=True)
        for one, other in (each for pair in pairs for each in zip(*(vars(p).values() for p in pair), strict=True)):
            left, right = (getattr(each, "weight", each) for each in (one, other))
            assert (left is None and right is None) or torch.equal(left.to(torch.bfloat16), right)
    assert torch.equal(exact.gain.scale.to(torch.bfloat16), rounded.gain.scale)


@pytest.mark.skipif(not MAPS.is_file(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("name", ["llama", "llama-biased-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_loaded_keeps_no_file_mapped(checkpoints: Checkpoints, name: str, ranks: int) -> None:
    """A mapped file's pages count as the process's memory, those of packed matrices a second time."""
    directory = checkpoints.directory(name)
    blueprint = blueprint_of(model_config(directory))
    weights = load(SafetensorsCheckpoint(directory), blueprint, tensor_shares(blueprint, [1.0] * ranks)[0])
    assert weights.stages and str(directory) not in MAPS.read_text()


def test_matrices_begin_on_a_cache_line_wherever_they_do_in_the_file(checkpoints: Checkpoints) -> None:
    """Else what --reproducible gives would change with who allocates them."""
    for name in ("llama", "qwen2", "qwen3"):
        checkpoint = SafetensorsCheckpoint(checkpoints.directory(name))
        blueprint = blueprint_of(model_config(checkpoint.path))
        read = checkpoint.read(f"{blueprint.embedding.name}.weight").values
        weights = load(SafetensorsCheckpoint(checkpoint.path), blueprint, tensor_shares(blueprint, [1.0])[0])
        assert torch.equal(weights.embedding.stored, read) and weights.embedding.stored.is_contiguous()
        assert weights.embedding.stored.data_ptr() % 64 == 0
