"""What a start leaves of its rounded weights, and what the next one makes of it."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from weft.formats import content
from weft.formats.content import content_of
from weft.formats.packed import Codes
from weft.model import kept_weights
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.kept_weights import KeptWeights
from weft.model.opening import open_model
from weft.model.shares import tensor_shares
from weft.model.weights import Weights, load


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for module in (content, kept_weights):
        monkeypatch.setattr(module, "user_cache_path", lambda name: tmp_path / "cache")
    return tmp_path / "cache"


def int8(rows: int = 6) -> Codes:
    return Codes(torch.randint(-127, 128, (rows, 64), dtype=torch.int8), torch.rand(rows, 1))


def int4(rows: int = 6) -> Codes:
    return Codes(torch.randint(0, 16, (rows, 64), dtype=torch.uint8), torch.rand(rows, 2), torch.rand(rows, 2))


def same(one: Codes | None, other: Codes) -> bool:
    return one is not None and all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip((one.codes, one.scales, one.offsets), (other.codes, other.scales, other.offsets), strict=True)
    )


def kept(key: str, whole: bool = True, **weights: Codes) -> None:
    writing = KeptWeights([key])
    for name, weight in weights.items():
        writing.put(name, weight)
    writing.close(whole)


def test_what_is_kept_is_found_again(cache: Path) -> None:
    one, other = int8(), int4(7)
    kept("a", first=one, second=other)
    found = KeptWeights(["a"])
    assert found.found and same(found.get("first", int8()), one) and same(found.get("second", int4(7)), other)
    assert found.get("third", int8()) is None
    assert found.get("first", int8(7)) is None and found.get("first", int4()) is None  # another form of the same
    assert not KeptWeights(["b"]).found
    [file] = (cache / "weights").glob("*.weights")
    assert file.stat().st_mode & 0o777 == 0o600 and (cache / "weights").stat().st_mode & 0o777 == 0o700
    assert file.stat().st_size < 6 * 64 + 7 * 32 + 1000  # a byte a number, or half of one


def test_nothing_half_written_is_believed(cache: Path) -> None:
    kept("a", whole=False, first=int8())
    assert not KeptWeights(["a"]).found
    assert not list((cache / "weights").glob("*.weights"))
    kept("a", first=int8())
    [file] = (cache / "weights").glob("*.weights")
    for broken in (file.read_bytes()[:-20], b"", b"\xff" * 400):
        file.write_bytes(broken)
        assert not KeptWeights(["a"]).found
    writing = KeptWeights(["c"])
    writing.put("first", int8())
    kept("c", whole=False, first=int8())
    assert not KeptWeights(["c"]).found  # another start, meanwhile
    writing.close(True)
    assert KeptWeights(["c"]).found
    assert not list((cache / "weights").glob("*.new"))


def test_what_changed_while_it_was_read_is_not_kept(cache: Path) -> None:
    writing = KeptWeights(["a"], lambda: False)
    writing.put("first", int8())
    writing.close(True)
    assert not KeptWeights(["a"]).found and list((cache / "weights").iterdir()) == []


def test_an_index_that_points_beyond_the_file(cache: Path) -> None:
    kept("a", first=int8())
    [file] = (cache / "weights").glob("*.weights")
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"start":0', b'"start":9'))
    found = KeptWeights(["a"]).get("first", int8())
    assert found is None or found.codes.shape == (6, 64)
    file.write_bytes(data[400:])
    assert KeptWeights(["a"]).get("first", int8()) is None


def test_a_full_disk_is_no_reason_to_stop(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = KeptWeights(["a"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_written", full)
    writing.put("first", int8())
    writing.put("second", int8())
    writing.close(True)
    assert list((cache / "weights").iterdir()) == []
    shutil.rmtree(cache)
    cache.write_text("not a directory")
    kept("a", first=int8())
    assert not KeptWeights(["a"]).found


def test_what_nobody_used_for_long_goes(cache: Path) -> None:
    kept("old", first=int8())
    [old] = (cache / "weights").iterdir()
    left = cache / "weights" / "x.123.new"
    left.write_bytes(b"half")
    for path in (old, left):
        os.utime(path, (0, time.time() - 61 * 24 * 3600))
    kept("new", first=int8())
    assert not old.exists() and not left.exists() and KeptWeights(["new"]).found


def test_content_is_what_files_hold(tmp_path: Path, packaged: Path, cache: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(packaged, one)
    told: list[tuple[int, int]] = []
    first = content_of(one, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == (one / "model.safetensors").stat().st_size
    shutil.copytree(one, other)
    assert content_of(other) == first  # wherever it is
    told.clear()
    assert content_of(one, lambda done, total: told.append((done, total))) == first and not told  # remembered
    with (one / "model.safetensors").open("r+b") as file:  # one byte in the middle, and the size stays
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(one / "model.safetensors")
    assert content_of(one) != first
    (cache / "hashes.json").write_text("[{")
    assert content_of(other) == first


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_second_load_is_the_first(packaged: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded() -> Weights:
        config = model_config(packaged)
        blueprint = blueprint_of(config)
        share = tensor_shares(blueprint, [1.0, 1.0])[1]
        with closing(open_model(packaged, config)) as checkpoint:
            return load(checkpoint, blueprint, share, weights=weights, kept=lambda part: KeptWeights([weights, part]))

    first = loaded()
    monkeypatch.setattr("weft.model.matrices.MatrixReader._put", lambda *_: pytest.fail("read again"))
    second, tokens = loaded(), torch.tensor([3, 5])
    assert torch.equal(first.embedding(tokens), second.embedding(tokens))
    rows = torch.randn(4, first.embedding(tokens).shape[1])
    assert torch.equal(first.head(rows), second.head(rows))
    for name, stage in first.stages.items():
        one, other = (each.branches[0].first for each in (stage, second.stages[name]))
        assert one is not None and other is not None and torch.equal(one(rows), other(rows))
