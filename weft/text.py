"""Text and tokens: a checkpoint's tokenizer, and completions that end before a stop text.

Knows tokenizers and stop texts; knows nothing of models or requests.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from weft.detokenizer import Detokenizer, Spelling
from weft.errors import InputError
from weft.formats.gguf import vocabulary
from weft.formats.gguf.files import GgufFiles, is_gguf
from weft.formats.gguf.vocabulary import NONE
from weft.speech.dialect import Dialect, dialect_of, in_words

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

_importing = threading.Lock()  # transformers fails where a second thread imports it before the first one has

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either of which makes a tokenizer


class Tokenizer:
    """A checkpoint's own tokenizer, chat template and generation defaults. Raises `InputError` if unreadable."""

    def __init__(self, path: Path) -> None:
        made = _of_gguf(path) if is_gguf(path) else _of_directory(path)
        if made is None:
            raise InputError(f"{_missing(path)} is missing; give prompts as token ids, or add the tokenizer's file")
        self._hf: Any = made

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the checkpoint puts around a text."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the prompt holds half of a surrogate pair, which is no character") from None
        return list(self._hf(text)["input_ids"])

    def chat(self, messages: Messages, **options: Any) -> list[int]:
        """Token ids of a conversation, as `rendered` gives it."""
        return self.conversation(self.rendered(messages, **options))

    def rendered(
        self, messages: Messages, tools: Tools = (), options: Mapping[str, Any] | None = None, goes_on: bool = False
    ) -> str:  # fmt: skip
        """A conversation up to where the assistant's answer begins; `goes_on`: up to where its last message ends.

        Renders the checkpoint's own template in transformers' sandbox; `options` are its variables. Raises `InputError`
        if there is none, or if it refuses these messages.
        """
        if not self.has_template:
            raise InputError("this model has no chat template; give a prompt instead of messages")
        dialect = self.dialect(bool(tools))
        if dialect.told:
            messages, tools = in_words(messages, tools, _json), ()
        try:
            text = self._hf.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=not goes_on,
                continue_final_message=goes_on, **(options or {}),
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # templates raise jinja2's errors, for their own reasons
            reason = next(iter(str(error).splitlines()), "") or f"it gives no reason ({type(error).__name__})"
            raise InputError(f"the chat template refuses these messages: {reason}") from None
        return str(text)

    def conversation(self, rendered: str) -> list[int]:
        """Token ids of what a template gave; no special tokens are put around it."""
        return list(self._hf(rendered, add_special_tokens=False)["input_ids"])

    def template(self, tools: bool = False) -> str:
        """The text of the one that renders conversations; some checkpoints have another one where there are tools."""
        given = self._hf.chat_template
        if isinstance(given, dict):
            names = ("tool_use", "default") if tools else ("default",)
            given = next((given[name] for name in names if name in given), next(iter(given.values()), ""))
        return str(given or "")

    @cached_property
    def _dialects(self) -> dict[bool, Dialect]:
        return {tools: dialect_of(self.template(tools)) for tools in (False, True)}

    def dialect(self, tools: bool = False) -> Dialect:
        """How this model writes thoughts and calls."""
        return self._dialects[tools]

    @cached_property
    def special(self) -> dict[str, int]:
        """Special tokens by their texts."""
        found = ((self._hf.backend_tokenizer.id_to_token(token), token) for token in sorted(self.spelling.special))
        return {text: token for text, token in found if text}

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, special ones included."""
        return str(self._hf.decode(ids))

    @property
    def serialised(self) -> str:
        """The tokenizer in the form of `tokenizer.json`, for other libraries."""
        backend = copy(self._hf.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return str(backend.to_str())

    @property
    def described(self) -> str:
        """What it is, for people."""
        kind = type(self._hf.backend_tokenizer.model).__name__
        return f"{kind}, {len(self._hf):,} tokens"

    @property
    def has_template(self) -> bool:
        """True if conversations can be rendered."""
        return bool(self._hf.chat_template)

    @property
    def end_ids(self) -> set[int]:
        """The tokenizer's end-of-text token, if it has one."""
        return {self._hf.eos_token_id} if self._hf.eos_token_id is not None else set()

    @cached_property
    def spelling(self) -> Spelling:
        """What its tokens are in bytes and in texts that grow."""
        return Spelling(self._hf.backend_tokenizer)

    def stream(self, prompt: tuple[int, ...], skip_special_tokens: bool) -> Detokenizer:
        """Decodes what follows this prompt, token by token."""
        return self.spelling.stream(prompt, skip_special_tokens)


def tokenizer_of(path: Path) -> Tokenizer | None:
    """A checkpoint's, if it has one."""
    return Tokenizer(path) if has_tokenizer(path) else None


def has_tokenizer(path: Path) -> bool:
    """Whether there is one; it may be broken. Older checkpoints have the same in two files."""
    if is_gguf(path):
        return GgufFiles(path).header.get("tokenizer.ggml.model", str) not in NONE
    return any(all((path / name).is_file() for name in names) for names in TOKENIZER_FILES)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _missing(path: Path) -> str:
    return f"the tokenizer of {path}" if is_gguf(path) else str(path / "tokenizer.json")


def _of_directory(path: Path) -> Any:
    """transformers' tokenizer; None if there is none."""
    if not has_tokenizer(path):
        return None
    with _importing:
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers raise bare Exceptions for corrupt files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: the tokenizer can't be read ({reason}); download it again") from None


def _of_gguf(path: Path) -> Any:
    with _importing:
        import transformers  # noqa: F401

    return vocabulary.tokenizer_of(GgufFiles(path).header)


def reading_tokenizer(path: Path) -> Callable[[], Tokenizer | None]:
    """The same on a thread, from now on: importing what reads it takes about as long as workers take to start. What is
    returned waits for it, and raises what went wrong."""
    reader = ThreadPoolExecutor(1, "weft-tokenizer")
    reading = reader.submit(tokenizer_of, path)
    reader.shutdown(wait=False)
    return reading.result


def leave_torch_out() -> None:
    """For a process that computes nothing: transformers then takes torch for not installed and does without, which
    spares 2 seconds and 220 MB. Nothing that needs torch can be imported from then on, unless it is there already."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


class StopText:
    """A growing text that ends before the first of some stop texts, and what of it can be shown already."""

    def __init__(self, stops: tuple[str, ...], keep_stop: bool) -> None:
        self._stops, self._keep_stop = stops, keep_stop
        self._closed = 0  # characters in which no stop text ends
        self.text = ""
        self.stopped: str | None = None

    def grow(self, more: str) -> None:
        """Appends; cuts the text at the earliest stop text that `more` completes."""
        tokens = self._found(more)
        self.text += more
        if tokens is not None:
            at, self.stopped = tokens
            self.text = self.text[: at + (len(self.stopped) if self._keep_stop else 0)]

    def go_on(self, ahead: str = "") -> None:
        """No stop text ends in what there is, nor in what is ahead of it: the text must be longer."""
        self._closed = len(self.text) + len(ahead)

    def would_stop(self, more: str) -> bool:
        """Whether `more` completes a stop text."""
        return self._found(more) is not None

    def _found(self, more: str) -> tuple[int, str] | None:
        if not (self._stops and more):
            return None
        begin = max(0, len(self.text) - max(map(len, self._stops)))
        tail, end = self.text[begin:] + more, max(len(self.text), self._closed) - begin
        places = ((tail.find(stop, max(0, end - len(stop) + 1)), stop) for stop in self._stops)
        return min(((begin + at, stop) for at, stop in places if at >= 0), default=None)

    @property
    def settled(self) -> int:
        """Characters that no stop text can take back any more."""
        if self.stopped is not None:
            return len(self.text)
        held = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:length]):
                    held = length
                    break
        return len(self.text) - held
