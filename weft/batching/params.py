"""Sampling parameters: how the next token of a request is chosen, and when it has enough of them.

Names and meanings are those that vLLM's users know. Knows no tokenizer and no model.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from reprlib import Repr
from typing import Any

from weft.errors import InputError


@dataclass(frozen=True)
class ThinkingLimit:
    """Tokens after which a thought is ended by `end_ids`, which spell `end`. `begin`: what it begins with; empty where
    the answer begins inside it."""

    tokens: int
    begin: str
    end: str
    end_ids: tuple[int, ...]

    @classmethod
    def of(cls, given: Any) -> ThinkingLimit | None:
        """The same from its fields. Raises `InputError`."""
        if given is None or isinstance(given, cls):
            return given
        fields = dict(given)
        return cls(**fields | {"end_ids": token_ids(fields["end_ids"], "thinking.end_ids")})


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes; raises `InputError` on construction for values that make no sense.

    Everything is plain numbers, texts and tuples afterwards, whatever kind of number was given.

    n: how many completions. temperature: 0 is greedy. top_k: 0 or -1 is all. top_p, min_p: in 0..1.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens that the completion has, once or per
    occurrence, in -2..2. repetition_penalty: divides (multiplies, below zero) the logits of tokens that prompt or
    completion have; 1 is none. logit_bias: added to the logits of these tokens, -100 to 100. seed: the same draw
    again, at any number of ranks and after any restart.
    stop: texts that end the completion. stop_token_ids: tokens that do. logprobs: how many of the likeliest
    tokens to report beside the chosen one; prompt_logprobs: the same for the tokens of the prompt, from the second one
    on. max_tokens: 0 scores the prompt alone. json_schema: as JSON text; the completion is JSON that it describes.
    grammar: the completion is what this describes, in llguidance's form of Lark. thinking: how long it may think.
    pooling: "mean" or "last"; the prompt becomes an embedding, the mean of its tokens' last hidden states or that of
    the last one, and nothing follows.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    json_schema: str | None = None
    grammar: str | None = None
    thinking: ThinkingLimit | None = None
    pooling: str | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _NUMBERS.items():
            self._set(name, _number(getattr(self, name), name, low, high))
        for name, (least, most) in _COUNTS.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                self._set(name, _whole(getattr(self, name), name, least, most))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            self._set(name, bool(getattr(self, name)))
        self._demand_tokens()
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("stop", _texts(self.stop))
        if any(not text for text in self.stops):
            raise InputError("stop contains an empty text, which would end every completion at once; leave it out")
        if self.stop_token_ids is not None:
            self._set("stop_token_ids", token_ids(self.stop_token_ids, "stop_token_ids"))
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            raise InputError(f"json_schema is a {type(self.json_schema).__name__}; give the schema as JSON text")
        if self.grammar is not None and (self.json_schema is not None or not isinstance(self.grammar, str)):
            raise InputError("give either json_schema or grammar, each as a text")
        self._set("thinking", ThinkingLimit.of(self.thinking))

    def _demand_tokens(self) -> None:
        """Raises `InputError` for wishes that leave none, or that contradict each other."""
        if self.pooling is not None:
            if self.pooling not in POOLINGS:
                raise InputError(f"pooling {shown(self.pooling)} is not known; there are {', '.join(POOLINGS)}")
            if self.max_tokens != 0 or self.n != 1 or self.prompt_logprobs is not None:
                raise InputError("pooling makes an embedding and nothing else; give max_tokens 0, and neither n nor "
                                 "prompt_logprobs")  # fmt: skip
        elif self.max_tokens == 0 and self.prompt_logprobs is None:
            raise InputError(
                "max_tokens 0 is not allowed; give at least 1, or have the prompt scored (prompt_logprobs, echo)"
            )
        if self.top_p == 0.0:
            raise InputError("top_p 0 leaves no token; give a number above 0, or temperature 0 for greedy")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everybody else

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return _texts(self.stop) or ()

    @property
    def form(self) -> str | None:
        """What the completion must be: a schema, or a grammar."""
        return self.json_schema or self.grammar

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < 1e-5

    @property
    def penalised(self) -> bool:
        """True if the choice depends on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


_NUMBERS = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0), "repetition_penalty": (0.01, 100.0),
}  # fmt: skip
_COUNTS = {
    "n": (1, 128), "top_k": (-1, 1 << 31), "min_tokens": (0, 1 << 31), "max_tokens": (0, 1 << 31),
    "logprobs": (0, 100), "prompt_logprobs": (0, 100), "seed": (-(1 << 63), (1 << 64) - 1),
}  # fmt: skip
MOST_BIAS = 100.0
POOLINGS = ("mean", "last")
_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed")


def _number(value: Any, name: str, low: float, high: float) -> float:
    number = math.nan
    if isinstance(value, Real) and value is not True and value is not False:
        with suppress(OverflowError):  # a whole number beyond any other
            number = float(value)
    if not low <= number <= high:
        raise InputError(f"{name} {shown(value)} is not allowed; give a number from {low:g} to {high:g}")
    return number


def _whole(value: Any, name: str, low: int, high: int) -> int:
    whole = _index(int(value) if isinstance(value, float) and value.is_integer() else value)
    if whole is None or not low <= whole <= high:
        raise InputError(f"{name} {shown(value)} is not allowed; give a whole number from {low} to {high}")
    return whole


def _index(value: Any) -> int | None:
    """A whole number of any kind as a plain one; None for anything else, and for true and false."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _biases(given: Any) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"logit_bias {shown(given)} is not allowed; give token ids with a number each")
    biases: dict[int, float] = {}
    for token, value in given.items():
        digits = isinstance(token, str) and len(token) < 20 and token.isascii() and token.isdigit()
        whole = _index(int(token) if digits else token)
        if whole is None:
            raise InputError(f"logit_bias names {shown(token)}; token ids are whole numbers")
        biases[whole] = _number(value, f"logit_bias of token {whole},", -MOST_BIAS, MOST_BIAS)
    return biases or None


def _texts(given: Any) -> tuple[str, ...] | None:
    listed = (given,) if isinstance(given, str) else given
    if listed is None:
        return None
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
        raise InputError(f"stop {shown(given)} is not allowed; give a text, or a list of texts")
    return tuple(listed)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 110
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 20


def shown(value: Any) -> str:
    """What was given, for a message: short, whatever it is."""
    try:
        text = _SHORT.repr(value)  # of a list of a million, most is not even looked at
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of very many digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


def token_ids(given: Any, name: str) -> tuple[int, ...]:
    """Token ids as plain integers, whatever kind of sequence and of integers they came in. Raises `InputError`."""
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise InputError(f"{name} must be a list of token ids, not {type(given).__name__}")
    if isinstance(given, list | tuple) and set(map(type, given)) <= {int}:
        return tuple(given)  # the usual case, without looking at each in Python
    whole = []
    for token in given:
        index = _index(token)
        if index is None:
            raise InputError(f"{name} holds {shown(token)}; token ids are whole numbers")
        whole.append(index)
    return tuple(whole)
