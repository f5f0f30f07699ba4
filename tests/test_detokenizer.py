"""Texts that grow are what their tokens give when they are decoded together, for every kind of tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz.models import KINDS, tokenizer
from weft.detokenizer import Spelling


@cache
def made(kind: str) -> tuple[Any, Spelling]:
    backend = tokenizer(kind)
    return backend, Spelling(backend)


def ids(kind: str, *tokens: str) -> list[int]:
    found = [made(kind)[0].token_to_id(token) for token in tokens]
    assert None not in found
    return found


def grown(
    spelling: Spelling, tokens: list[int], prompt: tuple[int, ...] = (), skip: bool = True
) -> tuple[str, list[int]]:  # fmt: skip
    stream = spelling.stream(prompt, skip)
    text = "".join(stream.step(token) for token in tokens)
    ahead, rest = stream.ahead, stream.end()
    assert ahead in ("", rest)
    assert len(stream.offsets) == len(tokens) and stream.offsets == sorted(stream.offsets)
    return text + rest, stream.offsets


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_a_text_that_grows_is_a_full_decode(kind: str, data: st.DataObject) -> None:
    backend, spelling = made(kind)
    size, skip = backend.get_vocab_size(), data.draw(st.booleans())
    listed = st.lists(st.integers(0, size + 2), max_size=12)
    tokens, prompt = data.draw(listed), data.draw(listed)
    text, offsets = grown(spelling, tokens, skip=skip)
    assert text == backend.decode(tokens, skip_special_tokens=skip)
    assert not offsets or offsets[-1] <= len(text)
    whole = [token for token in prompt if spelling.bytes_of(token).isascii() and spelling.byte_of(token) is None]
    before = backend.decode(whole, skip_special_tokens=skip)
    text, _ = grown(spelling, tokens, tuple(whole), skip)
    assert before + text == backend.decode([*whole, *tokens], skip_special_tokens=skip)


def test_bytes_that_are_no_character() -> None:
    """What raised in tokenizers' own stream: a run of bytes that turns out to be no text, as a whole."""
    backend, spelling = made("byte-fallback")
    tokens = ids("byte-fallback", "<0x0A>", "<0xE2>", "b")
    assert grown(spelling, tokens) == ("��b", [0, 1, 2]) and backend.decode(tokens) == "��b"
    assert grown(spelling, ids("byte-fallback", "<0x0A>", "b")) == ("\nb", [0, 1])
    euro = ids("byte-fallback", "a", "<0xE2>", "<0x82>", "<0xAC>", "b")
    assert grown(spelling, euro) == ("a€b", [0, 1, 1, 1, 2])


def test_a_line_feed_is_known_before_the_run_ends() -> None:
    stream = made("byte-fallback")[1].stream((), True)
    assert stream.step(*ids("byte-fallback", "<0x0A>")) == "" and stream.ahead == "\n"
    assert stream.step(*ids("byte-fallback", "<0xE2>")) == "" and stream.ahead == ""


def test_unfinished_characters_wait_and_broken_ones_count() -> None:
    backend, spelling = made("byte-level")
    every = {spelling.bytes_of(token): token for token in range(backend.get_vocab_size())}
    first, second, third = (every[bytes([byte])] for byte in "€".encode())
    [letter] = ids("byte-level", "a")
    stream = spelling.stream((), True)
    assert [stream.step(token) for token in (letter, first, second)] == ["a", "", ""]
    assert stream.step(third) == "€" and stream.offsets == [0, 1, 1, 1]
    assert grown(spelling, [first, letter, first]) == ("�a�", [0, 1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_never_comes_out_again(kind: str) -> None:
    spelling = made(kind)[1]
    inside = "<0xE2>" if kind == "byte-fallback" else "�" if kind == "metaspace" else "â"
    prompt = tuple(ids(kind, "t", "h", "e", inside))
    assert grown(spelling, ids(kind, "a"), prompt)[0] == "a"


def test_the_space_before_a_word() -> None:
    for kind in ("byte-fallback", "metaspace"):
        spelling, [word, letter] = made(kind)[1], ids(kind, "▁a", "b")
        assert grown(spelling, [word])[0] == "a" and grown(spelling, [word], (letter,))[0] == " a"
        assert grown(spelling, [word], tuple(ids(kind, "<s>")))[0] == "a", "special tokens are not there"
        assert spelling.bytes_of(word) == b" a"


def test_tokens_as_texts() -> None:
    spelling = made("byte-level")[1]
    assert spelling.text_of(ids("byte-level", "â")[0]) == "bytes:\\xe2"
    assert spelling.text_of(ids("byte-level", "Ġthe")[0]) == " the"
    fallback = made("byte-fallback")[1]
    assert fallback.text_of(ids("byte-fallback", "<0xE2>")[0]) == "bytes:\\xe2"
    assert fallback.bytes_of(ids("byte-fallback", "<0x0A>")[0]) == b"\n"
    assert fallback.text_of(10**6) == "" and fallback.text_of(ids("byte-fallback", "</s>")[0]) == "</s>"
