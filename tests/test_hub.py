"""Where a model is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub.utils import filter_repo_objects

from weft.errors import InputError
from weft.hub import PACKAGED, chosen, locate, locate_config


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


FILES = [
    "README.md", "config.json.txt", "Tiny-Q4_K_M.gguf", "Tiny-Q8_0.gguf", "Tiny-UD-Q4_K_XL.gguf", "mmproj-F16.gguf",
    "Tiny-F16.gguf", "BF16/Tiny-BF16-00001-of-00002.gguf", "BF16/Tiny-BF16-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "files"),
    [
        ("Q4_K_M", ["Tiny-Q4_K_M.gguf"]), ("q4_k_m", ["Tiny-Q4_K_M.gguf"]), ("Q8_0", ["Tiny-Q8_0.gguf"]),
        ("Tiny-F16.gguf", ["Tiny-F16.gguf"]), ("F16", ["Tiny-F16.gguf"]), ("UD-Q4_K_XL", ["Tiny-UD-Q4_K_XL.gguf"]),
        ("BF16", ["BF16/Tiny-BF16-00001-of-00002.gguf", "BF16/Tiny-BF16-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_one_of_several_gguf_files(tag: str, files: list[str]) -> None:
    assert chosen("someone/tiny", FILES, tag) == files


@pytest.mark.parametrize(
    ("files", "tag", "said"),
    [
        (
            FILES,
            None,
            "someone/tiny has BF16, F16, Q4_K_M, Q8_0, UD-Q4_K_XL: give one of them, as in someone/tiny:BF16",
        ),
        (FILES, "Q5_K_M", "someone/tiny has no Q5_K_M; it has BF16, F16, Q4_K_M, Q8_0, UD-Q4_K_XL: give one of them"),
        (FILES, "", "nothing stands behind the colon; someone/tiny has BF16, F16"),
        (["a.txt", "mmproj-x.gguf"], None, "someone/tiny has no .gguf file"),
        (
            ["A-Q8_0.gguf", "B-Q8_0.gguf"],
            "Q8_0",
            "has A-Q8_0.gguf, B-Q8_0.gguf: give one of them, as in someone/tiny:A-Q8_0.gguf",
        ),
    ],
)
def test_which_is_asked(files: list[str], tag: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chosen("someone/tiny", files, tag)


def test_gguf_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "Tiny-Q8_0.gguf").write_bytes(b"GGUF")
    assert locate(tmp_path) == tmp_path / "Tiny-Q8_0.gguf" == locate(f"{tmp_path}:Q8_0")
    assert locate(tmp_path / "Tiny-Q8_0.gguf") == tmp_path / "Tiny-Q8_0.gguf" == locate_config(tmp_path)
    (tmp_path / "Tiny-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=f"{tmp_path} has Q4_0, Q8_0: give one of them, as in {tmp_path}:Q4_0"):
        locate(tmp_path)
    assert locate(f"{tmp_path}:q4_0") == tmp_path / "Tiny-Q4_0.gguf"
    with pytest.raises(InputError, match="has no Q5_0; it has Q4_0, Q8_0: give one"):
        locate(f"{tmp_path}:Q5_0")
    with pytest.raises(InputError, match=r"Tiny-Q4_0.gguf is a file; leave out :Q8_0"):
        locate(f"{tmp_path}/Tiny-Q4_0.gguf:Q8_0")
    (tmp_path / "named.gguf").mkdir()
    (tmp_path / "named.gguf" / "model.safetensors").write_bytes(b"")
    assert locate(tmp_path / "named.gguf") == tmp_path / "named.gguf", "a directory, whatever its name"
    (tmp_path / "config.json").write_text("{}")  # many repositories have one beside their GGUF files
    with pytest.raises(InputError, match="has Q4_0, Q8_0: give one of them"):
        locate(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert locate(tmp_path) == tmp_path, "a directory in Hugging Face's format"


def test_what_is_proposed_can_be_given(tmp_path: Path) -> None:
    """Whatever the files are called."""
    for files in (
        ["m-Q4_K_XL.gguf", "m-UD-Q4_K_XL.gguf"], ["a/one-Q4_K_M.gguf", "b/one-Q4_K_M.gguf"],
        ["m.Q8_0.gguf", "m.Q8_0-00001-of-00002.gguf", "m.Q8_0-00002-of-00002.gguf"], ["x.gguf", "y.gguf"],
        ["imatrix-quants/m-Q4_K_M.gguf", "imatrix-quants/m-Q8_0.gguf"],
    ):  # fmt: skip
        with pytest.raises(InputError, match="give one of them, as in") as told:
            chosen("o/r", files, None)
        proposed = str(told.value).partition(" has ")[2].partition(":")[0].split(", ")
        found = [chosen("o/r", files, tag) for tag in proposed]
        assert sorted(chain(*found)) == sorted(files)
    assert chosen("o/r", ["imatrix.gguf", "mmproj-x.gguf", "m.gguf"], None) == ["m.gguf"]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as fetching takes: a list of files, and the files. Breaks off once."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []
    broken_off: ClassVar[int] = 0
    status: ClassVar[int] = 200

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Range", "")))
        if self.status != 200:
            self._send(b"", status=self.status)
            return
        if "/tree/" in self.path and "someone/tiny" in self.path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()
            ]
            self._send(json.dumps(tree).encode())
        elif self.path.startswith("/api/models/someone/tiny"):
            listed = {"id": "someone/tiny", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in self.files]}
            self._send(json.dumps(listed | {"tags": [], "downloads": 0}).encode())
        elif (name := self.path.partition("/resolve/")[2].partition("/")[2]) in self.files:
            self._send(self.files[name], name)
        else:
            self._send(b"", status=404)

    def _send(self, data: bytes, name: str = "", status: int = 200) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-").partition("-")[0] or 0)
        self.send_response(206 if start else status)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(name.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if name.endswith(".gguf") and not start and not Hub.broken_off:
            Hub.broken_off += 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a command that is to ask it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.asked.clear()
    Hub.broken_off = 0
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
               "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def located(model: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = f"from weft.hub import locate; print(locate({model!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False,
        env=os.environ | environment,
    )  # fmt: skip


def test_a_tag_fetches_that_file_alone_and_a_broken_fetch_goes_on(hub: dict[str, str]) -> None:
    Hub.files = {"Tiny-Q4_K_M.gguf": bytes(range(256)) * 120_000, "Tiny-Q8_0.gguf": b"GGUF" * 10, "README.md": b"x"}
    first = located("someone/tiny:Q4_K_M", hub)
    if first.returncode:  # its HTTP client may try again by itself
        assert "Tiny" in first.stderr or "error" in first.stderr.lower()
        first = located("someone/tiny:Q4_K_M", hub)
    path = Path(first.stdout.strip())
    assert path.name == "Tiny-Q4_K_M.gguf" and path.read_bytes() == Hub.files["Tiny-Q4_K_M.gguf"]
    assert not any("Q8_0" in asked for asked, _ in Hub.asked)
    assert any(ranged.startswith("bytes=") and ranged != "bytes=0-" for _, ranged in Hub.asked), "it began anew"
    Hub.asked.clear()
    assert located("someone/tiny:Q4_K_M", hub | {"HF_HUB_OFFLINE": "1"}).stdout == first.stdout and not Hub.asked


@pytest.mark.parametrize("status", [401, pytest.param(503, marks=pytest.mark.grid)])  # asked again for 23 s, twice
def test_what_is_in_the_cache_needs_no_hub_that_answers(status: int, hub: dict[str, str]) -> None:
    Hub.files, Hub.broken_off = {"Tiny-Q4_K_M.gguf": b"GGUF" * 100}, 1
    path = located("someone/tiny:Q4_K_M", hub).stdout
    Hub.status = status
    try:
        assert path and located("someone/tiny:Q4_K_M", hub).stdout == path
        assert "can't be had from the hub" in located("someone/other:Q4_K_M", hub).stderr
    finally:
        Hub.status = 200


def test_a_plan_does_not_fetch_gigabytes(hub: dict[str, str]) -> None:
    Hub.files = {"Tiny-Q4_K_M.gguf": b"GGUF" * 100}
    code = "from weft.hub import locate_config; print(locate_config('someone/tiny:Q4_K_M'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False,
                          env=os.environ | hub).stderr  # fmt: skip
    assert "is not here yet, and all of it would be fetched for its header" in said


def test_a_repository_of_several_is_asked_which(hub: dict[str, str]) -> None:
    Hub.files = {"Tiny-Q4_K_M.gguf": b"GGUF", "Tiny-Q8_0.gguf": b"GGUF"}
    said = located("someone/tiny", hub).stderr.strip().splitlines()[-1]
    assert said.endswith("someone/tiny has Q4_K_M, Q8_0: give one of them, as in someone/tiny:Q4_K_M")
    assert (
        located("someone/tiny:Q2_K", hub)
        .stderr.strip()
        .endswith("has no Q2_K; it has Q4_K_M, Q8_0: give one of them, as in someone/tiny:Q4_K_M")
    )
    assert "can't be had from the hub" in located("someone/other:Q2_K", hub).stderr
