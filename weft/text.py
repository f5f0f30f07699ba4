"""Text and tokens: a checkpoint's tokenizer, and completions that grow by whole characters.

Knows the tokenizer's files and stop texts; knows nothing of models or requests.
"""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from weft.errors import InputError


class Tokenizer:
    """A checkpoint's own tokenizer, chat template and generation defaults. Raises `InputError` if unreadable."""

    def __init__(self, directory: Path) -> None:
        if not (directory / "tokenizer.json").is_file():
            raise InputError(
                f"{directory / 'tokenizer.json'} is missing; give prompts as token ids, or add the tokenizer's file"
            )
        from transformers import AutoTokenizer

        try:
            self._hf: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:  # tokenizers and transformers raise bare Exceptions for corrupt files
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{directory}: the tokenizer can't be read ({reason}); download it again") from None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the checkpoint puts around a text."""
        return list(self._hf(text)["input_ids"])

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Renders the checkpoint's own template in transformers' sandbox. Raises `InputError` if there is none, or if
        it refuses these messages.
        """
        if not self._hf.chat_template:
            raise InputError("this model has no chat template; give a prompt instead of messages")
        try:
            ids = self._hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates raise jinja2's errors, for their own reasons
            raise InputError(f"the chat template refuses these messages: {str(error).splitlines()[0]}") from None
        return list(ids)

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
    def has_template(self) -> bool:
        """True if conversations can be rendered."""
        return bool(self._hf.chat_template)

    @property
    def end_ids(self) -> set[int]:
        """The tokenizer's end-of-text token, if it has one."""
        return {self._hf.eos_token_id} if self._hf.eos_token_id is not None else set()

    def stream(self, prompt: tuple[int, ...], skip_special_tokens: bool) -> Detokenizer:
        """Decodes what follows this prompt, token by token."""
        return Detokenizer(self._hf.backend_tokenizer, prompt, skip_special_tokens)


class Detokenizer:
    """Tokens in, whole characters out: bytes of an unfinished character wait for the next token."""

    def __init__(self, backend: Any, prompt: tuple[int, ...], skip_special_tokens: bool) -> None:
        self._backend = backend
        # The last tokens of the prompt tell whether a leading space belongs to the first word.
        self._stream = DecodeStream(ids=list(prompt[-8:]), skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str:
        """The characters that this token completes; often its own, sometimes none."""
        return self._stream.step(self._backend, token) or ""


class StopText:
    """A growing text that ends before the first of some stop texts, and what of it can be shown already."""

    def __init__(self, stops: tuple[str, ...], keep_stop: bool) -> None:
        self._stops, self._keep_stop = stops, keep_stop
        self.text = ""
        self.stopped: str | None = None

    def grow(self, more: str) -> None:
        """Appends; cuts the text at the earliest stop text that is now in it."""
        searched = max(0, len(self.text) - max((len(stop) for stop in self._stops), default=0) + 1)
        self.text += more
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            at, self.stopped = min(found)
            self.text = self.text[: at + (len(self.stopped) if self._keep_stop else 0)]

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


def generation_defaults(directory: Path) -> dict[str, Any]:
    """The content of `generation_config.json`, or nothing if there is none."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} can't be read as JSON ({error}); delete it or download it again") from None
    return data if isinstance(data, dict) else {}
