"""An answer's text, as it grows, taken apart: what is said, what is only thought, and calls of tools.

Whatever comes in whichever pieces, the parts come to the same. What turns out to be no call is said as it is. Knows
dialects; knows nothing of tokens, requests or JSON beyond where a value ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from weft.speech.dialect import Dialect

KEYS = ("arguments", "parameters")
_BEGUN = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\\n]|\\.)*")\s*,\s*"(?:' + "|".join(KEYS) + r')"\s*:\s*(?=\{)'
)  # a call's beginning, up to its arguments


class Speech(NamedTuple):
    """How an answer's text is to be taken apart: `tools` that may be called, whether it begins inside a thought,
    whether special tokens are left out of what is said, and whether it goes on with one that has begun."""

    tools: list[str]
    thinking: bool
    hides: bool
    goes_on: bool = False


class Said(NamedTuple):
    """A piece of the answer."""

    text: str


class Thought(NamedTuple):
    """A piece of what comes before it."""

    text: str


class Called(NamedTuple):
    """A call begins; its arguments follow, if it has any."""

    name: str


class Given(NamedTuple):
    """A piece of the last call's arguments, as JSON."""

    text: str


Part = Said | Thought | Called | Given


class Listener(Protocol):
    """Of one answer."""

    def grow(self, more: str) -> list[Part]:
        """What these characters make known."""
        ...

    def end(self) -> list[Part]:
        """What is left when nothing more comes."""
        ...


def listener(
    dialect: Dialect, tools: Collection[str], thinking: bool, hidden: Collection[str] = (), goes_on: bool = False
) -> Listener:  # fmt: skip
    """For an answer to a prompt with these tools. `thinking`: it begins inside a thought; `hidden`: texts of special
    tokens, which are no text; `goes_on`: it continues one that has begun, so that spaces before it count."""
    if dialect.channels is not None:
        return _Messages(dialect, tools)
    return _Marked(dialect, tools, thinking, hidden, goes_on)


class _Value:
    """Where a JSON object ends."""

    _OUTSIDE, _INSIDE = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth, self._inside, self._escaped = 0, False, False

    def length(self, text: str, start: int = 0) -> int | None:
        """Up to where in a text that goes on, if it ends there."""
        at = start
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (self._INSIDE if self._inside else self._OUTSIDE).search(text, at)
            if found is None:
                return None
            at = found.end()
            match found[0]:
                case "\\":
                    self._escaped = True
                case '"':
                    self._inside = not self._inside
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None


class _Marks:
    """Texts that are looked for in every token's text: a tokenizer may have a thousand special ones."""

    def __init__(self, marks: Collection[str]) -> None:
        longest_first = sorted(marks, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._begun = frozenset(mark[:n] for mark in marks for n in range(1, len(mark)))
        self._most = max(map(len, self._begun), default=0)

    def first(self, text: str) -> tuple[int, str] | None:
        """The first of them in a text, the longest of those that begin there."""
        found = self._any.search(text)
        return (found.start(), found[0]) if found is not None else None

    def held(self, text: str) -> int:
        """How many characters at a text's end may be the beginning of one."""
        most = min(len(text), self._most)
        return next((n for n in range(most, 0, -1) if text[-n:] in self._begun), 0)


@lru_cache(maxsize=32)
def _marks(marks: frozenset[str]) -> _Marks:
    """The same for all answers of a model: there are few sets of them."""
    return _Marks(marks - {""})


class _Marked:
    """Thoughts and calls between marks."""

    def __init__(
        self, dialect: Dialect, tools: Collection[str], thinking: bool, hidden: Collection[str], goes_on: bool
    ) -> None:  # fmt: skip
        self._syntax, self._tools = dialect.calls, tools
        self._begin, self._end = dialect.thoughts or ("", "")
        self._hidden = {*hidden, *dialect.dropped} - {*dialect.marks}
        self._saying = _marks(frozenset({*self._hidden, self._begin, self._syntax.mark if tools else ""}))
        self._thinking = _marks(frozenset({*self._hidden, self._begin, self._end}))
        self._text, self._raw = "", ""  # not yet known; since a mark, if it turns out to be none
        self._value = _Value()
        self._step = self._think if thinking else self._say
        self._fresh = not goes_on  # nothing of the present part was told
        self._spaces = ""  # at its end so far
        self._said, self._called = goes_on, False
        skipped = (self._syntax.mark, self._syntax.again, self._syntax.closing, self._syntax.opening,
                   self._syntax.after.removeprefix("}"))  # fmt: skip
        self._skipped = sorted({each.strip() for each in skipped} - {""}, key=len, reverse=True)
        self._ended = False

    def grow(self, more: str) -> list[Part]:
        """See `Listener`."""
        self._text += more
        parts: list[Part] = []
        while True:
            before = self._step, len(self._text), len(parts)
            parts += self._step()
            if before == (self._step, len(self._text), len(parts)):
                return parts

    def end(self) -> list[Part]:
        """See `Listener`."""
        self._ended = True
        parts = self.grow("")
        if self._step == self._look and not self._called:  # one that was only begun behind others is not told of
            parts += self._no_call()
            parts += self.grow("")
        return parts

    def _told(self, kind: type[Said] | type[Thought], text: str, last: bool) -> Iterator[Part]:
        """A piece of a part without the spaces around all of it. `last`: it ends with that."""
        if self._trimmed(kind):
            text = text.lstrip() if self._fresh else self._spaces + text
            kept = text.rstrip()
            text, self._spaces = kept, "" if last else text[len(kept) :]
        if text:
            self._fresh = False
            yield kind(text)

    def _trimmed(self, kind: type[Said] | type[Thought]) -> bool:
        return kind is Thought or bool(self._tools) or bool(self._begin)

    def _up_to(self, marks: _Marks) -> tuple[str, str]:
        """What comes before the first of these marks, and the mark; none, before what may be the beginning of one."""
        at, mark = marks.first(self._text) or (len(self._text) - (0 if self._ended else marks.held(self._text)), "")
        text, self._text = self._text[:at], self._text[at + len(mark) :]
        return text, mark

    def _say(self) -> Iterator[Part]:
        if self._tools and not self._syntax.mark and not self._said and self._text.lstrip().startswith("{"):
            self._text, self._raw, self._step = self._text.lstrip(), "", self._look
            return
        text, mark = self._up_to(self._saying)
        self._said = self._said or bool(text.strip())
        yield from self._told(Said, text, mark == self._begin if mark else self._ended)
        if mark and mark == self._begin:
            self._fresh, self._step = True, self._think
        elif mark and mark not in self._hidden:
            self._raw, self._step = mark, self._look

    def _think(self) -> Iterator[Part]:
        text, mark = self._up_to(self._thinking)
        yield from self._told(Thought, text, mark == self._end if mark else self._ended)
        if mark == self._end:
            self._fresh, self._step = True, self._say

    def _look(self) -> Iterator[Part]:
        """For the next call, or for what is none."""
        yield from ()
        rest = self._text.lstrip()
        skipped = next((each for each in self._skipped if rest.startswith(each)), None)
        longer = (*self._skipped, self._syntax.before.strip()) if skipped is None else self._skipped
        begun = not rest or any(each != rest and each.startswith(rest) for each in longer)
        if begun and not (self._ended and not self._called):  # what closes calls may be cut short
            return
        if skipped is None and rest[:1] in (*";,[]",) and self._syntax.is_object:
            skipped = rest[0]
        if skipped is not None:
            again = not self._called or skipped == self._syntax.mark
            self._raw = self._raw + self._text[: len(self._text) - len(rest) + len(skipped)] if again else ""
            self._text = rest[len(skipped) :]
            return
        parts = self._object(rest) if self._syntax.is_object else self._named(rest)
        if parts is None:
            return
        yield from parts

    def _object(self, rest: str) -> list[Part] | None:
        if not rest.startswith("{"):
            return self._no_call()
        begun = _BEGUN.match(rest)
        if begun is not None and (name := _text_of(begun[1])) in self._tools:
            self._answered()
            self._text, self._value, self._step = rest[begun.end() :], _Value(), self._argue
            return [Called(name)]
        length = _Value().length(rest)
        if length is None:
            return None
        call = _call_of(rest[:length])
        if call is None or call[0] not in self._tools:
            return self._no_call()
        self._answered()
        self._raw, self._text = "", rest[length:]
        return [Called(call[0]), Given(call[1])]

    def _answered(self) -> None:
        """A call is one: the spaces before it are of no text, and what follows it is another one."""
        self._called, self._fresh, self._spaces = True, True, ""

    def _named(self, rest: str) -> list[Part] | None:
        before, between = self._syntax.before, self._syntax.between
        if not rest.startswith(before):
            return None if before.startswith(rest) and not self._ended else self._no_call()
        at = rest.find(between.strip(), len(before))
        if at < 0:
            return None if len(rest) < len(before) + 300 and not self._ended else self._no_call()
        name = rest[len(before) : at].partition("[CALL_ID]")[0].strip()
        behind = rest[at + len(between.strip()) :].lstrip()
        if not behind and not self._ended:
            return None
        if name not in self._tools or not behind.startswith("{"):
            return self._no_call()
        self._answered()
        self._text, self._value, self._step = behind, _Value(), self._argue
        return [Called(name)]

    def _argue(self) -> Iterator[Part]:
        """Arguments, up to where they end."""
        self._raw = ""
        length = self._value.length(self._text)
        text = self._text if length is None else self._text[:length]
        self._text = self._text[len(text) :]
        if text:
            yield Given(text)
        if length is not None:
            self._step = self._close if self._syntax.is_object else self._look

    def _close(self) -> Iterator[Part]:
        """What an object has behind its arguments."""
        yield from ()
        inner = _Value()
        inner.length("{")
        length = inner.length(self._text)
        if length is not None or self._ended:
            self._text = self._text[length or len(self._text) :]
            self._step = self._look

    def _no_call(self) -> list[Part]:
        """Back to what is said: all since the mark, if there was no call yet."""
        self._text, self._raw = self._raw + self._text, ""
        self._said, self._step = True, self._say
        mark = self._syntax.mark
        if not mark or not self._text.startswith(mark):
            return []
        self._text = self._text[len(mark) :]  # it is not looked at again
        return list(self._told(Said, mark, False))


def _text_of(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


def _call_of(text: str) -> tuple[str, str] | None:
    """The name and arguments of a call, if that is one."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(given.get("function"), dict):
        given = given["function"]
    arguments: Any = next((given[key] for key in KEYS if key in given), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(given.get("name"), str) or not isinstance(arguments, dict):
        return None
    return given["name"], json.dumps(arguments)  # in ASCII: half of a surrogate pair is no character


class _Messages:
    """Messages with headers."""

    def __init__(self, dialect: Dialect, tools: Collection[str]) -> None:
        assert dialect.channels is not None
        self._marks, self._tools = dialect.channels, tools
        self._between = _marks(frozenset({self._marks.header, self._marks.start, *self._marks.ends}))
        self._text = ""
        self._kind: type[Said] | type[Thought] | type[Given] = Said
        self._header: str | None = None
        self._ended = False

    def grow(self, more: str) -> list[Part]:
        """See `Listener`."""
        self._text += more
        parts: list[Part] = []
        while True:
            before = len(self._text), self._header
            parts += self._body() if self._header is None else self._heading()
            if before == (len(self._text), self._header):
                return parts

    def end(self) -> list[Part]:
        """See `Listener`."""
        self._ended = True
        return self.grow("")

    def _body(self) -> list[Part]:
        marks = self._marks
        found = self._between.first(self._text)
        held = 0 if self._ended else self._between.held(self._text)
        at = found[0] if found is not None else len(self._text) - held
        text, self._text = self._text[:at], self._text[at + len(found[1]) if found else at :]
        if found is not None:
            self._header = "" if found[1] in (marks.header, marks.start) else None
        kind = self._kind
        if found is not None and found[1] in marks.ends:
            self._kind = Said
        return [kind(text)] if text else []

    def _heading(self) -> list[Part]:
        """What a message is, once its header is whole."""
        head, begin, rest = self._text.partition(self._marks.begin)
        if not begin:
            return []
        self._text, self._header = rest, None
        called = re.search(re.escape(self._marks.call) + r"([\w.-]+)", head)
        if called is not None and called[1] in self._tools:
            self._kind = Given
            return [Called(called[1])]
        self._kind = Thought if self._marks.thought in head else Said
        return []
