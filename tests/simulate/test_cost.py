"""Tables and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.simulate.costs import RANK, costs
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.stages import Kind
from weft.simulate.cost import ComputeCosts, Contention, Table


def test_tables_are_straight_between_and_beyond_their_points() -> None:
    table = Table((1.0, 3.0, 7.0), (1.0, 2.0, 4.0))
    assert [table.at(size) for size in (1, 2, 3, 5, 7, 9)] == [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
    assert table.at(-5) == 0.0  # no time is below zero
    assert Table((2.0,), (3.0,)).at(4) == 6.0
    assert table.scaled(2.0).at(5) == 6.0
    assert Table.line(1.0, 0.5).at(3e6) == pytest.approx(1.0 + 1.5e6)


def test_scores_know_positions() -> None:
    """Cutting a prompt leaves its pairs what they are: the square's halves and the rectangle between them."""
    whole, halves = RANK.scores(one_prompt(512), Rows(0, 512)), 2 * RANK.scores(one_prompt(256), Rows(0, 256))
    second = RANK.scores(one_prompt(512), Rows(256, 512))
    assert whole == pytest.approx(1.2e-8 * 512**2)
    assert second == pytest.approx(1.2e-8 * 256**2 + 2.2e-8 * 256**2)
    two = Batch((Segment(0, 0, 256), Segment(1, 0, 256)))
    assert RANK.scores(two, Rows(0, 512)) == pytest.approx(halves)
    assert RANK.scores(Batch((Segment(0, 999, 1),)), Rows(0, 1)) == pytest.approx(1000 * 3e-7)


def test_windows_limit_what_a_token_sees() -> None:
    windowed = replace(RANK, windows=((100, 1.0),))
    late = Batch((Segment(0, 5000, 64),))
    assert windowed.scores(late, Rows(0, 64)) < 0.1 * RANK.scores(late, Rows(0, 64))
    whole, sliding = one_prompt(8000), Rows(0, 8000)
    pairs = 100 * 100 / 2 + 7900 * 100
    assert windowed.scores(whole, sliding) == pytest.approx(RANK.present.at(8000) * 2 * pairs)
    assert windowed.scores(one_prompt(100), Rows(0, 100)) == RANK.scores(one_prompt(100), Rows(0, 100))
    mixed = replace(RANK, windows=((100, 0.75), (None, 0.25)))
    each = [0.75 * windowed.scores(late, Rows(0, 64)), 0.25 * RANK.scores(late, Rows(0, 64))]
    assert mixed.scores(late, Rows(0, 64)) == pytest.approx(sum(each))


def test_parts_of_a_stage_add_up() -> None:
    known, batch, rows = costs(), one_prompt(200), Rows(0, 200)
    for part in ("attention", "mlp"):
        whole, body, tail = (
            known.compute_seconds(RANK, kind, part, rows, batch) for kind in (Kind.COMPUTE, Kind.BODY, Kind.TAIL)
        )
        assert whole == pytest.approx(body + tail)
    entered = known.compute_seconds(RANK, Kind.COMPUTE, "mlp", rows, batch, entered=True)
    assert entered == pytest.approx(known.compute_seconds(RANK, Kind.COMPUTE, "mlp", rows, batch) - RANK.enter.at(200))


def test_the_slowest_of_each_sets_the_pace() -> None:
    slow = RANK.scaled(2.0)
    assert costs(ranks=(RANK, slow)).pace.body["mlp"].at(64) == slow.body["mlp"].at(64)
    assert ComputeCosts.slowest([RANK]) is RANK
    # Devices of different kinds have their points at different sizes.
    both = Table.slowest([Table((0.0, 10.0), (1.0, 2.0)), Table((0.0, 4.0, 8.0), (0.0, 0.0, 8.0))])
    assert [both.at(size) for size in (0, 4, 8, 16)] == pytest.approx([1.0, 1.4, 8.0, 24.0])


def test_scaling_changes_what_it_names() -> None:
    before, after = costs(), costs().scaled(2.0, 3.0)
    assert after.pace.past == 2 * before.pace.past
    wires = before.wires["exact"], after.wires["exact"]
    assert wires[1].sums["exchange"].at(1000) == pytest.approx(3 * wires[0].sums["exchange"].at(1000))
    assert wires[1].hop.at(1e6) == pytest.approx(3 * wires[0].hop.at(1e6))
    assert before.scaled(1.0, 1.0) is before


def test_contention_takes_by_size() -> None:
    wire = costs().wires["exact"]
    contention = Contention(part=0.1, small=1e-3, fixed=2e-3, per_byte=1e-9)
    assert contention.taken(wire, 1000, 1.0) == pytest.approx(0.1 + 1e-3)
    assert contention.taken(wire, 1e6, 1.0) == pytest.approx(0.1 + 3e-3)
