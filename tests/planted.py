"""Known faults, as weft or others had them, for the test of the fuzz: each is planted in the engine's process, or in
its workers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream

Patch = pytest.MonkeyPatch


def detokenizer_that_raises(patch: Patch) -> None:
    """tokenizers' own stream, which raises where a run of byte tokens turns out to be no text."""
    from weft.detokenizer import Spelling

    class Stream:
        ahead = ""

        def __init__(self, spelling: Spelling, prompt: tuple[int, ...], skip: bool) -> None:
            self._backend, self.offsets = spelling._backend, list[int]()
            self._stream = DecodeStream(ids=list(prompt[-8:]), skip_special_tokens=skip)

        def step(self, token: int) -> str:
            self.offsets.append(0)
            return self._stream.step(self._backend, token) or ""

        def end(self) -> str:
            return ""

    patch.setattr(Spelling, "stream", lambda spelling, prompt, skip_special_tokens: Stream(spelling, prompt, True))


def one_error_ends_all(patch: Patch) -> None:
    """What one sequence's text or grammar raises goes up through the engine's thread."""
    from weft.engine import Engine

    def refuse(engine: Engine, request: Any, reason: str) -> Any:
        raise RuntimeError(reason)

    patch.setattr(Engine, "_refuse", refuse)


def poison_is_tried_for_ever(patch: Patch) -> None:
    """A batch that made a rank fail is run again as it was."""
    from weft.engine import Engine

    patch.setattr(Engine, "_recover", lambda engine, scheduled, error: engine.restart(error) or [])


def all_of_a_batch_are_refused(patch: Patch) -> None:
    """A batch that made a rank fail ends all its requests."""
    from weft.engine import Engine

    def recover(engine: Engine, error: Exception) -> Any:
        there = {sequence.request for flight in engine.flights for sequence in flight.scheduled.sequences}
        refused = [sequence for request in there for sequence in engine._refuse(request, "a rank failed")]
        engine.restart(error)
        return refused

    patch.setattr(Engine, "_recover", recover)


def a_slot_stays_taken(patch: Patch) -> None:
    """Engine and workers out of step: a request that failed leaves its slot behind."""
    from weft.batching.batcher import Batcher

    leave = Batcher.leave

    def leaving(batcher: Batcher, sequences: Any) -> None:
        for sequence in sequences:
            if sequence.finish_reason == "error" and sequence.slot is not None:
                batcher.running.remove(sequence)
                sequence.slot = None
            else:
                leave(batcher, [sequence])

    patch.setattr(Batcher, "leave", leaving)


def scores_of_the_next_token(patch: Patch) -> None:
    """Prompts are scored, one token too late."""
    from weft.completion import Completion

    score = Completion.score
    patch.setattr(Completion, "score", lambda c, segment, answers: score(c, segment, answers[1:] + answers[:1]))


def offsets_begin_anew(patch: Patch) -> None:
    """Each streamed chunk counts its characters from 0."""
    from weft.server.ticket import Ticket

    grown = Ticket.grown

    def growing(ticket: Ticket, *arguments: Any) -> Any:
        piece = grown(ticket, *arguments)
        first = piece.tokens[0].offset if piece.tokens else 0
        return replace(piece, tokens=[token._replace(offset=token.offset - first) for token in piece.tokens])

    patch.setattr(Ticket, "grown", growing)


def bytes_of_replacement_characters(patch: Patch) -> None:
    """A part of a character is told as the bytes of U+FFFD."""
    from weft.server.api import Api

    patch.setattr(Api, "bytes_of", lambda api, token: api.text_of(token).encode())


def stop_text_cut_out_of_the_middle(patch: Patch) -> None:
    """min_tokens keeps the answer going, and the stop text is cut off all the same."""
    from weft.text import StopText

    patch.setattr(StopText, "go_on", lambda text, ahead="": None)


def prompt_comes_out_again(patch: Patch) -> None:
    """A prompt that ends inside a character has its end in the answer."""
    from weft.detokenizer import Spelling

    stream = Spelling.stream

    def streaming(spelling: Spelling, prompt: tuple[int, ...], skip_special_tokens: bool) -> Any:
        made = stream(spelling, prompt, skip_special_tokens)
        for token in prompt[-4:]:
            made.step(token)
        made.offsets.clear()
        return made

    patch.setattr(Spelling, "stream", streaming)


def prompts_counted_by_segments(patch: Patch) -> None:
    """What is computed again is counted again."""
    from weft.server.metrics import Metrics

    turn = Metrics.turn

    def counting(metrics: Metrics, counted: Any) -> None:
        turn(metrics, counted)
        metrics._add(metrics._prompt, sum(segment.length for segment in counted.scheduled.batch.segments))

    patch.setattr(Metrics, "turn", counting)


def prefixes_hold_answers(patch: Patch) -> None:
    """With --reproducible, a reused prefix ends in tokens that were computed one by one."""
    from weft.batching.batcher import Batcher

    patch.setattr(Batcher, "_lasting", lambda batcher, sequence: sequence.computed)


def numbers_that_json_lacks(patch: Patch) -> None:
    """A log-probability is minus infinity."""
    import msgspec

    from weft.server import answers

    patch.setattr(answers, "_number", lambda logprob: msgspec.Raw(b"-Infinity"))  # as Python's own writer has it


def one_error_is_everybodys(patch: Patch) -> None:
    """A blanket `except`: where one request fails, all that run with it are told so."""
    from weft.engine import Engine

    refuse = Engine._refuse

    def refusing(engine: Engine, request: Any, reason: str) -> Any:
        there = dict.fromkeys([request, *(sequence.request for sequence in engine.batcher.running)])
        return [sequence for each in there for sequence in refuse(engine, each, reason)]

    patch.setattr(Engine, "_refuse", refusing)


def angles_by_the_piece(patch: Patch) -> None:
    """In workers: angles stretch by where a piece of a prompt ends."""
    from weft.model.rope import Rope

    angles = Rope.angles
    patch.setattr(Rope, "angles", lambda rope, start, end, prompt: angles(rope, start, end, end))


def sampler_ends_the_rank(patch: Patch) -> None:
    """In workers: what one row's choice raises is the rank's failure."""
    from weft.execute import sampler

    def going_on(talks: Any, told: Any, chosen: Any) -> Any:
        asks = {}
        for row, numbers in told.items():
            try:
                asks[row] = talks[row].send(numbers)
            except StopIteration as over:
                chosen[row] = over.value
        return asks

    patch.setattr(sampler, "_go_on", going_on)


# By name: the plant, the kind of tokenizer, what the fuzz must say of it, and the faults of ranks that it takes.
ENGINE: dict[str, tuple[Callable[[Patch], None], str, str, tuple[str, ...]]] = {
    plant.__name__: (plant, kind, said, tuple(lost))
    for plant, kind, said, *lost in (
        (detokenizer_that_raises, "byte-fallback", "Invalid prefix encountered"),
        (one_error_ends_all, "byte-level", "the engine has failed"),
        (poison_is_tried_for_ever, "byte-fallback", "fault: rank raises: 503|ReadTimeout", "rank raises"),
        (all_of_a_batch_are_refused, "byte-fallback", "(whole|stream): .*a rank failed", "rank raises"),
        (a_slot_stays_taken, "metaspace", "a slot has two uses, or none|Timeout|503|500"),
        (scores_of_the_next_token, "byte-fallback", "scores of the prompt's tokens"),
        (offsets_begin_anew, "metaspace", "stream: (offsets|.* is not at)"),
        (bytes_of_replacement_characters, "byte-level", ": bytes "),
        (stop_text_cut_out_of_the_middle, "metaspace", "' instead of '|finish_reason"),
        (prompt_comes_out_again, "byte-level", "' instead of '"),
        (prompts_counted_by_segments, "byte-fallback", "tokens of prompts, of"),
        (prefixes_hold_answers, "byte-fallback", "logprobs .* instead of|' instead of '"),
        (numbers_that_json_lacks, "metaspace", "-Infinity is no JSON"),
        (one_error_is_everybodys, "byte-fallback", "(whole|stream): .*planted"),
    )
}
WORKERS = {
    angles_by_the_piece.__name__: ("metaspace", "instead of|scores of the prompt's"),
    sampler_ends_the_rank.__name__: ("byte-fallback", "fault: sampler|restarts for 0 faults"),
}


def angles_in_worker() -> None:
    """For benchmarks.fuzz.worker."""
    angles_by_the_piece(pytest.MonkeyPatch())


def sampler_in_worker() -> None:
    """The same."""
    sampler_ends_the_rank(pytest.MonkeyPatch())
