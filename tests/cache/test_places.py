"""Keys and values by weft's own kernels: what torch writes and reads, and a token's attention whatever is beside it."""

from __future__ import annotations

import pytest
import torch

from weft.cache.places import Passage
from weft.cache.slabs import Slabs
from weft.compiled.library import library
from weft.model.attention import Scoring, attend, attend_each

LENGTH, LAYERS = 700, 3
pytestmark = pytest.mark.skipif(library() is None, reason="nothing is compiled on this machine")


def filled(slots: int, groups: int, width: int, rounded: bool) -> Slabs:
    slabs = Slabs(slots, LAYERS, groups, LENGTH, width, rounded=rounded)
    for slot in range(slots):
        for layer in range(LAYERS):
            slabs.write(slot, layer, 0, torch.randn(LENGTH, 2 * groups, width))
    return slabs


@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_written_is_what_torch_writes(rounded: bool) -> None:
    groups, width, queries = 3, 32, 5
    one, other = (Slabs(4, LAYERS, groups, LENGTH, width, rounded=rounded) for _ in range(2))
    pieces = [Passage(2, 0, 4), Passage(0, 17, 1), Passage(3, LENGTH - 2, 2)]
    heads = torch.randn(7, queries + 2 * groups, width)
    heads[1, 6], heads[2, 7, 3], heads[3, 8, 1], heads[4] = 0, 1e9, torch.nan, 1e-40
    places = one.places(pieces)
    assert places is not None
    places.write(1, heads)
    row = 0
    for slot, start, length in pieces:
        other.write(slot, 1, start, heads[row : row + length, queries:])
        row += length
        for written in range(2):
            for layer in range(LAYERS):
                mine, theirs = (slabs.read(slot, layer).span(start, start + length)[written] for slabs in (one, other))
                assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7)), (slot, layer)
    assert one.used_bytes == other.used_bytes
    one.check_integrity()


SCORINGS = [Scoring(), Scoring(200), Scoring(1), Scoring(None, 3.0), Scoring(50, 3.0)]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (40, 2, 16), (5, 5, 80), (8, 1, 128)])
def test_tokens_attend_as_by_torch_and_alone_as_together(
    threads, heads: int, groups: int, width: int, rounded: bool
) -> None:  # fmt: skip
    """Few keys and many, around the ends of what is looked at together, in one call and each in its own."""
    positions = [0, 1, 14, 15, 16, 126, 127, 128, 129, 383, LENGTH - 1]
    slabs = filled(len(positions), groups, width, rounded)
    rows = torch.randn(len(positions), heads + 2 * groups, width)
    pieces = [Passage(slot, position, 1) for slot, position in enumerate(positions)]
    sinks = torch.randn(heads, 1)
    for scoring in (*SCORINGS, Scoring(None, None, sinks), Scoring(100, None, sinks)):
        together = slabs.places(pieces)
        assert together is not None
        all_at_once = attend_each(rows, together, 2, scoring)
        for piece, row, attended in zip(pieces, rows, all_at_once, strict=True):
            memory = slabs.read(piece.slot, 2)
            expected = attend(row[:heads, None], memory, piece.start, scoring, False)
            assert torch.allclose(attended, expected[0], atol=2e-5), (scoring, piece)
            alone = slabs.places([piece])
            assert alone is not None and torch.equal(attend_each(row[None], alone, 2, scoring)[0], attended)


def test_what_is_no_number_stays_with_its_heads() -> None:
    slabs, rows = filled(2, 2, 16, False), torch.randn(2, 8, 16)
    slabs.read(1, 0).span(0, LENGTH)[0][1, 7, 3] = torch.nan
    places = slabs.places([Passage(0, 40, 1), Passage(1, 40, 1)])
    assert places is not None
    attended = attend_each(rows, places, 0, Scoring()).view(2, 4, 16)
    assert attended[0].isfinite().all() and attended[1, :2].isfinite().all() and attended[1, 2:].isnan().all()


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float32), (16, torch.bfloat16)])
def test_what_the_kernels_do_not_read(width: int, dtype: torch.dtype) -> None:
    assert Slabs(1, 1, 2, 10, width, dtype).places([Passage(0, 0, 1)]) is None
    assert Slabs(1, 1, 0, 10, 16).places([Passage(0, 0, 1)]) is None
