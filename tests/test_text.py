"""Detokenisation by whole characters, and stop texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import InputError
from weft.model.description import generation_defaults
from weft.text import StopText, Tokenizer, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(packaged: Path) -> Tokenizer:
    return Tokenizer(packaged)


@pytest.mark.parametrize("text", ["def main():\n    pass\n", " héllo wörld", "日本語 und 🎉🎉 done", "a\t\tb"])
def test_text_grows_by_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    prompt = tuple(tokenizer.encode("x = 1\n"))
    stream, pieces = tokenizer.stream(prompt, True), []
    for token in tokenizer.encode(text):
        pieces.append(stream.step(token))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) == text


def test_an_unfinished_character_is_never_emitted(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🎉")
    assert len(tokens) > 1
    stream = tokenizer.stream((), True)
    assert [stream.step(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    end = next(iter(tokenizer.end_ids))
    assert tokenizer.stream((), True).step(end) == "" and tokenizer.stream((), False).step(end) != ""


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_texts_whatever_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """Cut at the earliest stop text, and nothing shown before is taken back."""
    growing, at, shown = StopText(tuple(stops), keep_stop=False), 0, ""
    while at < len(text) and growing.stopped is None:
        size = data.draw(st.integers(1, 3))
        growing.grow(text[at : at + size])
        at += size
        assert growing.text.startswith(shown)
        shown = growing.text[: growing.settled]
    grown = text[:at]
    places = [grown.find(stop) for stop in stops if stop in grown]
    assert growing.text == (grown[: min(places)] if places else grown)
    assert (growing.stopped is not None) == bool(places)


def test_the_stop_text_can_be_kept() -> None:
    kept = StopText(("END",), keep_stop=True)
    for piece in ("abcE", "N", "Dxyz"):
        kept.grow(piece)
    assert kept.text == "abcEND" and kept.stopped == "END"


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)


def test_corrupt_tokenizer(tmp_path: Path, packaged: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((packaged / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(InputError, match="the tokenizer can't be read"):
        Tokenizer(tmp_path)


def test_generation_defaults(tmp_path: Path) -> None:
    """What can't be read is said, and no more than that: transformers loads such a checkpoint too."""
    assert generation_defaults(tmp_path) == ({}, [])
    path = tmp_path / "generation_config.json"
    for content in (b'{"top_k": 20}', b'\xef\xbb\xbf{"top_k": 20}'):
        path.write_bytes(content)
        assert generation_defaults(tmp_path) == ({"top_k": 20}, [])
    for content, says in (
        (b"{", "can't be read as JSON"),
        (b'{"a": "\xe9"}', "can't be read"),
        (b"[]", "no JSON object"),
    ):
        path.write_bytes(content)
        found, lines = generation_defaults(tmp_path)
        assert found == {} and len(lines) == 1 and says in lines[0]


def test_a_tokenizer_in_two_files(tmp_path: Path, packaged: Path) -> None:
    """As older checkpoints have it."""
    whole = Tokenizer(packaged)
    model = json.loads((packaged / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    assert tokenizer_of(tmp_path) is None
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    found = tokenizer_of(tmp_path)
    assert found is not None and found.encode("def main(x):") == whole.encode("def main(x):")
    assert found.spelling.text_of(70) == whole.spelling.text_of(70)


def test_chat_by_the_checkpoints_own_template(tmp_path: Path, packaged: Path) -> None:
    import shutil

    directory = Path(shutil.copytree(packaged, tmp_path / "model"))
    messages = [{"role": "user", "content": "What is a list?"}]
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(directory).chat(messages)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.chat(messages)) == "user: What is a list?\nassistant:"
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        Tokenizer(directory).chat(messages)


def test_a_hostile_chat_template_stays_in_the_sandbox(tmp_path: Path, packaged: Path) -> None:
    import shutil

    directory, victim = Path(shutil.copytree(packaged, tmp_path / "model")), tmp_path / "owned"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {victim}') }}}}"
    (directory / "chat_template.jinja").write_text(attack)
    with pytest.raises(InputError, match="refuses these messages"):
        Tokenizer(directory).chat([{"role": "user", "content": "hi"}])
    assert not victim.exists()
