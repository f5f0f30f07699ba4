"""What is said, thought and called comes out as it was written, in whatever pieces it comes."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.speech.writing import NAMES, cut, dialect, harmony, heard, written
from weft.speech.dialect import CALLS, Dialect, dialect_of
from weft.speech.listener import Called, Given, Part, Said, Thought, listener

TOOLS = ("get_weather", "add", "f.g-2")
letters = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | letters | st.sampled_from(["</tool_call>", "[ARGS]", '"}', "["]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3), max_leaves=6,
)  # fmt: skip
calls = st.lists(st.tuples(st.sampled_from(TOOLS), st.dictionaries(letters, values, max_size=3)), max_size=3)
places = st.lists(st.integers(0, 4000), max_size=30)
plain = st.text("abc .,\n<[{]}>tol_cTOLC", max_size=30)


def parts_of(said: str, thought: str, made: list[tuple[str, dict]]) -> list[Part]:
    told: list[Part] = [Thought(thought)] if thought else []
    told += [Said(said)] if said else []
    for name, arguments in made:
        told += [Called(name), Given(json.dumps(arguments, ensure_ascii=False))]
    return told


@pytest.mark.parametrize("name", NAMES)
@given(said=plain, thought=plain, made=calls, at=places)
def test_calls_come_out_as_they_were_written(name: str, said: str, thought: str, made: list, at: list[int]) -> None:
    syntax, said, thought = CALLS[name], said.strip(), thought.strip()
    if not syntax.mark:
        said = "" if made or said.startswith("{") else said
    before = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    text = before + said + ("\n" if said and made else "") + (written(syntax, made) if made else "")
    found = heard(listener(dialect(name), TOOLS, False), cut(text, at))
    assert found == parts_of(said, thought, made)


@given(said=letters, thought=letters, made=calls, at=places)
def test_messages_with_headers(said: str, thought: str, made: list, at: list[int]) -> None:
    found = heard(listener(dialect_of("<|channel|><|message|>"), TOOLS, False), cut(harmony(thought, made, said), at))
    expected: list[Part] = [Thought(thought)] if thought else []
    expected += [part for name, arguments in made for part in (Called(name), Given(json.dumps(arguments)))]
    assert found == expected + ([Said(said)] if said else [])


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text("{}[]\"':,;<>/ \n_antmloc", max_size=60), at=places)
def test_nothing_that_is_no_call_is_lost(name: str, text: str, at: list[int]) -> None:
    """But for spaces around it, and in whatever pieces."""
    for whole in (
        text,
        CALLS[name].mark + text,
        "a" + CALLS[name].mark + CALLS[name].opening + CALLS[name].before + text,
    ):
        found = heard(listener(dialect(name, thoughts=False), ("nothing",), False), cut(whole, at))
        assert found == heard(listener(dialect(name, thoughts=False), ("nothing",), False), [whole])
        assert "".join(part.text for part in found if isinstance(part, Said)) == whole.strip(), found


ALIKE = {
    "spaces and no lines": '<tool_call>{"name" : "add" ,"arguments" : {"a": 1} }</tool_call>',
    "keys in another order": '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>',
    "other keys beside": '<tool_call>\n{"id": "x", "name": "add", "arguments": {"a": 1}, "more": [{}]}\n</tool_call>',
    "arguments as a text": '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
    "parameters": '<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>',
    "a function in it": '<tool_call>{"type": "x", "function": {"name": "add", "arguments": {"a": 1}}}</tool_call>',
    "a list": '<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>',
    "no end": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}',
}


@pytest.mark.parametrize("kind", ALIKE)
def test_other_ways_to_write_a_call(kind: str) -> None:
    for pieces in (list(ALIKE[kind]), [ALIKE[kind]]):
        assert heard(listener(dialect("hermes"), TOOLS, False), pieces) == [Called("add"), Given('{"a": 1}')]


NOT_CALLS = [
    "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>", "<tool_call> hello", "a <tool_call>",
    "<tool_call>{\"name\": \"add\"", "<tool_call>[1, 2]</tool_call>", "<tool_call>{\"name\": 3}</tool_call> b",
    "<tool_call>{\"name\": \"add\", \"arguments\": \"no\"}</tool_call>", "<tool_call",
]  # fmt: skip


def test_a_mark_twice_is_one_in_whatever_pieces() -> None:
    text = '[TOOL_CALLS][TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]'
    for end in ("", "[TOOL", "[TOOL_CALLS]"):
        whole, letters = (heard(listener(dialect("mistral-list"), TOOLS, False), each)
                          for each in ([text + end], list(text + end)))  # fmt: skip
        assert whole == letters == [Called("add"), Given('{"a": 1}')]


@pytest.mark.parametrize("text", NOT_CALLS)
def test_what_is_no_call_is_said(text: str) -> None:
    for pieces in (list(text), [text]):
        assert heard(listener(dialect("hermes"), TOOLS, False), pieces) == [Said(text)]


def test_a_call_that_is_cut_short_keeps_what_there_is() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1'
    assert heard(listener(dialect("hermes"), TOOLS, False), [text]) == [Called("add"), Given('{"a": 1')]


def test_text_goes_on_behind_calls() -> None:
    text = 'First.\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\nThen that.'
    expected = [Said("First."), Called("add"), Given("{}"), Said("Then that.")]
    for pieces in (list(text), [text]):
        assert heard(listener(dialect("hermes"), TOOLS, False), pieces) == expected


def test_thoughts() -> None:
    for thinking, text in ((True, "so\n</think>\n\nyes"), (False, "<think>\nso\n</think>\n\nyes")):
        for pieces in (list(text), [text]):
            assert heard(listener(dialect("hermes"), (), thinking), pieces) == [Thought("so"), Said("yes")]
    assert heard(listener(dialect("hermes"), (), True), ["never ends "]) == [Thought("never ends")]
    assert heard(listener(dialect("hermes"), (), False), ["none at all"]) == [Said("none at all")]


def test_special_tokens_are_no_text() -> None:
    hidden = ("<|im_end|>", "<|im_start|>")
    text = "a<|im_end|> b<|im_start|><think>t<|im_end|></think>c"
    found = heard(listener(dialect("hermes"), (), False, hidden), list(text))
    assert found == [Said("a b"), Thought("t"), Said("c")]


SIGNS = {
    "hermes": "{% if tools %}<tools>{{ tools }}</tools><tool_call>{% endif %}",
    "llama3": '{% if tools %}{"name": function name, "parameters": ..} Environment: ipython{% endif %}',
    "mistral-list": "[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral-args": "[TOOL_CALLS]{{ name }}[ARGS]",
    "deepseek": "<｜tool▁calls▁begin｜> ```json", "deepseek-v3.1": "<｜tool▁calls▁begin｜>",
    "harmony": "<|start|><|channel|>analysis<|message|>", "words": "{{ messages }}",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNS)
def test_families_are_known_by_their_templates(name: str) -> None:
    assert dialect_of(SIGNS[name]).name == name and set(SIGNS) - {"words"} == set(CALLS)
    assert dialect_of(SIGNS[name] + "</think>").thoughts == (None if name == "harmony" else ("<think>", "</think>"))


def test_nine_letters_for_those_that_want_them() -> None:
    mistral = Dialect("mistral-list", CALLS["mistral-list"], short_ids=True)
    assert len(mistral.call_id()) == len(mistral.call_id("call_0123456789abcdef")) == 9
    assert mistral.call_id("abcDEF123") == "abcDEF123" and mistral.call_id("call_1") == mistral.call_id("call_1")
    assert mistral.call_id("call_1") != mistral.call_id("call_2")
    assert dialect("hermes").call_id("x") == "x" and dialect("hermes").call_id().startswith("call_")


def test_long_answers_take_their_time_once() -> None:
    """A hundred thousand characters, one by one, within a second: nothing is looked at again and again."""
    hidden = [f"<|reserved_special_token_{number}|>" for number in range(1000)]  # a tokenizer may have as many
    for text in ("x" * 100_000, '<tool_call>{"name": "add", "arguments": {"a": "' + "{" * 100_000 + '"}}</tool_call>'):
        by, begin = listener(dialect("hermes"), TOOLS, False, hidden), time.perf_counter()
        for character in text:
            by.grow(character)
        by.end()
        assert time.perf_counter() - begin < 5
