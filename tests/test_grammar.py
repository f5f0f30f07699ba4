"""Completions that must be JSON of a given form."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from weft.errors import Busy, InputError
from weft.grammar import ANY_OBJECT, Grammars
from weft.text import Tokenizer

SCHEMA = json.dumps({
    "type": "object", "required": ["name", "sizes"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 30}, "maxItems": 3},
    },
})  # fmt: skip


@pytest.fixture(scope="module")
def grammars(packaged: Path) -> Grammars:
    return Grammars(Tokenizer(packaged), 4096, frozenset({0}))


def test_whatever_is_drawn_fits_the_schema(grammars: Grammars, packaged: Path) -> None:
    tokenizer = Tokenizer(packaged)
    for seed in range(10):
        draw, matcher, tokens = random.Random(seed), grammars.matcher(SCHEMA), list[int]()
        while not matcher.finished and len(tokens) < 200:
            bits = np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little", count=4096)
            token = draw.choice(np.flatnonzero(bits).tolist())
            matcher.advance(token)
            tokens.append(token)
        value = json.loads(tokenizer.decode([token for token in tokens if token != 0]))
        assert set(value) == {"name", "sizes"} and len(value["name"]) <= 6
        assert all(-3 <= size <= 30 for size in value["sizes"]) and len(value["sizes"]) <= 3


def test_schemas_that_cannot_be_followed(grammars: Grammars) -> None:
    for wrong in ("nonsense", '{"type": "nothing"}', '{"$ref": "http://elsewhere/schema"}', "[]"):
        with pytest.raises(InputError, match="schema can't be followed"):
            grammars.matcher(wrong)
    assert grammars.matcher(ANY_OBJECT).allowed() == grammars.matcher(ANY_OBJECT).allowed()


def test_what_is_kept_is_bounded_in_bytes(packaged: Path) -> None:
    """A number of 36 characters that others must be multiples of takes 8 to 40 MB."""
    few = Grammars(Tokenizer(packaged), 4096, frozenset({0}), keep=24 << 20)
    for number in (99991, 99989, 99971, 99961, 99929, 99923):
        few.matcher(json.dumps({"type": "number", "multipleOf": number}))
    assert sum(grammar.size for grammar in few._kept.values()) <= 24 << 20
    few.matcher(SCHEMA)
    assert few.kept(SCHEMA) is not None
    held = [few.grammar(json.dumps({"type": "number", "multipleOf": number})) for number in (99907, 99901)]
    held[0].size = 600 << 20
    with pytest.raises(Busy, match="schemas under way take 6.. MiB"):
        few.grammar(ANY_OBJECT)
    assert few.grammar(SCHEMA) is not None  # what is there already takes no more
    del held
    assert few.grammar(ANY_OBJECT) is not None


def test_a_token_that_does_not_fit_is_an_error_and_so_is_all_that_follows(grammars: Grammars, packaged: Path) -> None:
    """llguidance itself goes on with a mask that allows only the end, which would end any text as if it were whole."""
    matcher = grammars.matcher(SCHEMA)
    with pytest.raises(InputError, match="follow"):
        matcher.advance(Tokenizer(packaged).encode("x")[0])
    with pytest.raises(InputError, match="can't be followed any further"):
        matcher.allowed()
    with pytest.raises(InputError, match="can't be followed any further"):
        assert matcher.finished


@pytest.mark.parametrize(
    "schema", ['{"$ref": "#"}', '{"anyOf": [{"$ref": "#"}]}', '{"type": "string", "pattern": "("}']
)
def test_what_the_first_step_shows_is_refused_before_it(grammars: Grammars, schema: str) -> None:
    with pytest.raises(InputError, match=r"the JSON schema can't be followed: .{10,}") as told:
        grammars.matcher(schema)
    assert "\n" not in str(told.value) and "<state>" not in str(told.value)
