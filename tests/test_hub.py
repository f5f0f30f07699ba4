"""Where a model is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from weft.errors import InputError
from weft.hub import PACKAGED, locate, locate_config


def test_places(tmp_path: Path) -> None:
    assert locate(None) == PACKAGED
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/directory", "./nothing", "a/b/c"])
def test_what_is_no_directory(name: str) -> None:
    with pytest.raises(InputError, match="is not a directory; give a Hugging Face checkpoint's"):
        locate(name)


@pytest.mark.parametrize("name", ["~nobody-here/x", "a" * 5000, "", "a\0b"])
def test_what_is_no_name(name: str) -> None:
    for look in (locate, locate_config):
        with pytest.raises(InputError, match="is no name of a model") as told:
            look(name)
        assert len(str(told.value)) < 300


def test_hub_ids_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, an id that is not in the cache is one clear line, at once."""
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        locate("not valid!")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="not in the hub's cache"):
        locate("nobody/nothing-here")


def test_hub_ids_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """huggingface_hub's own layout: a model that was downloaded before needs no network."""
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate("someone/tiny") == snapshot


@pytest.mark.parametrize("sharded", [True, False])
def test_only_what_is_needed_is_fetched(sharded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Mistral's repositories are: the same weights twice, once more in a sub-directory, and as pickle."""
    parts = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    weights = [*parts, "model.safetensors.index.json"] if sharded else ["model.safetensors"]
    small = ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    others = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "model.py", "onnx/a.json"]
    index = json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}})
    fetched: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> str:
        for file in filter_repo_objects([*small, *weights, *others], allow_patterns=allow_patterns,
                                        ignore_patterns=ignore_patterns):  # fmt: skip
            if not (tmp_path / file).exists():
                fetched.append(file)
                (tmp_path / file).write_text(index if file.endswith("index.json") else "")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate_config("someone/model") == tmp_path and fetched == ["config.json"]
    assert locate("someone/model") == tmp_path
    assert sorted(fetched) == sorted([*small, *weights])
