"""Grammars hold calls to their schemas, and leave free what may be."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import pytest

from tests.speech.writing import NAMES, THINK, dialect, harmony, heard, written
from weft.errors import InputError
from weft.grammar import Grammars
from weft.speech.dialect import CALLS, Dialect, dialect_of
from weft.speech.form import HEAD, Tools, form, of_choices, of_pattern, of_schema
from weft.speech.listener import Called, Given, Said, Thought, listener
from weft.text import Tokenizer

WEATHER: dict[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
SWITCH: dict[str, Any] = {
    "type": "object", "properties": {"on": {"type": "boolean"}, "level": {"enum": ["low", "high", 3]}},
    "required": ["on", "level"], "additionalProperties": False,
}  # fmt: skip
TOOLS = {"weather": WEATHER, "switch": SWITCH, "nothing": {"type": "object", "properties": {}}}
GOOD = [("weather", {"city": 'P"a}ris', "days": 3}), ("switch", {"on": True, "level": "low"})]
BAD = [("weather", {"days": 3})], [("weather", {"city": 5})], [("other", {})], [("switch", {"on": True})]


@pytest.fixture(scope="module")
def grammars(packaged) -> Grammars:
    tokenizer = Tokenizer(packaged)
    found = Grammars(tokenizer, len(tokenizer._hf), frozenset(tokenizer.end_ids))
    found.tokens = tokenizer  # type: ignore[attr-defined]
    return found


def follows(grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether an answer has the form: all of it, and nothing must come any more."""
    tokenizer: Tokenizer = grammars.tokens  # type: ignore[attr-defined]
    matcher = grammars.matcher(grammar)._matcher
    ids = tokenizer._hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and (matcher.is_accepting() or matcher.is_stopped())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thoughts", [False, True])
def test_what_may_be_called(grammars: Grammars, name: str, thoughts: bool) -> None:
    own, calls = dialect(name, thoughts), written(CALLS[name], GOOD)
    auto, must = (form(own, {}, False, Tools(TOOLS, must)) for must in (False, True))
    assert follows(grammars, auto, calls) and follows(grammars, must, calls)
    assert follows(grammars, auto, "nothing to call") and not follows(grammars, must, "nothing to call")
    assert follows(grammars, auto, "first " + calls) and not follows(grammars, must, "first " + calls)
    assert follows(grammars, must, "<think>\nhm\n</think>\n\n" + calls) is thoughts
    begun = form(own, {}, True, Tools(TOOLS, must=True))
    assert follows(grammars, begun, "hm\n</think>\n\n" + calls) is thoughts
    for bad in BAD:
        assert not follows(grammars, must, written(CALLS[name], bad)), bad
        assert not CALLS[name].mark or not follows(grammars, auto, "a" + written(CALLS[name], bad)), bad
    one = form(own, {}, False, Tools(TOOLS, True, several=False))
    assert follows(grammars, one, written(CALLS[name], GOOD[:1])) and not follows(grammars, one, calls)
    if not CALLS[name].mark:
        with pytest.raises(InputError, match="without a mark"):
            form(own, {}, False, Tools(TOOLS), of_schema(SWITCH))
        return
    either = form(own, {}, False, Tools(TOOLS), of_schema(SWITCH))
    assert follows(grammars, either, calls) and follows(grammars, either, '{"on": false, "level": 3}')
    assert not follows(grammars, either, "anything else")


def test_messages_with_headers(grammars: Grammars) -> None:
    own = dialect_of("<|channel|><|message|>")
    auto, must = (form(own, {}, False, Tools(TOOLS, must)) for must in (False, True))
    called, said = harmony("hm", GOOD[:1]), harmony("hm", (), "hello").removesuffix("<|return|>")
    assert follows(grammars, auto, called) and follows(grammars, must, called)
    assert follows(grammars, auto, said) and not follows(grammars, must, said)
    assert not any(follows(grammars, must, harmony("", bad)) for bad in BAD)
    answer = form(own, {}, False, None, of_schema(SWITCH))
    assert follows(grammars, answer, harmony("hm", (), '{"on": true, "level": "low"}').removesuffix("<|return|>"))
    assert not follows(grammars, answer, said)


def test_special_tokens_are_named_by_their_numbers(grammars: Grammars) -> None:
    own = Dialect("x", CALLS["mistral-list"], THINK)
    text = form(own, {"[TOOL_CALLS]": 7, "<think>": 8, "</think>": 9}, False, Tools(TOOLS, must=True))
    assert text.startswith(HEAD) and "<[7]> " in text and "<[8]> " in text and "<[9]>" in text
    assert "TOOL_CALLS" not in text and "think>" not in text
    assert grammars.grammar(text)


@pytest.mark.parametrize(("right", "good", "bad"), [
    (of_pattern("a/b\\/[0-9]+"), "a/b/12", "a/b"), (of_pattern("(yes|no)"), "yes", "yesno"),
    (of_choices(['say "a"', "b\n"]), 'say "a"', "b"), (of_schema(SWITCH), '{"on": true, "level": 3}', "{}"),
    (of_schema(True), "[1]", "[1"),
])  # fmt: skip
def test_right_sides(grammars: Grammars, right: str, good: str, bad: str) -> None:
    for text, before in (
        (HEAD + f"start: {right}\n", ""),
        (form(dialect("hermes"), {}, True, None, right), "t</think>\n"),
    ):
        assert follows(grammars, text, before + good) and not follows(grammars, text, before + bad)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_drawn_the_arguments_follow_their_schema(grammars: Grammars, name: str) -> None:
    """Tokens at random, of those that the grammar allows."""
    tokenizer: Tokenizer = grammars.tokens  # type: ignore[attr-defined]
    tools = {"switch": SWITCH, "nothing": {"type": "object", "properties": {}, "additionalProperties": False}}
    grammar, chance, ended = form(dialect(name), {}, True, Tools(tools, must=True)), random.Random(1), 0
    for _ in range(20):
        matcher, stream = grammars.matcher(grammar), tokenizer.stream((), False)
        text, whole = "", False
        for token in tokenizer._hf.backend_tokenizer.encode("hm</think>", add_special_tokens=False).ids:
            matcher.advance(token)
            text += stream.step(token)
        for _ in range(300):
            mask = matcher.allowed()
            allowed = [token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1]
            token = chance.choice(allowed)
            if token in tokenizer.end_ids or matcher.finished:
                ended, whole = ended + 1, True
                break
            matcher.advance(token)
            text += stream.step(token)
        parts = heard(listener(dialect(name), frozenset(tools), True), [text + stream.end()])
        assert parts[0] == Thought("hm") and isinstance(parts[1], Called), text
        assert not any(isinstance(part, Said) for part in parts), text
        called = ""
        for part in parts[1:] if whole else parts[1:-1]:  # the last one may be cut short
            called = part.name if isinstance(part, Called) else called
            if isinstance(part, Given):
                jsonschema_rs.validate(tools[called], json.loads(part.text))
    assert ended > 3, "most are drawn to their end"
