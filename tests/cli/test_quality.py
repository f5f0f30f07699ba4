"""`weft bench quality` as a user runs it, and what follows from what it found."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from random import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes import weft
from weft.bench.quality import TEXT, _Inexact, measure
from weft.errors import InputError
from weft.opening import open_engine
from weft.quality import ENOUGH, LIMITS, Assessment, Quality, keep, recall, within_limits

PINNED = "fdd3211b65d2a4c1ab8092e56f09628e349f00a92b97a2516125b4ae343bb157"


def test_the_text_is_pinned_and_small() -> None:
    content = TEXT.read_bytes()
    assert hashlib.sha256(content).hexdigest() == PINNED and len(content) < 1 << 20


def test_table_and_file(tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    done = weft("bench", "quality", "--tokens", "1024", "--wire", "int8,int4", "--json", str(out), process=True)
    for part in ("northanger-abbey, 1022 tokens, 2 ranks", "perplexity", "same token", "divergence", "ok"):
        assert part in done.stdout
    assert "not kept for auto: so few tokens say little" in done.stderr
    found = json.loads(out.read_text())
    exact, int8, int4 = found["wires"]
    assert (exact["wire"], exact["above"], exact["divergence"], exact["agreement"]) == ("exact", 0.0, 0.0, 1.0)
    assert 0 < int8["divergence"] < 0.1 * int4["divergence"] and int8["divergence_99"] > int8["divergence"]
    assert 0.9 < int4["agreement"] < int8["agreement"] <= 1 and abs(int8["above"]) < 0.001
    assert int8["perplexity"] == pytest.approx((1 + int8["above"]) * exact["perplexity"])


def test_formats_of_weights_and_of_keys_and_values(tmp_path: Path) -> None:
    """On one rank, against float32; in the order of their bits."""
    out = tmp_path / "quality.json"
    given = "--weights", "int8,int4", "--kv", "int8", "--tokens", "512", "--json", str(out)
    done = weft("bench", "quality", *given, process=True)
    for part in ("1 rank", "weights int8", "weights int4", "kv int8", "0.5%", "4.0%", "0.2%"):
        assert part in done.stdout
    assert done.stderr.strip() == ""
    exact, int8, int4, kv = json.loads(out.read_text())["wires"]
    assert [each["wire"] for each in (exact, int8, int4, kv)] == ["exact", "weights int8", "weights int4", "kv int8"]
    assert 0 < kv["divergence"] < int8["divergence"] < int4["divergence"] < 0.3
    assert kv["agreement"] > 0.98 and int8["agreement"] > 0.95 and int4["agreement"] > 0.8


def test_perplexity_is_transformers(packaged: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:6000])
    measured = measure(packaged, ["bf16"], 2, 1024, text)
    ids = AutoTokenizer.from_pretrained(packaged)(text.read_text())["input_ids"][: 2 * 512]
    model, losses = AutoModelForCausalLM.from_pretrained(packaged, dtype=torch.float32), []
    for start in (0, 512):
        window = torch.tensor([ids[start : start + 512]])
        with torch.no_grad():
            log = model(window).logits[0].log_softmax(-1)
        losses.append(-log[:-1].gather(1, window[0, 1:, None]).squeeze(1))
    assert measured.wires[0].perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    assert measured.tokens == 2 * 511 and measured.text == "text"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--wire", "int3"], "'int3' is not a wire; allowed: exact, bf16, int8, int4"),
        (["--wire", "auto:int8"], "'auto:int8' is not a wire"), (["--tp", "1"], "one rank sends nothing"),
        (["--weights", "auto"], "'auto' is not a format of weights; allowed: float32, bfloat16, int8, int4"),
        (["--kv", "int4"], "'int4' is not a format of keys and values; allowed: int8"), (["--tp", "0"], "--tp"),
        (["--tokens", "0"], "--tokens"), (["--text", "missing.txt"], "missing.txt can't be read"),
        (["--tokens", "20"], "--tokens 20 is less than a window, which has 512"), (["quality"], "'quality'"),
        (["--json", "no/such/folder/x.json"], "--json"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(given: list[str], said: str) -> None:
    done = weft("bench", "quality", *given, code=2)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_model_of_that_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sub-command goes before it, and `weft bench ./quality` is about it."""
    monkeypatch.chdir(tmp_path)
    done = weft("bench", "./quality", code=2)
    assert "./quality is not a directory" in done.stderr
    assert "--text" in weft("bench", "quality", "--help").stdout and "--overlap" in weft("bench", "--help").stdout


@pytest.fixture
def own(packaged: Path, tmp_path: Path) -> Path:
    """A model that nothing is known of."""
    directory = tmp_path / "own"
    shutil.copytree(packaged, directory)
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor * (1 + random() / 100) for name, tensor in weights.items()}, directory / "model.safetensors"
    )
    return directory


def found(ranks: int = 2, tokens: int = ENOUGH, dtype: str = "float32", **above: float) -> Assessment:
    wires = [Quality(name, 1.0, 10.0, value, 0.0001, 0.001, 0.01, 0.99) for name, value in above.items()]
    return Assessment(ranks, dtype, "text", tokens, "2026-11-29", wires)


def chosen(directory: Path, wire: str, ranks: int = 2, dtype: str = "float32") -> tuple[str, list[str]]:
    return within_limits(directory, wire, ranks, dtype)


def test_a_wire_beyond_its_limit_is_left_out_and_said_so(own: Path) -> None:
    assert recall(own) == [] and chosen(own, "int4") == ("int4", []) == chosen(own, "int4", 1)
    wire, lines = chosen(own, "auto:int4")
    assert wire == "auto:int4" and len(lines) == 1
    assert lines[0].startswith("what wires int8 and int4 do to this model's answers on 2 ranks isn't known: weft bench")
    keep(own, found(bf16=0.0, int8=0.0005, int4=0.016))
    wire, lines = chosen(own, "auto:int4")
    assert wire == "auto:int8" and len(lines) == 1
    assert lines[0].startswith(
        "wire int4 is left out for this model: with int4 perplexity is 1.60% above exact's, the limit 1.5%"
    )
    assert chosen(own, "int4") == ("int4", []), "who asks for it outright gets it"
    keep(own, found(bf16=0.0, int8=0.0005, int4=0.015 + 0.0001))
    assert chosen(own, "auto:int4") == ("auto:int4", []), "not for sure"
    keep(own, found(bf16=0.002))
    wire, lines = chosen(own, "auto:int4")
    assert wire == "exact" and lines[0].startswith(
        "wires bf16 and int8 and int4 are left out for this model: with bf16"
    )


def test_what_was_found_on_more_is_not_forgotten(own: Path) -> None:
    """Nor does it say anything of other numbers of ranks, or of another type of computation."""
    keep(own, found(int8=0.05, tokens=30_000))
    keep(own, found(bf16=0.0))
    keep(own, found(int8=0.0))
    assert not keep(own, found(int8=0.0, tokens=ENOUGH - 1))
    assert chosen(own, "auto:int8")[0] == "auto:bf16"
    for ranks, dtype in ((4, "float32"), (2, "bfloat16")):
        wire, lines = chosen(own, "auto:int8", ranks, dtype)
        assert wire == "auto:int8" and f"on {ranks} ranks isn't known" in lines[0]
    keep(own, found(int8=0.0, tokens=30_000))
    assert chosen(own, "auto:int8") == ("auto:int8", []), "what is as good and newer counts"


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 1e30])
def test_answers_that_are_none_exceed_every_limit(own: Path, figure: float) -> None:
    wire = _Inexact("int8")
    for _ in range(2):
        wire.losses.append(torch.full((10,), figure, dtype=torch.float64))
        wire.exact.append(torch.ones(10))
        wire.divergences.append(torch.full((10,), figure))
        wire.same.append(torch.zeros(10, dtype=torch.bool))
    quality = wire.quality(1.0)
    assert quality.exceeds
    keep(own, Assessment(2, "float32", "text", ENOUGH, "2026-11-29", [quality]))
    assert recall(own)[0].wires == [quality]


def test_an_engine_keeps_to_it(own: Path) -> None:
    keep(own, found(int8=LIMITS["int8"] * 2, int4=0.001))
    with closing(open_engine(own, ranks=2, threads=1, overlap="serial", wire="auto:int4")) as engine:
        assert engine.config.wire == "auto:bf16" and any(
            "wires int8 and int4 are left out" in line for line in engine.notices
        )


def test_what_is_kept_and_is_no_measurement_is_not_believed(own: Path) -> None:
    from weft.quality import _file

    keep(own, found(int8=0.0))
    _file(own).write_text("{")
    assert recall(own) == []


def test_models_without_a_tokenizer_are_told(packaged: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(packaged / name, tmp_path / name)
    with pytest.raises(InputError, match="needs a tokenizer"):
        measure(tmp_path, ["int8"], 2, 1024)
