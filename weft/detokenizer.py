"""Tokens to text: what each token is in bytes, and texts that grow by whole characters.

A text is what its tokens give when they are decoded together, however they come: bytes that are no character are
U+FFFD, and a character that is not complete waits. What a prompt ends with never comes out again. Knows one tokenizer;
knows nothing of models, requests or stop texts.

Tokenizers are of three kinds. Byte-level ones (GPT-2, Llama 3, Qwen): every token is bytes, and the text is those bytes
as UTF-8. Byte-fallback ones (Llama 2, Mistral): tokens are texts, beside 256 that are single bytes, and a run of those
is decoded in one piece: all of it is text, or every byte of it is U+FFFD. Plain ones: tokens are texts.
"""

from __future__ import annotations

import codecs
import json
import re
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _characters_as_bytes() -> dict[str, int]:
    """How byte-level tokenizers write bytes (GPT-2's table): printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _characters_as_bytes()  # by the character that byte-level tokenizers write for it


class Spelling:
    """What the tokens of one tokenizer (of the library tokenizers) are."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        kinds = _kinds(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else set()
        self._byte_level = "ByteLevel" in kinds
        self._fallback = "ByteFallback" in kinds

    def stream(self, prompt: tuple[int, ...], skip_special_tokens: bool) -> Detokenizer:
        """The text of what follows this prompt."""
        if self._byte_level:
            return _ByteLevel(self, skip_special_tokens)
        return _Pieces(self, skip_special_tokens, self.last_seen(prompt, skip_special_tokens))

    def last_seen(self, tokens: tuple[int, ...], skip_special_tokens: bool) -> int | None:
        """The last token that the text shows, or may show."""
        return next((t for t in reversed(tokens) if not self.hidden(t, skip_special_tokens)), None)

    def hidden(self, token: int, skip_special_tokens: bool) -> bool:
        """True for what leaves no trace in a text: special tokens if they are left out, and ids without a token."""
        return (skip_special_tokens and token in self.special) or self._backend.id_to_token(token) is None

    def byte_of(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for."""
        match = _BYTE.fullmatch(self._backend.id_to_token(token) or "") if self._fallback else None
        return int(match[1], 16) if match else None

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes, as it stands inside a text; none for ids without a token."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            spelled = all(character in BYTES for character in piece)
            return bytes(BYTES[character] for character in piece) if spelled else piece.encode()
        byte = self.byte_of(token)
        return bytes([byte]) if byte is not None else self.between(token, token).encode()

    def text_of(self, token: int) -> str:
        """A token as text; where it is a part of a character, as OpenAI writes it: `bytes:\\xe2\\x82`."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def between(self, before: int | None, token: int) -> str:
        """The text that a token adds behind another one, or at the beginning; special ones are shown."""
        earlier = self._decode([before]) if before is not None else ""
        both = self._decode([before, token] if before is not None else [token])
        return both[len(earlier) :] if both.startswith(earlier) else self._decode([token])

    def _decode(self, tokens: list[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=False))

    @cached_property
    def space_is_dropped(self) -> bool:
        """True if a text loses the space that it begins with: decoded, a single byte for it leaves nothing."""
        space = self._backend.token_to_id("<0x20>")
        return space is not None and self._decode([space]) == ""


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The names of a decoder's parts, nested ones too."""
    if decoder is None:
        return set()
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


class Detokenizer(Protocol):
    """Tokens in, whole characters out. `offsets`: for every token whose place is known, the characters of the text
    before the one in which it begins; the other tokens, and their text, are waited for."""

    offsets: list[int]

    def step(self, token: int) -> str:
        """The characters that this token completes; often its own, sometimes none."""
        ...

    def end(self) -> str:
        """What is left when nothing more comes."""
        ...

    @property
    def ahead(self) -> str:
        """What `end` would give, if that is characters all through."""
        ...


class _ByteLevel:
    """Bytes to UTF-8, as they come."""

    def __init__(self, spelling: Spelling, skip_special_tokens: bool) -> None:
        self._spelling, self._skip = spelling, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self.offsets: list[int] = []

    def step(self, token: int) -> str:
        raw = b"" if self._spelling.hidden(token, self._skip) else self._spelling.bytes_of(token)
        begun = self._decoder.getstate()[0]
        ended = bool(begun and raw) and not _continues(begun, raw[:1])  # the character that was begun ends as U+FFFD
        self.offsets.append(self._length + ended)
        return self._counted(self._decoder.decode(raw))

    def end(self) -> str:
        return self._counted(self._decoder.decode(b"", final=True))

    ahead = ""  # an unfinished character is none

    def _counted(self, text: str) -> str:
        self._length += len(text)
        return text


def _continues(begun: bytes, more: bytes) -> bool:
    """Whether a character goes on with these bytes."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(begun + more)
    except UnicodeDecodeError:
        return False
    return True


class _Pieces:
    """Texts one after the other, and runs of single bytes between them. `before`: the last token that was seen."""

    def __init__(self, spelling: Spelling, skip_special_tokens: bool, before: int | None) -> None:
        self._spelling, self._skip, self._before = spelling, skip_special_tokens, before
        self._run, self._last = bytearray(), before
        self._places: list[int] = []  # of the tokens since the run began: how many of its bytes came before
        self._length = 0
        self.offsets: list[int] = []

    def step(self, token: int) -> str:
        hidden = self._spelling.hidden(token, self._skip)
        byte = None if hidden else self._spelling.byte_of(token)
        if byte is not None or (hidden and self._run):
            self._places.append(len(self._run))
            self._run += bytes([byte]) if byte is not None else b""
            self._last = token if byte is not None else self._last
            return ""
        text = self.end()
        self.offsets.append(self._length)
        if hidden:
            return text
        own = self._spelling.between(self._before, token)
        self._before = token
        self._length += len(own)
        return text + own

    def end(self) -> str:
        if not self._run:
            return ""
        text, lost = self._text(), self._leading
        self.offsets += [self._length + max(0, index - lost) for index in self._indices()]
        self._before = self._last
        self._run.clear()
        self._places.clear()
        self._length += len(text)
        return text

    @property
    def ahead(self) -> str:
        return self._text() if self._valid else ""

    @property
    def _valid(self) -> bool:
        return self._run.decode(errors="ignore").encode() == self._run

    @property
    def _leading(self) -> bool:
        """True if the run begins the text with a space that the text loses."""
        return self._before is None and self._valid and self._run[:1] == b" " and self._spelling.space_is_dropped

    def _text(self) -> str:
        text = self._run.decode() if self._valid else UNKNOWN * len(self._run)
        return text[self._leading :]

    def _indices(self) -> list[int]:
        """In the run's text, of the characters in which its tokens begin."""
        if not self._valid:
            return self._places
        starts = [byte & 0xC0 != 0x80 for byte in self._run]
        begun = list(accumulate([*starts, True]))  # characters, with the one at that place
        return [begun[place] - 1 for place in self._places]
