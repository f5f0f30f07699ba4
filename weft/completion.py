"""What becomes of one sequence's tokens: how each is to be chosen, their text, and when there are enough of them.

Knows texts, grammars and wishes; knows nothing of batches' plans, workers or other sequences. Whatever raises here
concerns this sequence alone.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from weft.batching.params import ThinkingLimit
from weft.batching.request import Sequence
from weft.detokenizer import Detokenizer
from weft.embedding import Embedding
from weft.execute.protocol import Choice, Chosen
from weft.grammar import Matcher
from weft.program.batch import Segment
from weft.text import StopText, Tokenizer

SEEDS = 1 << 62  # with a completion's number added, still one of 64 bits


@dataclass
class Completion:
    """What the engine keeps of a sequence beside its tokens.

    `ends`: tokens that end it; those of `own_ends` were asked for and are its stop reason. `scores`: of the prompt's
    tokens, by position, from the second one on. `embedding`: what the prompt's hidden states come to, where they are
    pooled. `offsets`: characters of the text before each token; tokens without
    one are parts of characters that are waited for, and are not shown yet. `settled`: characters of the text that can
    be shown, because no stop text can take them back. `first_token`: seconds after the request came.
    """

    sequence: Sequence
    seed: int
    detokenizer: Detokenizer | None
    text: StopText
    ends: frozenset[int]
    own_ends: frozenset[int]
    matcher: Matcher | None = None
    chosen: list[Chosen] = field(default_factory=list)
    scores: dict[int, Chosen] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    settled: int = 0
    stop_reason: int | str | None = None
    first_token: float | None = None
    embedding: Embedding | None = None
    _ending: int = 0  # tokens that have come of those that end a thought
    _length: int = 0  # of the text, with what a stop text cut off

    def choices(self, segment: Segment, after: int) -> list[Choice]:
        """How each wanted row's token is chosen. `after`: tokens that the sequence will have got by then, beyond those
        that it has."""
        if not self.sequence.scored:
            return [self._choice(after)] * segment.predicting
        prompt, wanted = self.sequence.request.prompt, self.sequence.request.params.prompt_logprobs
        following = prompt[segment.end - segment.wanted + 1 : segment.end + 1]
        scored = [Choice(given=token, logprobs=wanted) for token in following]
        return scored + [self._choice(after)] * (segment.wanted - len(scored))

    def _choice(self, after: int) -> Choice:
        params, index = self.sequence.request.params, self.sequence.produced + after
        allowed = self.matcher.allowed() if self.matcher else b""
        if (token := self._ends_thought(params.thinking)) is not None:
            alone = _alone(token)
            allowed = alone if not allowed or allowed[token // 8] & alone[-1] else allowed
        banned = sorted(self.ends) if index < params.min_tokens else []
        if params.greedy and not (
            params.penalised or params.logit_bias or banned or allowed or params.logprobs is not None
        ):
            return Choice()
        return Choice(
            temperature=0.0 if params.greedy else params.temperature, top_p=params.top_p,
            top_k=max(0, params.top_k), min_p=params.min_p, presence=params.presence_penalty,
            frequency=params.frequency_penalty, repetition=params.repetition_penalty,
            seed=self.seed, index=index, banned=banned,
            prompt=list(self.sequence.request.prompt) if params.penalised else [],
            output=list(self.sequence.output) if params.penalised else [], logprobs=params.logprobs,
            bias=dict(params.logit_bias or {}), allowed=allowed,
        )  # fmt: skip

    def _ends_thought(self, limit: ThinkingLimit | None) -> int | None:
        """What comes next of what ends a thought, if that was long enough."""
        if limit is None or self._ending >= len(limit.end_ids) or self.sequence.produced < limit.tokens:
            return None
        text = self.text.text
        if limit.end in text or limit.begin not in text:
            return None
        return limit.end_ids[self._ending]

    def score(self, segment: Segment, answers: list[Chosen]) -> None:
        """What the rows of a piece of prompt said of the tokens that follow them."""
        first = segment.end - segment.wanted + 1
        for position, chosen in enumerate(answers, start=first):
            _demand(chosen)
            if position < len(self.sequence.request.prompt):
                self.scores[position] = chosen

    def pool(self, segment: Segment, total: bytes) -> None:
        """What the rows of a piece of prompt add up to."""
        if self.embedding is None or not segment.start:  # computed anew, it may be
            self.embedding = Embedding()
        self.embedding.add(total, segment.wanted)

    def take(self, chosen: Chosen) -> str | None:
        """The sequence's newest token; returns why that was the last one, if it was."""
        _demand(chosen)
        sequence, token = self.sequence, chosen.token
        self.chosen.append(chosen)
        if token in self.ends:
            self.stop_reason = token if token in self.own_ends else None
            self._end(may_stop=False)
            return "stop"
        if self.matcher is not None:
            self.matcher.advance(token)
        limit = sequence.request.params.thinking
        if limit is not None and sequence.produced > limit.tokens and token in limit.end_ids[self._ending :][:1]:
            self._ending += 1
        self._spell(token)
        over = self.matcher is not None and self.matcher.finished
        if over or self.text.stopped is not None or sequence.produced >= sequence.request.limit:
            self._end(may_stop=True)
            self.stop_reason = self.text.stopped
            return "stop" if over or self.text.stopped is not None else "length"
        self.settled = max(self.settled, self.text.settled)
        return None

    def close(self) -> None:
        """Nothing more comes: what is waited for is shown as it is."""
        self._end(may_stop=True)

    def _spell(self, token: int) -> None:
        if self.detokenizer is None:
            self.offsets.append(0)
            return
        early = self.sequence.produced < self.sequence.request.params.min_tokens
        more = self.detokenizer.step(token)
        if early:
            self.text.go_on(more + self.detokenizer.ahead)
        self._grow(more)
        if self.text.stopped is None and self.text.would_stop(self.detokenizer.ahead):
            self._grow(self.detokenizer.end())
        self.offsets = self.detokenizer.offsets

    def _grow(self, more: str) -> None:
        self._length += len(more)
        if self.text.stopped is None:
            self.text.grow(more)

    def _end(self, may_stop: bool) -> None:
        """The text that is still waited for; a token that only ends the answer stands behind it."""
        if self.detokenizer is not None:
            left = self.detokenizer.end()
            if not may_stop:
                self.text.go_on(left)
            self._grow(left)
            self.offsets = list(self.detokenizer.offsets)
        self.offsets += [self._length] * (len(self.chosen) - len(self.offsets))
        self.settled = len(self.text.text)


def completion_of(
    sequence: Sequence, tokenizer: Tokenizer | None, end_ids: frozenset[int], grammar: Matcher | None
) -> Completion:  # fmt: skip
    """What a sequence begins with. `end_ids`: the model's, which end it unless they are to be ignored."""
    params = sequence.request.params
    ends = frozenset() if params.ignore_eos else end_ids
    own = frozenset(params.stop_token_ids or ()) - ends
    seed = params.seed % SEEDS if params.seed is not None else secrets.randbits(62)
    stream = tokenizer.stream(sequence.request.prompt, params.skip_special_tokens) if tokenizer else None
    text = StopText(params.stops, params.include_stop_str_in_output)
    return Completion(sequence, seed + sequence.index, stream, text, own | ends, own, grammar)


def _alone(token: int) -> bytes:
    """Nothing else is allowed."""
    return bytes(token // 8) + bytes([1 << token % 8])


def _demand(chosen: Chosen) -> None:
    if chosen.error:
        raise ValueError(chosen.error)
