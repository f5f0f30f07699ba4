"""What families write around thoughts and calls of tools, as data: a row each, found by what a chat template says.

Knows texts; knows nothing of tokenizers, grammars or requests.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written: `mark opening (before NAME between ARGUMENTS after), again …, closing`.

    mark: what no other text has, so that free text may come before it; without one, an answer is calls from its
    beginning on or has none. An object (`before` begins one) may come with its keys in any order and with others beside
    them, where it isn't held to this form.
    """

    mark: str
    before: str
    between: str
    after: str
    opening: str = ""
    again: str = ""
    closing: str = ""

    @property
    def is_object(self) -> bool:
        """Whether a call is a JSON object, with its name and arguments in it."""
        return self.before.lstrip().startswith("{")


@dataclass(frozen=True)
class Channels:
    """Answers in messages, each with a header that says what it is (gpt-oss's harmony)."""

    header: str = "<|channel|>"
    begin: str = "<|message|>"
    ends: tuple[str, ...] = ("<|end|>", "<|return|>", "<|call|>")
    start: str = "<|start|>"
    thought: str = "analysis"
    answer: str = "final"
    call: str = "to=functions."


@dataclass(frozen=True)
class Dialect:
    """A family's. `thoughts`: what stands around them; None where there are none. `told`: its template knows no tools,
    and they are told of in words. `dropped`: marks that are no text of an answer."""

    name: str
    calls: CallSyntax
    thoughts: tuple[str, str] | None = None
    channels: Channels | None = None
    told: bool = False
    dropped: tuple[str, ...] = ()
    short_ids: bool = False  # calls are known by nine letters and digits

    @property
    def thought_ends(self) -> tuple[str, ...]:
        """What no thought goes beyond."""
        if self.channels is not None:
            return f"{self.channels.header}{self.channels.answer}", self.calls.mark
        return self.thoughts[1:] if self.thoughts is not None else ()

    def call_id(self, known: str = "") -> str:
        """A new call's, or what one that is `known` by another name is called here."""
        if not self.short_ids:
            return known or f"call_{secrets.token_hex(12)}"
        if re.fullmatch("[a-zA-Z0-9]{9}", known):
            return known
        return hashlib.sha256(known.encode()).hexdigest()[:9] if known else secrets.token_hex(5)[:9]

    @property
    def marks(self) -> tuple[str, ...]:
        """What an answer is looked through for."""
        return tuple(filter(None, (self.calls.mark, *(self.thoughts or ()))))


HERMES = CallSyntax(
    "<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>", again="\n<tool_call>",
)  # fmt: skip
CALLS: dict[str, CallSyntax] = {
    "hermes": HERMES,
    "llama3": CallSyntax("", '{"name": "', '", "parameters": ', "}", again="; "),
    "mistral-list": CallSyntax(
        "[TOOL_CALLS]", '{"name": "', '", "arguments": ', "}", opening=" [", again=", ", closing="]",
    ),
    "mistral-args": CallSyntax("[TOOL_CALLS]", "", "[ARGS]", "", again="[TOOL_CALLS]"),
    "deepseek": CallSyntax(
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n",
        "\n```<｜tool▁call▁end｜>", again="\n", closing="<｜tool▁calls▁end｜>",
    ),
    "deepseek-v3.1": CallSyntax(
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
        closing="<｜tool▁calls▁end｜>",
    ),
    "harmony": CallSyntax(
        "<|channel|>commentary to=functions.", "", " <|constrain|>json<|message|>", "",
    ),
}  # fmt: skip
# Texts that a template has where its family writes so; the first row that has all of its own counts.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral-args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral-list", ("[TOOL_CALLS]",)),
    ("deepseek", ("tool▁calls▁begin", "```json")),
    ("deepseek-v3.1", ("tool▁calls▁begin",)),
    ("hermes", ("<tool_call>", "tools")),
    ("llama3", ('"parameters"', "ipython", "tools")),
)
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
            ("<reasoning>", "</reasoning>"))  # fmt: skip


def dialect_of(template: str) -> Dialect:
    """By a chat template. One that knows no tools has them told in words, and calls written as Hermes writes them."""
    name = next((name for name, signs in SIGNS if all(sign in template for sign in signs)), "")
    thoughts = next((pair for pair in THOUGHTS if pair[1] in template), None)
    if name == "harmony":
        return Dialect(name, CALLS[name], None, Channels())
    dropped = ("<|python_tag|>",) if name == "llama3" else ()
    short = name in ("mistral-list", "mistral-args")
    return Dialect(name or "words", CALLS.get(name, HERMES), thoughts, None, not name, dropped, short)


WORDS = """You may call these functions to answer. To call one, write nothing but

<tool_call>
{"name": "its name", "arguments": {its arguments}}
</tool_call>

as often as there are calls; what they give comes in the next message. Functions, with JSON schemas of their arguments:
"""


def in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], dump: Callable[[Any], str]
) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: what there are stands in the system's message, calls and what they
    gave in the assistant's and the user's. `dump`: an object as JSON."""
    made: list[dict[str, Any]] = []
    for message in messages:
        plain: dict[str, Any] = {"role": message["role"], "content": message.get("content") or ""}
        if message["role"] == "tool":
            plain = {"role": "user", "content": f"<tool_response>\n{plain['content']}\n</tool_response>"}
        calls = [
            f"{HERMES.mark}{HERMES.before}{each['function']['name']}{HERMES.between}"
            f"{dump(each['function']['arguments'])}{HERMES.after}"
            for each in message.get("tool_calls") or ()
        ]  # fmt: skip
        plain["content"] = "\n".join(filter(None, [plain["content"], *calls]))
        if made and made[-1]["role"] == "user" and message["role"] == "tool":  # many templates want roles in turns
            made[-1] = {"role": "user", "content": f"{made[-1]['content']}\n{plain['content']}"}
        else:
            made.append(plain | ({"name": message["name"]} if "name" in message and message["role"] != "tool" else {}))
    if not tools:
        return made
    told = WORDS + "\n".join(dump(tool["function"]) for tool in tools)
    if made and made[0]["role"] == "system":
        return [{"role": "system", "content": f"{made[0]['content']}\n\n{told}"}, *made[1:]]
    return [{"role": "system", "content": told}, *made]


def thinks_already(dialect: Dialect, prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought."""
    return dialect.thoughts is not None and prompt.rstrip().endswith(dialect.thoughts[0])
