"""Batches that are made before the tokens of the one before are known."""

from __future__ import annotations

from weft.batching.batcher import Batcher
from weft.batching.params import SamplingParams
from weft.batching.request import Request


def running(*requests: Request, memory: int = 1000) -> Batcher:
    batcher = Batcher(sequences=3, memory=memory)
    for request in requests:
        batcher.add(request)
    return batcher


def request(limit: int = 5, **wishes: float) -> Request:
    return Request((1, 2, 3), SamplingParams(**wishes), limit)


def test_the_next_token_of_each() -> None:
    batcher = running(request(), request())
    now = batcher.next(100)
    ahead = batcher.ahead(now)
    assert ahead is not None and ahead.sequences == now.sequences
    assert ahead.follows == (0, 1) and not ahead.tokens
    assert [(segment.start, segment.length) for segment in ahead.batch.segments] == [(3, 1), (3, 1)]


def test_not_if_one_is_sure_to_end_or_depends_on_its_tokens() -> None:
    for other in (request(limit=1), request(repetition_penalty=1.2), request(json_schema="{}")):
        batcher = running(request(), other)
        assert batcher.ahead(batcher.next(100)) is None


def test_not_if_a_prompt_could_start() -> None:
    batcher = running(request())
    now = batcher.next(100)
    batcher.add(request())
    assert batcher.ahead(now) is None


def test_not_if_a_prompt_is_under_way_or_memory_runs_out() -> None:
    batcher = running(request())
    assert batcher.ahead(batcher.next(2)) is None
    batcher = running(request(), memory=4)
    assert batcher.ahead(batcher.next(100)) is None
