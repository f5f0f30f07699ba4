"""The form that an answer must have, as a grammar for llguidance: free text, thoughts, calls held to their schemas.

Special tokens are no text there, and are named by their number. Knows dialects and schemas; knows no tokenizer beyond
the numbers of its special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import InputError
from weft.speech.dialect import CallSyntax, Dialect

HEAD = "%llguidance {}\n"  # what such a grammar begins with
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
TEXT, SPACE = r"/(.|\n)*/", r"/[ \n]{0,2}/"
NO_OBJECT = r"/([^{](.|\n)*)?/"  # what begins otherwise


@dataclass(frozen=True)
class Tools:
    """What may be called. `schemas`: of arguments, by name; `must`: at least one call; `several`: more than one may
    be."""

    schemas: Mapping[str, Mapping[str, Any]]
    must: bool = False
    several: bool = True


def form(
    dialect: Dialect, special: Mapping[str, int], thinking: bool, tools: Tools | None = None, answer: str = ""
) -> str:  # fmt: skip
    """For answers in a dialect, with calls of tools, or an `answer` of a rule's right side, or either. `special`:
    numbers of special tokens, by their texts; `thinking`: the answer begins inside a thought. Raises `InputError`."""
    writing = _Writing(special)
    if dialect.channels is not None:
        return writing.channels(dialect, tools, answer)
    free = tools is not None and not (answer or tools.must)  # thoughts are text like any other, then
    if tools is not None:
        answer = writing.calls(dialect, tools, answer)
    before = "" if free and not writing.apart(dialect) else writing.thoughts(dialect, thinking)
    return HEAD + f"start: {before} {answer}\n" + "".join(writing.rules)


def of_schema(schema: Mapping[str, Any] | bool) -> str:
    """A rule's right side, of JSON that a schema describes, as `json.dumps` writes it."""
    plain = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return "%json " + json.dumps({"x-guidance": STYLE} | plain)


def of_pattern(pattern: str) -> str:
    """Of a regular expression."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern) + "/"


def of_choices(texts: Sequence[str]) -> str:
    """Of one of some texts."""
    return "(" + " | ".join(map(json.dumps, texts)) + ")"


class _Writing:
    """Rules, as they come up."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special, self.rules = special, list[str]()

    def spelled(self, text: str) -> str:
        """A text with the special tokens in it."""
        if not text:
            return ""
        names = sorted((name for name in self._special if name in text), key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
        named = (f"<[{self._special[each]}]>" if each in names else json.dumps(each) for each in pieces if each)
        return " ".join(named)

    def rule(self, name: str, right: str) -> str:
        """One more; its name."""
        self.rules.append(f"{name}: {right}\n")
        return name.partition("[")[0]

    def until(self, name: str, mark: str) -> str:
        """Any text up to a mark, with it."""
        if mark in self._special:
            return self.rule(name, f"{self.rule(f'{name.upper()}_TEXT', TEXT)} {self.spelled(mark)}")
        return self.rule(f"{name}[lazy]", f"{TEXT} {json.dumps(mark)}")

    def apart(self, dialect: Dialect) -> bool:
        """Whether thoughts stand between special tokens, which free text can't have."""
        return dialect.thoughts is not None and any(mark in self._special for mark in dialect.thoughts)

    def thoughts(self, dialect: Dialect, thinking: bool) -> str:
        """What may come before an answer that isn't free."""
        if dialect.thoughts is None:
            return ""
        begin, end = dialect.thoughts
        space = self.rule("SPACE", SPACE)
        rest = f"{self.until('thought', end)} {space}"
        return rest if thinking else f"({self.spelled(begin)} {rest})?"

    def calls(self, dialect: Dialect, tools: Tools, answer: str) -> str:
        """Calls, and what may stand in their place: an answer, or what one likes."""
        syntax = dialect.calls
        each = self._any_call(syntax, tools)
        again = f" ({self.spelled(syntax.again)} {each})*" if tools.several else ""
        behind = f"{self.spelled(syntax.opening)} {each}{again} {self.spelled(syntax.closing)}"
        if tools.must:
            return f"{self.spelled(syntax.mark)} {behind}"
        if answer and not syntax.mark:
            raise InputError("this model writes calls without a mark, so that an answer in a form of its own can't be "
                             "told from them; leave out the tools or the form")  # fmt: skip
        if answer:
            return f"({self.spelled(syntax.mark)} {behind} | {answer})"
        if not syntax.mark:
            return f"({behind} | {self.rule('FREE', NO_OBJECT)})"
        return f"({self.until('head', syntax.mark)} {behind} | {self.rule('FREE', TEXT)})"

    def _any_call(self, syntax: CallSyntax, tools: Tools) -> str:
        each = (self._call(syntax, *tool, number) for number, tool in enumerate(tools.schemas.items()))
        return self.rule("call", " | ".join(each))

    def _call(self, syntax: CallSyntax, name: str, schema: Mapping[str, Any], number: int) -> str:
        quoted = json.dumps(name)[1:-1] if syntax.is_object else name
        parts = self.spelled(syntax.before + quoted + syntax.between), of_schema(schema), self.spelled(syntax.after)
        return self.rule(f"call_{number}", " ".join(filter(None, parts)))

    def channels(self, dialect: Dialect, tools: Tools | None, answer: str) -> str:
        """Messages: thoughts, what is said, and at last a call or the answer."""
        marks = dialect.channels
        assert marks is not None
        text, ended = self.rule("MESSAGE", TEXT), self.until("ended", marks.ends[0])
        start = self.spelled(f"{marks.start}assistant")

        def message(kind: str) -> str:
            return self.spelled(f"{marks.header}{kind}{marks.begin}")

        before = f"(({message(marks.thought)} | {message('commentary')}) {ended} {start})*"
        last = [f"{message(marks.answer)} {answer or text}"]
        if tools is not None:
            each = self._any_call(dialect.calls, tools)
            called = f"{self.spelled(dialect.calls.mark)} {each} {self.spelled(marks.ends[2])}"
            last = [called] if tools.must else [called, *last]
        return HEAD + f"start: {before} ({' | '.join(last)})\n" + "".join(self.rules)
