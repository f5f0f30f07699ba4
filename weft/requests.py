"""The requests of one engine: whether they can run, and what becomes of each.

Knows prompts, wishes, texts and grammars; knows nothing of batches, plans or workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as ReadOnly
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from weft.admission import demand_room, end_ids, limit_of
from weft.batching.params import SamplingParams, token_ids
from weft.batching.request import Request, Sequence
from weft.completion import Completion, completion_of
from weft.config import ModelConfig
from weft.errors import InputError, WorkerLost, in_a_line
from weft.execute.protocol import Choice, Chosen, Loaded
from weft.grammar import Grammar, Grammars
from weft.program.batch import Segment
from weft.text import Tokenizer

MOST_FAILURES = 3  # batches by itself, one upon the other, that a request may lose to ranks that were killed or cut off
COMPANY = 3  # failed batches from which on a request stays by itself: it may fail with others only


class Handed(NamedTuple):
    """What one engine's `Requests` know of a request, for another's."""

    began: float
    completions: dict[Sequence, Completion]


class Requests:
    """Checks them, and keeps a completion for each of their sequences until it is fetched.

    `length`: tokens of the context; `memory` says how many fit into key/value memory, of which each of `loaded` has its
    part. `notices`: lines for whoever should know.
    """

    def __init__(
        self, path: Path, model: ModelConfig, tokenizer: Tokenizer | None, length: int,
        memory: Callable[[], int], loaded: ReadOnly[Loaded],
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.length, self.memory, self.loaded = length, memory, loaded
        self.end_ids, self.notices = end_ids(path, model, tokenizer)
        self.completions: dict[Sequence, Completion] = {}
        self._began: dict[Request, float] = {}

    @cached_property
    def grammars(self) -> Grammars:
        """Of this model's tokenizer; making it takes a moment."""
        if self.tokenizer is None:
            raise InputError("a JSON schema needs a tokenizer, and this model has no tokenizer")
        return Grammars(self.tokenizer, self.model.vocabulary, self.end_ids)

    def kept_grammar(self, schema: str) -> Grammar | None:
        """A schema's, if it is there already; at once, whatever is not there yet."""
        return self.grammars.kept(schema) if "grammars" in vars(self) else None

    def check(self, prompt: ReadOnly[int], params: SamplingParams) -> int:
        """How many tokens may follow; raises `InputError` for requests that can't be run, but for what is wrong with a
        schema. For any thread."""
        ends = frozenset() if params.ignore_eos else self.end_ids
        if params.stops and self.tokenizer is None:
            raise InputError("stop texts need a tokenizer, and this model has no tokenizer; use stop_token_ids")
        memory = self.memory()
        limit = limit_of(prompt, params, self.model.vocabulary, self.length, memory, ends)
        demand_room(len(prompt) + limit, memory, self.loaded)
        return limit

    def open(
        self, prompt: ReadOnly[int], params: SamplingParams, priority: int = 0, owner: str = "",
        deadline: float | None = None, grammar: Grammar | None = None, salt: str = "",
    ) -> Request:  # fmt: skip
        """A request with all that it needs; see `Request`. `grammar`: of its schema, if it is compiled already. Raises
        `InputError` if it can't ever run; then nothing was changed."""
        tokens = token_ids(prompt, "the prompt")
        limit = self.check(tokens, params)
        if params.form and grammar is None:
            grammar = self.grammars.grammar(params.form)
        request = Request(tokens, params, limit, priority, owner, time.monotonic(), deadline, salt)
        completions = [self._completion(sequence, grammar) for sequence in request.sequences]
        self._began[request] = time.perf_counter()
        self.completions.update(zip(request.sequences, completions, strict=True))
        return request

    def _completion(self, sequence: Sequence, grammar: Grammar | None) -> Completion:
        matcher = grammar.matcher() if grammar is not None else None
        return completion_of(sequence, self.tokenizer, self.end_ids, matcher)

    def choices(self, sequence: Sequence, segment: Segment, after: int) -> list[Choice]:
        """Of a segment's wanted rows, see `Completion.choices`; where that fails, any, and the request is refused with
        the batch."""
        try:
            return self.completions[sequence].choices(segment, after)
        except Exception as error:  # a grammar's, say
            sequence.request.error = in_a_line(error)
            return [Choice()] * segment.predicting

    def take(
        self, sequence: Sequence, segment: Segment, grows: bool, answers: list[Chosen], total: bytes | None = None
    ) -> None:  # fmt: skip
        """What a batch gave one sequence. `total`: of its rows, where they are pooled. Whatever raises here concerns
        its request alone."""
        completion, request = self.completions[sequence], sequence.request
        if request.error:
            raise InputError(request.error)
        if total is not None:
            completion.pool(segment, total)
        if sequence.scored:
            completion.score(segment, answers)
        if grows:
            sequence.tokens.append(answers[-1].token)
            if completion.first_token is None:
                completion.first_token = time.perf_counter() - self._began[request]
            sequence.finish_reason = completion.take(answers[-1])
            sequence.alone, sequence.failures = sequence.alone and request.failures >= COMPANY, 0
        elif not request.limit and sequence.computed == len(request.prompt):
            sequence.finish_reason = "length" if request.params.pooling is None else "stop"

    def time_out(self, sequence: Sequence) -> None:
        """A sequence's time is over; what can be shown of it stays."""
        sequence.finish_reason = "timeout"
        with suppress(Exception):  # whatever it is
            self.completions[sequence].close()

    def can_run(self, request: Request) -> bool:
        """Whether another engine's request could go on here, to the length that it was promised. For any thread."""
        return len(request.prompt) + request.limit <= min(self.memory(), self.length)

    def give(self, request: Request) -> Handed:
        """What is known of a request that another engine goes on with."""
        return Handed(
            self._began.pop(request), {sequence: self.completions.pop(sequence) for sequence in request.sequences}
        )

    def have(self, request: Request, handed: Handed) -> None:
        """One of another engine of the same model."""
        self._began[request] = handed.began
        self.completions.update(handed.completions)

    def settle(self, request: Request) -> list[Completion]:
        """The request's completions, which are forgotten then."""
        self._began.pop(request, None)
        return [self.completions.pop(sequence) for sequence in request.sequences]


def blame(suspects: ReadOnly[Sequence], error: Exception) -> bool:
    """A batch with these failed: from now on each is in batches by itself. True if there is one, and it failed so often
    by itself that it must be its own doing."""
    by_itself = len(suspects) == 1 and suspects[0].alone
    # A rank that was killed or cut off need not have been so because of what it computed.
    most = MOST_FAILURES if isinstance(error, WorkerLost) else 1
    guilty = by_itself and suspects[0].failures + 1 >= most
    for request in {sequence.request for sequence in suspects}:
        request.failures += 1
    for sequence in suspects:
        sequence.alone, sequence.failures = True, sequence.failures + by_itself
    return guilty
