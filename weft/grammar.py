"""Completions that must have a given form: which tokens may come next.

Wraps llguidance. A form is a JSON schema, or a grammar that begins with speech.form's HEAD. Knows tokenizers and forms;
knows nothing of models or requests.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import psutil

from weft.errors import Busy, InputError
from weft.speech.form import HEAD, STYLE
from weft.text import Tokenizer

ANY_OBJECT = '{"type": "object"}'
KEPT, MOST_ALIVE = 64 << 20, 512 << 20  # bytes of compiled schemas that are kept; of those that requests may hold
A_CHARACTER = 300  # bytes at least; a number that others are multiples of takes a million times as much


class Grammars:
    """Compiles schemas for one tokenizer. `vocabulary`: the model's, which may be larger. `keep`: bytes of
    compiled schemas that are kept."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: frozenset[int], keep: int = KEPT) -> None:
        ends = sorted(end_ids) or None
        try:
            self._tokenizer = _tokenizer(tokenizer.serialised, vocabulary, ends)
        except ValueError:  # a decoder that llguidance doesn't know: then what each token is in bytes
            if ends is None:
                raise InputError("a JSON schema needs an end token, and this model has none") from None
            self._tokenizer = _tokenizer(_spelt(tokenizer, vocabulary, ends[0]), vocabulary, ends)
        self._keep, self._kept = keep, OrderedDict[str, Grammar]()
        self._alive: weakref.WeakSet[Grammar] = weakref.WeakSet()
        self._lock = threading.Lock()

    def kept(self, schema: str) -> Grammar | None:
        """At once, for any thread: what need not be compiled any more."""
        if (grammar := self._kept.get(schema)) is not None and self._lock.acquire(blocking=False):
            with suppress(KeyError):  # it was given up just now
                self._kept.move_to_end(schema)
            self._lock.release()
        return grammar

    def grammar(self, schema: str) -> Grammar:
        """Compiled, for any number of completions; for any thread, one at a time, so that who asks for what another one
        is at waits for that. Raises `InputError` for a schema that can't be followed, `Busy` where those of requests
        under way take too much memory already."""
        with self._lock:
            if (grammar := self._kept.pop(schema, None)) is None:
                if (taken := sum(grammar.size for grammar in self._alive)) > MOST_ALIVE:
                    raise Busy(f"the JSON schemas under way take {taken >> 20} MiB; try again later", retry_after=5)
                before = _memory()
                grammar = self._compile(schema)
                grammar.size = max(_memory() - before, A_CHARACTER * len(schema))
                self._alive.add(grammar)
            if grammar.size <= self._keep // 2:  # else all others would go for it
                self._kept[schema] = grammar
            while sum(grammar.size for grammar in self._kept.values()) > self._keep:
                self._kept.popitem(last=False)
        return grammar

    def matcher(self, schema: str) -> Matcher:
        """For one completion. Raises `InputError` for a schema that can't be followed."""
        return self.grammar(schema).matcher()

    def _compile(self, schema: str) -> Grammar:
        from llguidance import LLMatcher

        try:
            if schema.startswith(HEAD):
                grammar = LLMatcher.grammar_from_lark(schema)
            else:  # as json.dumps writes it: free white space is where small models get lost
                grammar = LLMatcher.grammar_from_json_schema(schema, defaults=STYLE)
            begun = LLMatcher(self._tokenizer, grammar, log_level=0)
            wrong = begun.get_error() if begun.is_error() else ""
            if not wrong:  # what its first step shows, nobody need wait for
                first = begun.deep_copy()
                first.compute_bitmask()
                wrong = first.get_error() if first.is_error() else ""
        except (ValueError, TypeError) as error:
            wrong = str(error)
        if wrong:
            what = "grammar" if schema.startswith(HEAD) else "JSON schema"
            raise InputError(f"the {what} can't be followed: {_line(wrong)}")
        return Grammar(begun)


def _memory() -> int:
    """Bytes of this process. What others take meanwhile is counted too, and what was freed before is not: the sum of
    all is what this process has grown by, or more."""
    return int(psutil.Process().memory_info().rss)


def _tokenizer(described: Any, vocabulary: int, ends: list[int] | None) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(described, n_vocab=vocabulary, eos_token=ends)


class _Spelt:
    """A tokenizer as llguidance wants it described."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end: int) -> None:
        self.eos_token_id = end
        self.tokens = [tokenizer.spelling.bytes_of(token) for token in range(vocabulary)]
        self.special_token_ids = sorted(tokenizer.spelling.special)
        self._by_bytes = {
            raw: token for token, raw in enumerate(self.tokens) if token not in tokenizer.spelling.special
        }
        self._longest = max(map(len, self._by_bytes))

    def __call__(self, text: bytes) -> list[int]:
        """The longest tokens first: the tokenizer's own way may put a space before a text, which is none here."""
        tokens, at = [], 0
        while at < len(text):
            lengths = range(min(self._longest, len(text) - at), 0, -1)
            length = next((n for n in lengths if text[at : at + n] in self._by_bytes), None)
            if length is not None:
                tokens.append(self._by_bytes[text[at : at + length]])
            at += length or 1
        return tokens


def _spelt(tokenizer: Tokenizer, vocabulary: int, end: int) -> Any:
    from llguidance import TokenizerWrapper

    return TokenizerWrapper(_Spelt(tokenizer, vocabulary, end))


def _line(wrong: str) -> str:
    """What llguidance says, in one line, without the grammar that it shows behind it and the place in that."""
    told = re.split(r"\n\s*\d+ \|", wrong.partition("<state>")[0])[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", told).split())[:300]


class Grammar:
    """A schema, compiled: a matcher at its beginning, to be copied, as making one takes up to a thousand times as
    long. `size`: bytes that it took."""

    def __init__(self, begun: Any) -> None:
        self._begun, self.size = begun, 0

    def matcher(self) -> Matcher:
        """For one completion."""
        return Matcher(self._begun.deep_copy(), self)


class Matcher:
    """Where one completion is in its grammar, which stays as long as this does."""

    def __init__(self, matcher: Any, grammar: Grammar) -> None:
        self._matcher, self._grammar = matcher, grammar

    def allowed(self) -> bytes:
        """A bit for every token, the lowest of each byte first: 1 if it may come next. Raises `InputError` if the
        grammar has become more than can be followed."""
        mask = bytes(self._matcher.compute_bitmask())
        self._demand_sound()  # else all that the mask allows is the end, wherever the text is
        return mask

    def advance(self, token: int) -> None:
        """This token came. Raises `InputError` if the grammar doesn't allow it."""
        if not self._matcher.consume_token(token):
            self._demand_sound()
            raise InputError(f"token {token} does not follow the JSON schema")

    def _demand_sound(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the JSON schema can't be followed any further: {_line(self._matcher.get_error())}")

    @property
    def finished(self) -> bool:
        """True if nothing more may follow."""
        self._demand_sound()
        return bool(self._matcher.is_stopped())
