"""Rows, segments and batches."""

from __future__ import annotations

from weft.program.batch import Batch, Rows, Segment, one_prompt

BATCH = Batch((Segment(0, 0, 5), Segment(3, 7, 1), Segment(1, 2, 4, wanted=2)))


def test_spans_and_wanted_rows() -> None:
    assert BATCH.tokens == 10
    assert BATCH.spans == (Rows(0, 5), Rows(5, 6), Rows(6, 10))
    assert BATCH.wanted_rows == (4, 5, 8, 9)
    assert BATCH.segments[1].end == 8


def test_within_clips_segments() -> None:
    found = [(segment.sequence, str(rows)) for segment, _, rows in BATCH.within(Rows(3, 8))]
    assert found == [(0, "3:5"), (3, "5:6"), (1, "6:8")]


def test_rows() -> None:
    assert Rows(2, 6).intersects(Rows(5, 9)) and not Rows(2, 6).intersects(Rows(6, 9))
    assert Rows(2, 6).contains(Rows(3, 6)) and not Rows(2, 6).contains(Rows(3, 7))
    assert Rows(2, 6).clip(Rows(4, 9)) == Rows(4, 6) and Rows(2, 6).clip(Rows(7, 9)).length == 0


def test_one_prompt() -> None:
    assert one_prompt(7) == Batch((Segment(0, 0, 7),))
