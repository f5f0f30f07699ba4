"""Checkpoints of another machine: what is read comes over once, in pieces, and is what is there."""

from __future__ import annotations

import random
import shutil
import threading
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from tests.formats.test_gguf import mixed, written
from tests.formats.test_quantised import saved
from weft.errors import InputError
from weft.formats import fetched
from weft.formats.checkpoint import open_checkpoint
from weft.formats.fetched import Fetch, FetchedFiles
from weft.formats.fingerprint import Wanted, WeightFile, cut_out, demand_same, fingerprint
from weft.formats.gguf.tensors import GgufCheckpoint
from weft.formats.safetensor import SafetensorsCheckpoint
from weft.model.description import model_config
from weft.model.gguf import ARCHITECTURES

TENSORS = {
    "model.a": torch.randn(40, 30),
    "model.b": torch.randn(64, 17).to(torch.bfloat16),
    "model.c": torch.arange(9),
    "model.d": torch.randn(5, 4, 3),
    "model.none": torch.empty(0, 8),
}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    directory = tmp_path / "there"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    return directory


class Counting:
    """The other machine, which counts what it sends."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.files, self.asked = directory, fingerprint(directory), list[Wanted]()

    def __call__(self, wanted: Wanted) -> bytes:
        self.asked.append(wanted)
        return cut_out(self.directory, self.files, wanted)


class FetchedCheckpoint(SafetensorsCheckpoint):
    """Of files that come from elsewhere."""

    def __init__(self, files: list[WeightFile], fetch: Fetch, cache: Path) -> None:
        self.there = FetchedFiles(files, fetch, cache)
        super().__init__(self.there.directory, self.there.bring)

    def close(self) -> None:
        super().close()
        self.there.close()


@pytest.mark.parametrize("piece", [1, 37, 256, 4 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_read_is_what_is_there(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, seed: int
) -> None:
    monkeypatch.setattr(fetched, "PIECE", piece)
    real, other, draw = SafetensorsCheckpoint(there), Counting(there), random.Random(seed)
    here = FetchedCheckpoint(other.files, other, tmp_path / "cache")
    for name in draw.choices(list(TENSORS), k=12):
        rows, columns = TENSORS[name].shape[0], TENSORS[name].shape[-1]
        start, first = draw.randrange(rows + 1), draw.randrange(columns + 1)
        kinds = [{}, {"rows": range(start, draw.randint(start, rows))}]
        if TENSORS[name].dim() == 2 and rows:
            kinds.append({"columns": range(first, draw.randint(first, columns))})
        part = draw.choice(kinds)
        assert torch.equal(here.read(name, **part).values, real.read(name, **part).values), (name, part)
        assert here.shape(name) == real.shape(name)
    with pytest.raises(InputError, match="has no tensor 'model.e'"):
        here.read("model.e")


def test_nothing_comes_twice_and_other_parts_come_later(there: Path, tmp_path: Path) -> None:
    other = Counting(there)
    for part, more in ((range(10), True), (range(10), False), (range(10, 20), True)):
        other.asked.clear()
        with closing(FetchedCheckpoint(other.files, other, tmp_path / "cache")) as here:
            here.read("model.a", rows=part)
        assert bool(other.asked) == more
    assert sum(wanted.length * wanted.times for wanted in other.asked) == 10 * 30 * 4


def test_a_fetch_that_is_broken_off_goes_on(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetched, "PIECE", 1000)
    other, left = Counting(there), 4

    def failing(wanted: Wanted) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("the link is lost")
        return other(wanted)

    with pytest.raises(RuntimeError), closing(FetchedCheckpoint(other.files, failing, tmp_path / "cache")) as here:
        here.read("model.a")
    here = FetchedCheckpoint(other.files, other, tmp_path / "cache")
    assert torch.equal(here.read("model.a").values, TENSORS["model.a"])


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted("../secret", 0, 1, 1, 1), Wanted("config.json", 0, 1, 1, 1), Wanted("model.safetensors", -5, 10, 1, 1),
        Wanted("model.safetensors", 0, 1 << 40, 1, 1), Wanted("model.safetensors", 0, 8, 1 << 40, 2),
        Wanted("model.safetensors", 0, 1 << 20, 0, 1000), Wanted("model.safetensors", 0, 0, 0, 10**15),
    ],
)  # fmt: skip
def test_nothing_else_is_given_out(there: Path, wanted: Wanted) -> None:
    (there / "config.json").write_text("{}")
    with pytest.raises(LookupError, match="a rank asked for bytes"):
        cut_out(there, fingerprint(there), wanted)


def test_what_changed_meanwhile_is_said(there: Path, tmp_path: Path) -> None:
    other = Counting(there)
    save_file({**TENSORS, "model.more": torch.zeros(1)}, there / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors has changed on the engine's machine"):
        FetchedCheckpoint(other.files, other, tmp_path / "cache")


def test_what_differs_is_named(there: Path, tmp_path: Path) -> None:
    files, here = fingerprint(there, content=True), tmp_path / "here"
    here.mkdir()
    with pytest.raises(InputError, match=r"here/model.safetensors is missing here, or can't be read; the engine's"):
        demand_same(here, files)
    save_file(TENSORS, here / "model.safetensors")
    demand_same(here, files)
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, here / "model.safetensors")
    for known in (files, fingerprint(there)):  # as an older version of the same model would
        with pytest.raises(InputError, match="other numbers"):
            demand_same(here, known)
    save_file(
        {("model.z" if name == "model.a" else name): t for name, t in TENSORS.items()}, here / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"bytes here|other tensors"):
        demand_same(here, files)
    (here / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="truncated or corrupt"):
        demand_same(here, files)


def test_a_file_that_was_lost_is_fetched_anew(there: Path, tmp_path: Path) -> None:
    """Whatever the journal said of it."""
    other = Counting(there)
    for part in (range(20), range(20, 40)):
        with closing(FetchedCheckpoint(other.files, other, tmp_path / "cache")) as here:
            here.read("model.a", rows=part)
            (here.path / "model.safetensors").unlink()
    for part in (range(20, 40), range(20)):
        with closing(FetchedCheckpoint(other.files, other, tmp_path / "cache")) as here:
            assert torch.equal(here.read("model.a", rows=part).values, TENSORS["model.a"][part.start : part.stop])


def test_two_ranks_of_one_machine_take_turns(there: Path, tmp_path: Path) -> None:
    other, read = Counting(there), list[bool]()

    def rank(part: range) -> None:
        with closing(FetchedCheckpoint(other.files, other, tmp_path / "cache")) as here:
            read.append(torch.equal(here.read("model.a", rows=part).values, TENSORS["model.a"][part.start : part.stop]))

    threads = [threading.Thread(target=rank, args=(part,)) for part in (range(20), range(20, 40), range(40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert read == [True] * 3


def test_names_stay_in_the_directory(there: Path, tmp_path: Path) -> None:
    [file] = fingerprint(there)
    evil = [msgspec.structs.replace(file, name="../../evil.bin")]
    with pytest.raises(InputError, match="none of a directory"):
        FetchedCheckpoint(evil, Counting(there), tmp_path / "cache")
    with pytest.raises(InputError, match="no file of a directory"):
        demand_same(there, evil)


def test_what_would_be_read_is_what_is_compared(there: Path, tmp_path: Path) -> None:
    """An index's shards beside an older single file."""
    files = [msgspec.structs.replace(file, name="model-00001-of-00001.safetensors") for file in fingerprint(there)]
    shutil.copy(there / "model.safetensors", there / files[0].name)
    with pytest.raises(InputError, match=r"would be read from model.safetensors, and the engine's machine has model-0"):
        demand_same(there, files)


def test_a_disk_that_takes_nothing(there: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(InputError, match="can't hold the fetched weights"):
        FetchedCheckpoint(fingerprint(there), Counting(there), tmp_path / "cache")


def test_a_gguf_model_is_fetched_by_its_blocks(tmp_path: Path) -> None:
    """The header first, then whole blocks of the rows and columns that are read: of a half, half."""
    directory = tmp_path / "there"
    directory.mkdir()
    written(directory / "tiny.gguf", "llama", mixed, split_max_tensors=9)
    parts = sorted(directory.glob("*.gguf"))
    real, other = GgufCheckpoint(parts[0], ARCHITECTURES), Counting(parts[0])
    with closing(FetchedFiles(other.files, other, tmp_path / "cache")) as files:
        before = sum(wanted.length * wanted.times for wanted in other.asked)
        here = GgufCheckpoint(files.directory / parts[0].name, ARCHITECTURES, files.bring)
        for name, parts_of in (
            ("model.layers.0.self_attn.q_proj.weight", {"rows": range(64, 192)}),
            ("model.layers.1.mlp.down_proj.weight", {"columns": range(256, 512)}),
            ("model.embed_tokens.weight", {}), ("model.norm.weight", {}),
        ):  # fmt: skip
            found, expected = (each.read(name, **parts_of).numbers(torch.float32) for each in (here, real))
            assert torch.equal(found, expected), name
    stored = sum(file.size for file in other.files)
    fetched_bytes = sum(wanted.length * wanted.times for wanted in other.asked)
    half = real.stored("model.layers.0.self_attn.q_proj.weight") // 2
    half += real.stored("model.layers.1.mlp.down_proj.weight") // 2
    whole = real.stored("model.embed_tokens.weight") + real.stored("model.norm.weight")
    assert fetched_bytes - before == half + whole and fetched_bytes < stored / 2


def test_a_quantised_checkpoint_is_fetched_too(tmp_path: Path) -> None:
    values = saved(tmp_path / "there", "awq")
    other = Counting(tmp_path / "there")
    fields = model_config(tmp_path / "there").fields
    with closing(FetchedFiles(other.files, other, tmp_path / "cache")) as files:
        here = open_checkpoint(files.directory, fields, files.bring)
        name = "model.layers.0.mlp.down_proj.weight"
        found = here.read(name, columns=range(32, 96)).numbers(torch.float32)
        assert torch.equal(found, values[name][:, 32:96])
    assert sum(wanted.length * wanted.times for wanted in other.asked) < sum(file.size for file in other.files) / 4
