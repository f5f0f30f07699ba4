"""Programs with steps for some ranks, run: on groups that are met for the first time, over a slow link, and on memory
that holds no numbers before something comes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.ranks import Ranks
from tests.tiny import Checkpoints, prompt_of
from weft.execute import executor
from weft.model.decoder import Decoder
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.check import check
from weft.program.text import parse

# A send on a lane of its own, with which one rank has nothing to do.
LANE = """\
compute embed 0:8 for 0
compute L0.attention 0:8 for 0
reduce L0.attention 0:8 for 0
compute L0.mlp 0:8 for 0 after reduce L0.attention 0:8
reduce L0.mlp 0:8 for 0
send L0.mlp 0:8 on network2 for 0 to 1 after reduce L0.mlp 0:8
compute L1.attention 0:8 for 1 after send L0.mlp 0:8
reduce L1.attention 0:8 for 1
compute L1.mlp 0:8 for 1 after reduce L1.attention 0:8
reduce L1.mlp 0:8 for 1
send L1.mlp 0:8 for 1 to 2 after reduce L1.mlp 0:8
compute head 0:8 wanted for 2 after send L1.mlp 0:8
gather head 0:8 wanted
"""
# Ranks that come to two such lanes in another order.
LANES = """\
compute embed 0:4 for 0
compute embed 4:8 for 2
send embed 0:4 on network2 for 0 to 1
send embed 4:8 on network3 for 2 to 3
compute L0.attention 0:4 for 1 after send embed 0:4
reduce L0.attention 0:4 for 1
compute L0.attention 4:8 for 3 after send embed 4:8
reduce L0.attention 4:8 for 3
send L0.attention 0:4 on network3 for 1 to 4 after reduce L0.attention 0:4
send L0.attention 4:8 on network2 for 3 to 4 after reduce L0.attention 4:8
compute L0.mlp 0:8 for 4 after send L0.attention 0:4, send L0.attention 4:8
reduce L0.mlp 0:8 for 4
compute L1.attention 0:8 for 4 after reduce L0.mlp 0:8
reduce L1.attention 0:8 for 4
compute L1.mlp 0:8 for 4 after reduce L1.attention 0:8
reduce L1.mlp 0:8 for 4
compute head 0:8 wanted for 4 after reduce L1.mlp 0:8
gather head 0:8 wanted
"""
# A reduce of one rank, behind a send on the same lane: who waits for the reduce knows that the send has ended.
ALONE = """\
compute embed 0:8 for 0
send embed 0:4 for 0 to 1
compute L0.attention 0:4 for 1 after send embed 0:4
send embed 4:8 for 0 to 1
reduce L0.attention 0:4 for 1
compute L0.attention 4:8 for 1 after reduce L0.attention 0:4
reduce L0.attention 4:8 for 1
compute L0.mlp 0:8 for 1 after reduce L0.attention 4:8
reduce L0.mlp 0:8 for 1
compute L1.attention 0:8 for 1 after reduce L0.mlp 0:8
reduce L1.attention 0:8 for 1
compute L1.mlp 0:8 for 1 after reduce L1.attention 0:8
reduce L1.mlp 0:8 for 1
compute head 0:8 wanted for 1 after reduce L1.mlp 0:8
gather head 0:8 wanted
"""
# The same where none of a reduce's rows is wanted; all steps for both ranks.
UNWANTED = """\
compute embed 0:8
compute L0.attention 0:8
reduce L0.attention 0:8
compute L0.mlp 0:8 after reduce L0.attention 0:8
reduce L0.mlp 0:8
compute L1.attention 0:8 wanted after reduce L0.mlp 0:8
reduce L1.attention 4:8 wanted
reduce L1.attention 0:4 wanted
compute L1.mlp 0:8 wanted after reduce L1.attention 0:4
reduce L1.mlp 0:8 wanted
compute head 0:8 wanted after reduce L1.mlp 0:8
gather head 0:8 wanted
"""
ONE, TWO = one_prompt(8), Batch((Segment(0, 0, 4), Segment(1, 0, 4)))


@pytest.mark.parametrize(
    ("text", "shares", "times", "batch"),
    [(LANE, (1.0,), 3, ONE), (LANES, (1.0,), 5, TWO), (ALONE, (1.0,), 2, ONE), (UNWANTED, (1.0, 1.0), 1, ONE)],
    ids=["lane", "lanes", "alone", "unwanted"],
)
def test_what_is_legal_neither_hangs_nor_reads_too_early(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, text: str, shares: tuple[float, ...], times: int,
    batch: Batch,
) -> None:  # fmt: skip
    empty, communicate = Decoder.empty_hidden, executor._Pass._communicate

    def slow(run: Any, *given: Any) -> None:
        time.sleep(0.005)
        communicate(run, *given)

    monkeypatch.setattr(Decoder, "empty_hidden", lambda decoder, rows: empty(decoder, rows).fill_(torch.nan))
    monkeypatch.setattr(executor._Pass, "_communicate", slow)
    ranks, one = (
        Ranks(checkpoints.directory("qwen3"), shares, times=times),
        Ranks(checkpoints.directory("qwen3"), (1.0,)),
    )
    try:
        program = parse(text)
        check(program, ranks.outline, batch, ranks.world)
        expected = one.run(batch, prompt_of(8), "serial")[0].logits
        actual = ranks.run(batch, prompt_of(8), program)[0].logits
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        ranks.close()
        one.close()
