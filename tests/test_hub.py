"""Where a model is."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import InputError
from weft.hub import PACKAGED, locate


def test_places(tmp_path: Path) -> None:
    assert locate(None) == PACKAGED
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/directory", "./nothing", "a/b/c"])
def test_what_is_no_directory(name: str) -> None:
    with pytest.raises(InputError, match="is not a directory; give a Hugging Face checkpoint"):
        locate(name)


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
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate("someone/tiny") == snapshot
