"""Sampling parameters: how the next token of a request is chosen, and when it has enough of them.

Names and meanings are those that vLLM's users know. Knows no tokenizer and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes; raises `InputError` on construction for values that make no sense.

    n: how many completions. temperature: 0 is greedy. top_k: 0 or -1 is all. top_p, min_p: in 0..1.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens that the completion has, once or per
    occurrence, in -2..2. repetition_penalty: divides (multiplies, below zero) the logits of tokens that prompt or
    completion have; 1 is none. seed: the same draw again, at any number of ranks and after any restart.
    stop: texts that end the completion. stop_token_ids: tokens that do. logprobs: how many of the likeliest
    tokens to report beside the chosen one. json_schema: as JSON text; the completion is JSON that it describes.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    json_schema: str | None = None

    def __post_init__(self) -> None:
        _range(self.n, "n", 1, 128)
        _range(self.temperature, "temperature", 0.0, 100.0)
        _range(self.top_p, "top_p", 0.0, 1.0)
        _range(self.top_k, "top_k", -1, 1 << 31)
        _range(self.min_p, "min_p", 0.0, 1.0)
        _range(self.presence_penalty, "presence_penalty", -2.0, 2.0)
        _range(self.frequency_penalty, "frequency_penalty", -2.0, 2.0)
        _range(self.repetition_penalty, "repetition_penalty", 0.01, 100.0)
        _range(self.min_tokens, "min_tokens", 0, 1 << 31)
        if self.max_tokens is not None:
            _range(self.max_tokens, "max_tokens", 1, 1 << 31)
        if self.logprobs is not None:
            _range(self.logprobs, "logprobs", 0, 100)
        if self.top_p == 0.0:
            raise InputError("top_p 0 leaves no token; give a number above 0, or temperature 0 for greedy")
        if any(not text for text in self.stops):
            raise InputError("stop contains an empty text, which would end every completion at once; leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < 1e-5

    @property
    def penalised(self) -> bool:
        """True if the choice depends on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


def _range(value: float, name: str, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name} {value!r} is not allowed; give a number from {low:g} to {high:g}")
