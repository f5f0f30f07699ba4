"""GGUF's header: what it says, and what is wrong with it, by one line and without memory taken for it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.formats.gguf_files import write
from tests.formats.test_gguf import tiny, written
from tests.processes import weft
from weft.errors import InputError
from weft.execute.process import Peak
from weft.formats.gguf import header
from weft.formats.gguf.header import GgufHeader, header_of
from weft.model.description import generation_defaults, model_config

MIB = 1 << 20


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = pair("general.architecture", 8, text("llama"))


def tensor(name: str, offset: int, shape: tuple[int, ...] = (8,), kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def file(
    *pairs: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, magic: bytes = b"GGUF", keys: int | None = None,
    count: int | None = None, data: int = 256,
) -> bytes:  # fmt: skip
    """By hand, as the format's document says."""
    head = magic + struct.pack("<IQQ", version, len(tensors) if count is None else count,
                               len(pairs) if keys is None else keys)  # fmt: skip
    body = head + b"".join(pairs) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(data)


def test_all_kinds_of_values(tmp_path: Path) -> None:
    """As the package writes them, and reads them."""
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    values: dict[str, tuple[str, Any]] = {
        "uint8": ("add_uint8", 200), "int8": ("add_int8", -3), "uint16": ("add_uint16", 60000),
        "int16": ("add_int16", -9), "uint32": ("add_uint32", 1 << 31), "int32": ("add_int32", -7),
        "float32": ("add_float32", 0.25), "bool": ("add_bool", True), "string": ("add_string", "ä \n 日本"),
        "uint64": ("add_uint64", 1 << 63), "int64": ("add_int64", -(1 << 40)), "float64": ("add_float64", 1e300),
    }  # fmt: skip
    for key, (method, value) in values.items():
        getattr(writer, method)(f"x.{key}", value)
    writer.add_array("x.texts", ["a", "", "ß"])
    writer.add_array("x.numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = GgufHeader(tmp_path / "a.gguf")
    for key, (_, value) in values.items():
        assert found.get(f"x.{key}", type(value)) == value
    assert found.listed("x.texts") == ["a", "", "ß"] and found.listed("x.numbers") == [1, -2, 3]
    assert found.listed("x.none") is None and found.get("x.none", int, 5) == 5
    with pytest.raises(InputError, match=r"x.string is 'ä.*, not of type int"):
        found.get("x.string", int)
    with pytest.raises(InputError, match="x.bool is True, not of type int"):
        found.get("x.bool", int)
    with pytest.raises(InputError, match="x.texts is a list of 3, not of type str"):
        found.get("x.texts", str)
    with pytest.raises(InputError, match=r"x.int8 is -3, not a list"):
        found.listed("x.int8")


def test_a_large_vocabulary_takes_milliseconds(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(260_000)]
    listed = struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))
    (tmp_path / "a.gguf").write_bytes(file(ARCHITECTURE, pair("tokenizer.ggml.tokens", 9, listed)))
    begin = time.process_time()
    found = GgufHeader(tmp_path / "a.gguf")
    assert time.process_time() - begin < 1.0, "the gguf package takes 17 s"
    assert found.listed("tokenizer.ggml.tokens") == tokens


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for name in ("llama", "qwen2"):
        path.write_bytes(file(pair("general.architecture", 8, text(name))))
        assert header_of(path).get("general.architecture", str) == name
        assert header_of(path) is header_of(path)


LISTED = struct.pack("<IQ", 4, 2) + bytes(8)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "short": (b"GGUF\3\0\0\0", "is no GGUF file|truncated"),
    "magic": (file(ARCHITECTURE, magic=b"GGML"), "does not begin with GGUF"),
    "version-1": (file(ARCHITECTURE, version=1), "its version is 1; weft reads versions 2 and 3"),
    "big-endian": (file(ARCHITECTURE, version=3 << 24), "it is for big-endian machines"),
    "keys": (file(ARCHITECTURE, keys=1 << 60), "it promises 1152921504606846976 keys, and 65536 are the most"),
    "more-keys": (file(ARCHITECTURE, keys=40, data=0), "truncated or corrupt"),
    "tensors": (file(ARCHITECTURE, count=1 << 50), "it promises 1125899906842624 tensors"),
    "text-4-gib": (file(pair("a", 8, text("x", 4 << 30))), "a text at byte 45 is 4294967296 bytes long"),
    "text-64-bit": (file(pair("a", 8, text("x", (1 << 64) - 1))), "is 18446744073709551615 bytes long"),
    "key-long": (file(text("k" * 5000) + struct.pack("<I", 0) + b"\0"), "is 5000 bytes long"),
    "key-twice": (file(ARCHITECTURE, ARCHITECTURE), "general.architecture is there twice"),
    "key-odd": (file(text("evil\nline") + struct.pack("<I", 0) + b"\0"), "characters that none has"),
    "not-utf-8": (file(pair("a", 8, text(b"\xff\xfe"))), "is no UTF-8"),
    "type": (file(pair("a", 77, b"")), "the unknown type 77"),
    "list-count": (file(pair("a", 9, struct.pack("<IQ", 4, 1 << 61))), "promises 2305843009213693952 numbers"),
    "texts-count": (file(pair("a", 9, struct.pack("<IQ", 8, 1 << 61))), "promises 2305843009213693952 texts"),
    "texts-long": (file(pair("a", 9, struct.pack("<IQ", 8, 1) + text("x", 1 << 40))), "longer than the header"),
    "texts-cut": (file(pair("a", 9, struct.pack("<IQ", 8, 60) + text("x")), data=150), "truncated or corrupt"),
    "nested": (file(pair("a", 9, struct.pack("<IQ", 9, 1) + LISTED)), "is of type 9, which lists can't hold"),
    "alignment": (file(ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 12))), "are aligned to 12"),
    "dimensions": (file(ARCHITECTURE, tensors=(text("t") + struct.pack("<I", 1 << 30),)), "has 1073741824 dimensions"),
    "type-unknown": (file(ARCHITECTURE, tensors=(tensor("t", 0, kind=99),)), "is of type 99, which is not known"),
    "shape-large": (file(ARCHITECTURE, tensors=(tensor("t", 0, (1 << 40, 1 << 40)),)), "the tensor t has the shape"),
    "shape-odd": (file(ARCHITECTURE, tensors=(tensor("t", 0, (2, 100), kind=12),)), r"the shape \[2, 100\], in Q4_K"),
    "twice": (file(ARCHITECTURE, tensors=(tensor("t", 0), tensor("t", 32))), "the tensor t is there twice"),
    "overlap": (file(ARCHITECTURE, tensors=(tensor("t", 0, (24,)), tensor("u", 32))), "u begins within another one"),
    "offset-odd": (file(ARCHITECTURE, tensors=(tensor("t", 5),)), "t begins within another one, or between"),
    "offset-far": (file(ARCHITECTURE, tensors=(tensor("t", 1 << 62),)), "the tensor t is not all there"),
    "truncated": (file(ARCHITECTURE, tensors=(tensor("t", 0, (64,)),), data=200), "is not all there, 56 bytes"),
    "no-architecture": (file(), "names no general.architecture"),
    "nothing-said": (file(ARCHITECTURE), "does not say llama.embedding_length, which must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, tmp_path: Path) -> None:
    data, said = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with Peak() as peak, pytest.raises(InputError, match=said) as told:
        model_config(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)
    assert peak.taken < 20 * MIB
    errors = weft("generate", str(path), "hi", code=2).stderr
    assert errors.count("\n") == 1 and errors.startswith("weft: ")


def test_a_header_of_nothing_but_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large, and legal up to its end: as much memory as it has bytes, and not one object for each text."""
    many = 1 << 20
    listed = struct.pack("<IQ", 8, many) + text("x" * 32) * many
    pairs = [pair(f"key {number}", 9, listed) for number in range(3)]
    (tmp_path / "large.gguf").write_bytes(file(ARCHITECTURE, *pairs))
    with Peak() as peak, pytest.raises(InputError):
        model_config(tmp_path / "large.gguf")
    # Pages of the file that were looked at count too, and are nobody's when memory is short.
    assert peak.taken < 100 * MIB


@pytest.mark.parametrize("kind", ["Q4_1", "F16"])
def test_a_file_that_is_cut_off_anywhere(kind: str, tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.gguf", "llama", kind).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 37), *range(3000, len(whole) - 1, 40_001), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as told:
            model_config(path)
        assert "\n" not in str(told.value)


def test_shapes_that_disagree_with_the_configuration(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_vocab_size(7)

    model = tiny("llama")
    path = write(tmp_path / "a.gguf", model, "llama", "F32", more)
    assert model_config(path).vocabulary == 258, "as many as there are"
    data = path.read_bytes()
    at = data.index(b"llama.feed_forward_length") + len("llama.feed_forward_length") + 4
    path.write_bytes(data[:at] + struct.pack("<I", 480) + data[at + 4 :])
    errors = weft("generate", str(path), "hi", "--threads", "1", code=2).stderr
    assert "blk.0.ffn_gate.weight has the shape [512, 256]" in errors or "gate_proj.weight has the shape" in errors


def test_lists_of_numbers_have_limits_too(tmp_path: Path) -> None:
    """A list is as many objects as it has entries."""
    path = tmp_path / "large.gguf"
    for count, said in (
        (60 << 20, "promises 62914560 numbers, and 1048576 are the most"),
        (1 << 20, "a list of 1048576"),
    ):
        listed = struct.pack("<IQ", 0, count) + bytes(count)
        path.write_bytes(file(ARCHITECTURE, pair("llama.embedding_length", 9, listed)))
        with Peak() as peak, pytest.raises(InputError, match=said):
            model_config(path)
        assert peak.taken < 100 * MIB


def test_long_texts_are_not_kept(tmp_path: Path) -> None:
    """In memory a text with one emoji takes four bytes a character."""
    long = text("x" * (4 * MIB - 8) + "\U0001f600")
    pairs = [pair(f"key {number}", 8, long) for number in range(15)]
    (tmp_path / "large.gguf").write_bytes(file(ARCHITECTURE, *pairs))
    with Peak() as peak:
        found = GgufHeader(tmp_path / "large.gguf")
        assert found.get("key 3", str).endswith("\U0001f600")
    assert peak.taken < 100 * MIB


PROPOSALS: tuple[Callable[[gguf.GGUFWriter], None], ...] = (
    lambda writer: writer.add_float32("general.sampling.temp", 0.5),
    lambda writer: writer.add_int32("general.sampling.top_k", 30),
)


def test_proposals_for_sampling(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        for propose in PROPOSALS:
            propose(writer)

    path = write(tmp_path / "a.gguf", tiny("llama"), "llama", "F32", more)
    assert generation_defaults(path) == ({"temperature": 0.5, "top_k": 30}, [])


def test_limits_hold_for_what_is_known() -> None:
    """The largest vocabulary in use has 262,144 tokens and 514,906 merges."""
    assert header.MOST_LISTED > 514_906 and header.LONGEST_HEADER > 16 * MIB
