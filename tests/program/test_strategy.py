"""Strategies as text, and where they cut."""

from __future__ import annotations

import pytest

from weft.errors import InputError
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.strategy import Cuts, Strategy, chunks, place


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("serial", "serial"), ("iso", "iso:2"), ("iso:3", "iso:3"), ("iso:2/4", "iso:2/4"), ("iso:2/2", "iso:2"),
        ("iso@300,700", "iso@300,700"), ("iso@300/150,450", "iso@300/150,450"), ("tiles", "tiles:4"),
        ("tiles:8", "tiles:8"), ("requests", "requests:2"), ("requests:3", "requests:3"), ("rs", "rs"),
        ("iso+tiles", "iso:2+tiles:4"), ("iso:2/4+tiles:8", "iso:2/4+tiles:8"), ("iso:4+rs", "iso:4+rs"),
        ("iso@300,700+rs", "iso@300,700+rs"), ("requests:3+tiles:2", "requests:3+tiles:2"), ("iso:1", "serial"),
        ("iso:3+ahead", "iso:3+ahead"), ("iso@300,700+ahead", "iso@300,700+ahead"),
    ],
)  # fmt: skip
def test_text(text: str, canonical: str) -> None:
    assert str(Strategy.parse(text)) == canonical
    assert Strategy.parse(canonical) == Strategy.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "iso:",
        "iso:0",
        "iso:65",
        "iso@",
        "iso@5,5",
        "iso@7,3",
        "iso@0",
        "tiles:2/3",
        "tiles@5",
        "serial:2",
        "rs:2",
        "+rs",
        "iso+",
        "iso+iso",
        "tiles+rs",
        "rs+tiles",
        "iso:2+tiles:4+rs",
        "iso:2+serial",
        "ahead",
        "iso:2+ahead+rs",
        "requests:2/3",
    ],
)
def test_what_is_no_strategy_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(InputError, match="is not a strategy; allowed: auto, serial, iso"):
        Strategy.parse(text)


@pytest.mark.parametrize("text", ["iso:2/4+rs", "iso@300/150+rs"])
def test_scattered_sums_need_the_same_cuts_everywhere(text: str) -> None:
    with pytest.raises(InputError, match="rs needs the same cuts in every stage; leave out what follows the /"):
        Strategy.parse(text)


@pytest.mark.parametrize(
    ("strategy", "cuts"),
    [
        ("serial", Cuts()),
        ("iso:2", Cuts((50,), (50,))),
        ("iso:2/4", Cuts((50,), (25, 50, 75))),
        ("iso@10,90/40", Cuts((10, 90), (40,))),
        ("iso@10,200", Cuts((10,), (10,))),
        ("tiles:4", Cuts(tiles=4)),
        ("iso:2+tiles:4", Cuts((50,), (50,), tiles=4)),
        ("iso:2+rs", Cuts((50,), (50,), scattered=True)),
        ("iso:2+ahead", Cuts((50,), (50,), ahead=True)),
        ("requests", Cuts()),
    ],
)
def test_cuts_of_one_prompt(strategy: str, cuts: Cuts) -> None:
    assert place(Strategy.parse(strategy), one_prompt(100)) == cuts


def test_more_chunks_than_tokens() -> None:
    assert place(Strategy.parse("iso:4"), one_prompt(2)) == Cuts((1,), (1,))
    assert place(Strategy.parse("iso:2"), one_prompt(1)) == Cuts()


def test_requests_cut_between_sequences() -> None:
    batch = Batch((Segment(0, 0, 10), Segment(1, 0, 60), Segment(2, 0, 30)))
    assert place(Strategy.parse("requests"), batch) == Cuts((70,), (70,))
    assert place(Strategy.parse("requests:3"), batch) == Cuts((10, 70), (10, 70))


def test_granule_counts_positions_of_the_sequence() -> None:
    batch = Batch((Segment(0, 0, 10), Segment(1, 30, 100)))
    # The middle is offset 55, position 75 of the second sequence: 64 is nearest, at offset 44.
    assert place(Strategy.parse("iso:2"), batch, 64) == Cuts((44,), (44,))
    assert place(Strategy.parse("iso:2"), one_prompt(100), 128) == Cuts()


def test_a_written_cut_off_the_granule_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"the cut 100 is not on the granule of 64 positions.*nearest is 128"):
        place(Strategy.parse("iso@100"), one_prompt(200), 64)
    assert place(Strategy.parse("iso@128"), one_prompt(200), 64) == Cuts((128,), (128,))


def test_chunks() -> None:
    assert chunks(Rows(0, 10), (3, 7)) == (Rows(0, 3), Rows(3, 7), Rows(7, 10))
    assert chunks(Rows(0, 10), ()) == (Rows(0, 10),)
