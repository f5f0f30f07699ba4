"""Batches that are made before the tokens of the one before are known."""

from __future__ import annotations

from weft.batching.batcher import Batcher
from weft.batching.params import SamplingParams
from weft.batching.request import Request


def running(*requests: Request) -> Batcher:
    batcher = Batcher(slots=3, batch_tokens=100, memory_tokens=1000)
    for request in requests:
        batcher.add(request)
    return batcher


def request(limit: int = 5, **wishes: float) -> Request:
    return Request((1, 2, 3), SamplingParams(**wishes), limit)


def test_the_next_token_of_each() -> None:
    batcher = running(request(), request())
    now = batcher.next()
    ahead = batcher.ahead(now)
    assert ahead is not None and ahead.sequences == now.sequences
    assert ahead.tokens == (-1, -2)
    assert [(segment.start, segment.length) for segment in ahead.batch.segments] == [(3, 1), (3, 1)]


def test_not_if_one_is_sure_to_end_or_depends_on_its_tokens() -> None:
    for other in (request(limit=1), request(repetition_penalty=1.2)):
        batcher = running(request(), other)
        assert batcher.ahead(batcher.next()) is None


def test_not_if_a_prompt_could_start() -> None:
    batcher = running(request())
    now = batcher.next()
    batcher.add(request())
    assert batcher.ahead(now) is None
