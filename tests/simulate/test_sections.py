"""What programs of several sections are predicted to take: by hand, in formulas, and in bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.outlines import decoder_outline
from tests.simulate.costs import NOTHING, RANK, costs
from weft.layout import Layout, even_layers
from weft.plan.candidates import ROUNDS
from weft.plan.search import Search
from weft.plan.wiring import Wiring
from weft.program.batch import one_prompt
from weft.program.build import build
from weft.program.stages import COMPUTE, Kind
from weft.program.steps import ProgramError
from weft.program.strategy import Strategy, place
from weft.program.text import parse
from weft.simulate.cost import Contention, Costs, Table
from weft.simulate.predicted import simulate
from weft.timeline.timeline import Timeline

MS = 1e-3


def known(world: int, slow: dict[int, float] | None = None, send: Table = NOTHING, scores: bool = False) -> Costs:
    """Ranks that take one millisecond for 8 rows of a layer, and nothing for the ends."""
    row = Table((1.0,), (MS / 16,))
    rank = replace(
        RANK, body={"attention": row, "mlp": row, "embed": NOTHING, "head": NOTHING},
        tail=dict.fromkeys(("attention", "mlp", "embed", "head"), NOTHING), begin=NOTHING,
        present=RANK.present if scores else Table.line(0.0, 0.0), past=RANK.past if scores else 0.0,
        one=RANK.one if scores else 0.0,
    )  # fmt: skip
    ranks = tuple(rank.scaled((slow or {}).get(number, 1.0)) for number in range(world))
    wires = {name: replace(wire, send=send) for name, wire in costs().wires.items()}
    return replace(costs(), ranks=ranks, wires=wires, world=world, contention=Contention())


def run(strategy: str, layout: Layout, costs: Costs, tokens: int) -> Timeline:
    batch, outline = one_prompt(tokens), decoder_outline(sum(layout.layers))
    return simulate(build(Strategy.parse(strategy), outline, batch, layout=layout), batch, costs, "exact")


@pytest.mark.parametrize(("pieces", "sections"), [(1, 2), (4, 2), (8, 2), (4, 4), (16, 4), (3, 3)])
def test_the_bubble_of_equal_pieces(pieces: int, sections: int) -> None:
    """(p - 1) / (m + p - 1) of each rank's time, exactly, where rows travel in no time. The last layer of wanted rows
    alone is left out of the count: all rows are wanted."""
    layout, tokens = Layout((3,) * sections, ((1.0,),) * sections), 48 * pieces
    batch, outline = one_prompt(tokens), replace(decoder_outline(3 * sections), narrows=False)
    program = build(Strategy.parse(f"pipe:{pieces}"), outline, batch, layout=layout)
    timeline = simulate(program, batch, known(sections), "exact")
    for rank in range(sections):
        idle = 1 - timeline.busy(rank, COMPUTE) / timeline.seconds
        assert idle == pytest.approx((sections - 1) / (pieces + sections - 1), abs=1e-9)
    assert timeline.seconds == pytest.approx((pieces + sections - 1) * 3 * 6 * MS)


def test_two_pieces_by_hand() -> None:
    """Pieces of 16 rows take 2 ms a layer, and 1.5 ms to come to the next section; the second one has 1 layer."""
    timeline = run("pipe:2", Layout((2, 1), ((1.0,), (1.0,))), known(2, send=Table((16.0 * 4096,), (1.5 * MS,))), 32)
    spans = {(e.rank, e.kind, e.stage, e.rows.start): (e.start, e.stop) for e in timeline.events}
    sent = [time for rank in (0, 1) for start in (0, 16) for time in spans[rank, Kind.SEND, "L1.mlp", start]]
    assert sent == pytest.approx([4 * MS, 5.5 * MS, 8 * MS, 9.5 * MS] * 2)
    begins = [spans[1, Kind.COMPUTE, "L2.attention", start][0] for start in (0, 16)]
    assert begins == pytest.approx([5.5 * MS, 9.5 * MS])


def test_a_slow_section_sets_the_pace() -> None:
    layout, even = Layout((2, 4), ((1.0,), (1.0,))), Layout((3, 3), ((1.0,), (1.0,)))
    slow = known(2, slow={0: 2.0})
    assert run("pipe:8", layout, slow, 256).seconds < 0.75 * run("pipe:8", even, slow, 256).seconds


@pytest.mark.parametrize("strategy", ["serial", "pipe:4", "pipe:3+iso:2", "pipe:2+tiles:2", "iso:3+ahead"])
@pytest.mark.parametrize("per_byte", [1e-9, 2e-7, 1e-6])
@pytest.mark.parametrize("shares", [((1.0,), (1.0,)), ((1.0, 1.0), (1.0,))])
def test_rounds_that_are_not_laid_out(strategy: str, per_byte: float, shares: tuple[tuple[float, ...], ...]) -> None:
    """What the search goes by is what laying out every round gives, also where rows travel for many rounds; nearly so
    where sums share the link with these."""
    layout, batch, outline = Layout((20, 12), shares), one_prompt(600), decoder_outline(32)
    costs = known(layout.world, send=Table.line(1e-4, per_byte), scores=True)
    whole = run(strategy, layout, costs, 600)
    search = Search(outline, layout=layout)
    laid = search.laid_out(batch, place(Strategy.parse(strategy), batch), costs, Wiring("exact"), {})
    shared = layout.world > 2 and per_byte > 1e-9
    assert laid.seconds == pytest.approx(whole.seconds, rel=0.1 if shared else 1e-6)
    assert all(sum(each.laid.laid) < len(each.section.form) for each in laid.sections) and ROUNDS == 3


@given(
    layers=st.lists(st.integers(1, 6), min_size=2, max_size=4), data=st.data(), tokens=st.integers(8, 700),
    strategy=st.sampled_from(["serial", "iso:2", "pipe:2", "pipe:5", "pipe:3+iso:2"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_every_prediction_keeps_to(layers, data, tokens, strategy) -> None:
    """Rows come before they are computed, ranks do one thing at a time, and nothing is faster than the busiest rank."""
    layout = Layout(tuple(layers), tuple((1.0,) * data.draw(st.integers(1, 2)) for _ in layers))
    slow = {rank: data.draw(st.floats(0.5, 3.0)) for rank in range(layout.world)}
    timeline = run(strategy, layout, known(layout.world, slow, Table.line(2e-4, 2e-9)), tokens)
    for rank in range(layout.world):
        own = timeline.lane(rank, COMPUTE)
        assert all(one.stop <= other.start + 1e-9 for one, other in zip(own, own[1:], strict=False))
        assert timeline.seconds >= timeline.busy(rank, COMPUTE) - 1e-9
        first = layout.section_of(rank).first
        for sent in (e for e in timeline.events if e.kind is Kind.SEND and e.rank == rank and e.lane[-1] != "0"):
            if sent.stage == f"L{first - 1}.mlp":
                begins = [e.start for e in own if e.stage == f"L{first}.attention" and e.rows.intersects(sent.rows)]
                assert min(begins) >= sent.stop - 1e-9


def test_what_can_not_be_taken_apart() -> None:
    text = "compute embed 0:8\ncompute L0.attention 0:8 for 0\nreduce L0.attention 0:8 for 0\n"
    with pytest.raises(ProgramError, match="groups that have some of the steps"):
        simulate(parse(text), one_prompt(8), known(2), "exact")


def test_deep_pipelines_are_laid_out_quickly() -> None:
    import time

    layout, batch, outline = Layout(even_layers(80, 4), ((1.0, 1.0),) * 4), one_prompt(4096), decoder_outline(80)
    search, costs = Search(outline, layout=layout), known(8, scores=True)
    cuts = place(Strategy.parse("pipe:16"), batch)
    search.laid_out(batch, cuts, costs, Wiring("exact"), {})
    begin = time.perf_counter()
    search.laid_out(batch, cuts, costs, Wiring("exact"), {})
    assert time.perf_counter() - begin < 0.2  # some 0.01 on an idle machine
