"""Embeddings, and what is made of them: similarities and rankings. What requests may say, and the form of answers.

Knows JSON and vectors; knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from pydantic import Field, field_validator

from weft.batching.params import shown
from weft.embedding import Vector, unit
from weft.errors import InputError
from weft.server.answers import Json, Usage
from weft.server.manner import OLLAMA, OPENAI
from weft.server.schema import Count, Tokens
from weft.server.strict import Strict, demand_unicode

MOST_INPUTS = 2048  # texts of one request
PIECE = 1 << 16  # bytes of an answer that are sent in one go
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
Inputs = str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
Given = str | list[int]  # a text, or its tokens
Pooling = Literal["mean", "last"]


class Vectors(Strict):
    """What all requests for vectors have in common."""

    model: str | None = None
    pooling: Annotated[Pooling | None, Field(description="mean of the tokens, or the last one; else the model's")] = (
        None
    )
    priority: Annotated[int, Field(ge=-1000, le=1000, description="lower runs earlier")] = 0
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds until the request ends")] | None = None
    user: str | None = None

    @property
    def truncates(self) -> bool:
        """What is longer than the context is cut."""
        return False

    def texts(self) -> list[Given]:
        """What becomes a vector, each."""
        raise NotImplementedError

    def about(self) -> Json:
        """What the answer needs to know of the request."""
        raise NotImplementedError


def _unicode(value: Any) -> Any:
    for text in value if isinstance(value, list) else ():
        if isinstance(text, str):
            demand_unicode(text)
    return value


class EmbeddingRequest(Vectors):
    """`POST /v1/embeddings`."""

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    normalize: Annotated[bool, Field(description="to length 1")] = True

    @field_validator("input", mode="before")
    @classmethod
    def _form(cls, value: Any) -> Any:
        """Said of the whole: which member of a union it comes nearest to, nobody knows."""
        kinds = {type(each) for each in value} if isinstance(value, list) else set()
        if not isinstance(value, str) and kinds not in ({str}, {int}, {list}):
            raise ValueError(f"{shown(value)} is no input; give a text, token ids, or a list of texts or of such ids")
        return _unicode(value)

    def texts(self) -> list[Given]:
        """See `Vectors`."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)

    def about(self) -> Json:
        """See `Vectors`."""
        return {"base64": self.encoding_format == "base64", "dimensions": self.dimensions, "unit": self.normalize}


class ScoreRequest(Vectors):
    """`POST /v1/score`, as vLLM has it: how alike two texts are, or one and each of several, or each two of as many."""

    text_1: str | Texts
    text_2: str | Texts

    _checked = field_validator("text_1", "text_2", mode="before")(_unicode)

    def _sides(self) -> tuple[list[str], list[str]]:
        one, two = ([side] if isinstance(side, str) else side for side in (self.text_1, self.text_2))
        return one, two

    def texts(self) -> list[Given]:
        """See `Vectors`."""
        one, two = self._sides()
        if len(one) not in (1, len(two)):
            raise InputError(f"text_1 has {len(one)} texts and text_2 {len(two)}; give one, or as many")
        return [*one, *two]

    def about(self) -> Json:
        """See `Vectors`."""
        return {"first": len(self._sides()[0])}


class Document(Strict):
    """What is ranked."""

    text: str


class RerankRequest(Vectors):
    """`POST /v1/rerank`, as vLLM and Jina have it."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MOST_INPUTS - 1, fail_fast=True)]
    top_n: Annotated[int, Field(ge=0, lt=1 << 31, description="so many of the best; 0: all")] = 0
    return_documents: bool = True

    _checked = field_validator("documents", mode="before")(_unicode)

    def texts(self) -> list[Given]:
        """See `Vectors`."""
        return [self.query, *(each if isinstance(each, str) else each.text for each in self.documents)]

    def about(self) -> Json:
        """See `Vectors`."""
        documents = self.texts()[1:] if self.return_documents else None
        return {"top": self.top_n or len(self.documents), "documents": documents}


class OllamaEmbed(Vectors):
    """`POST /api/embed`."""

    input: str | Annotated[list[str], Field(max_length=MOST_INPUTS, fail_fast=True)] = ""
    truncate: bool = True
    dimensions: Count | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None  # how to load a model that is loaded

    _checked = field_validator("input", mode="before")(_unicode)

    @property
    def truncates(self) -> bool:
        """See `Vectors`."""
        return self.truncate

    def texts(self) -> list[Given]:
        """See `Vectors`."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    @property
    def only_loads(self) -> bool:
        """Nothing is asked, as of a model that is to be loaded."""
        return not self.input

    def loaded(self, name: str) -> Json:
        """It is."""
        return {"model": name, "embeddings": []}

    def about(self) -> Json:
        """See `Vectors`."""
        return {"dimensions": self.dimensions}


@dataclass
class VectorForm:
    """Vectors' form. `about`: see `Vectors`."""

    model: str
    about: Json
    created: int = field(default_factory=lambda: int(time.time()))
    begun: int = field(default_factory=time.monotonic_ns)
    manner = OPENAI

    def take(self, number: int, vector: Vector) -> None:
        """One of them. What can be made of it is made now: of thousands at the end it would halt the loop."""
        raise NotImplementedError

    def whole(self, usage: Usage) -> list[bytes]:
        """The answer, as JSON, in pieces."""
        raise NotImplementedError

    def _named(self, prefix: str) -> Json:
        return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": "list", "created": self.created,
                "model": self.model}  # fmt: skip


@dataclass
class _Written(VectorForm):
    """Vectors that are told as they are."""

    entries: dict[int, bytes] = field(default_factory=dict)


@dataclass
class _Compared(VectorForm):
    """Vectors of which only the angles between them are told."""

    units: dict[int, Vector] = field(default_factory=dict)

    def take(self, number: int, vector: Vector) -> None:
        """See `VectorForm`."""
        self.units[number] = unit(vector)

    def cosines(self, first: int) -> list[float]:
        """Of each of the first ones with its counterpart among the others, or of the only first one with each."""
        others = [self.units[number] for number in range(first, len(self.units))]
        firsts = [self.units[number] for number in range(first)] * (len(others) // first)
        return [float(np.clip(a @ b, -1.0, 1.0)) for a, b in zip(firsts, others, strict=True)]


def _pieces(before: Json, name: str, entries: Sequence[bytes], after: Json) -> list[bytes]:
    """An object with a long list in it."""
    pieces, some, length = [msgspec.json.encode(before)[:-1] + b',"%b":[' % name.encode()], list[bytes](), 0
    for number, entry in enumerate(entries, start=1):
        some += [entry, b","] if number < len(entries) else [entry]
        length += len(entry)
        if length > PIECE:
            pieces.append(b"".join(some))
            some, length = [], 0
    return [*pieces, b"".join([*some, b"],", msgspec.json.encode(after)[1:]])]


class EmbeddingForm(_Written):
    """OpenAI's."""

    def take(self, number: int, vector: Vector) -> None:
        """See `VectorForm`."""
        dimensions = self.about["dimensions"]
        made = (unit(vector, dimensions) if self.about["unit"] else vector[:dimensions]).astype("<f4")
        coded = base64.b64encode(made.tobytes()).decode() if self.about["base64"] else made.tolist()
        entry = {"object": "embedding", "index": number, "embedding": coded}
        self.entries[number] = msgspec.json.encode(entry)

    def whole(self, usage: Usage) -> list[bytes]:
        """See `VectorForm`."""
        listed = [self.entries[number] for number in range(len(self.entries))]
        return _pieces(self._named("embd"), "data", listed, {"usage": _told(usage)})


class ScoreForm(_Compared):
    """vLLM's: the cosine of the angle between two texts' embeddings, -1 to 1."""

    def whole(self, usage: Usage) -> list[bytes]:
        """See `VectorForm`."""
        scores = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(self.cosines(self.about["first"]))
        ]
        return [msgspec.json.encode(self._named("score") | {"data": scores, "usage": _told(usage)})]


class RerankForm(_Compared):
    """The same as a ranking."""

    def whole(self, usage: Usage) -> list[bytes]:
        """See `VectorForm`."""
        found, documents = self.cosines(1), self.about["documents"]
        best = sorted(range(len(found)), key=lambda index: -found[index])[: self.about["top"]]
        results = [
            msgspec.json.encode({
                "index": index, **({"document": {"text": documents[index]}} if documents else {}),
                "relevance_score": found[index],
            }) for index in best
        ]  # fmt: skip
        return _pieces(self._named("rerank"), "results", results, {"usage": _told(usage)})


class OllamaEmbedForm(_Written):
    """Ollama's."""

    manner = OLLAMA

    def take(self, number: int, vector: Vector) -> None:
        """See `VectorForm`."""
        made = unit(vector, self.about["dimensions"]).astype("<f4")
        self.entries[number] = msgspec.json.encode(made.tolist())

    def whole(self, usage: Usage) -> list[bytes]:
        """See `VectorForm`."""
        listed = [self.entries[number] for number in range(len(self.entries))]
        after = {"total_duration": time.monotonic_ns() - self.begun, "load_duration": 0}
        return _pieces({"model": self.model}, "embeddings", listed, after | {"prompt_eval_count": usage.prompt})


def _told(usage: Usage) -> Json:
    return {"prompt_tokens": usage.prompt, "completion_tokens": 0, "total_tokens": usage.prompt}
