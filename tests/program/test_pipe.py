"""Programs of layouts with several sections, and of pieces that flow through them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.execute.programs import lagging
from tests.outlines import decoder_outline
from weft.errors import InputError
from weft.layout import Layout, even_layers
from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build, demand_scattering
from weft.program.check import check
from weft.program.stages import Kind
from weft.program.strategy import Strategy
from weft.program.text import parse, write, write_expanded

STRATEGIES = (
    "serial", "iso:2", "iso:2/4", "tiles:3", "iso:3+ahead", "requests", "pipe:2", "pipe:5", "pipe@7,30", "pipe:3+iso:2",
    "pipe:2+iso:2/4", "pipe:4+tiles:2", "pipe:3+requests:2", "pipe:2+iso:3+ahead",
)  # fmt: skip
TWO = Layout((3, 2), ((1.0, 1.0), (1.0,)))

PIECES = """\
chunks  a 0:4  b 4:8  all 0:8

compute  embed         a            for 0
compute  L0.attention  a            for 0
reduce   L0.attention  a            for 0
compute  L0.mlp        a            for 0            after reduce L0.attention a
reduce   L0.mlp        a            for 0
send     L0.mlp        a            on pipe1  for 0  to 1  after reduce L0.mlp a
compute  embed         b            for 0
compute  L0.attention  b            for 0
reduce   L0.attention  b            for 0
compute  L0.mlp        b            for 0            after reduce L0.attention b
reduce   L0.mlp        b            for 0
send     L0.mlp        b            on pipe1  for 0  to 1  after reduce L0.mlp b
compute  L1.attention  a    wanted  for 1            after send L0.mlp a
reduce   L1.attention  a    wanted  for 1
compute  L1.mlp        a    wanted  for 1            after reduce L1.attention a
reduce   L1.mlp        a    wanted  for 1
compute  L1.attention  b    wanted  for 1            after send L0.mlp b
reduce   L1.attention  b    wanted  for 1
compute  L1.mlp        b    wanted  for 1            after reduce L1.attention b
reduce   L1.mlp        b    wanted  for 1
compute  head          all  wanted  for 1            after reduce L1.mlp a, reduce L1.mlp b
gather   head          all  wanted  for 1
"""


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_two_pieces_through_two_sections() -> None:
    layout = Layout((1, 1), ((1.0,), (1.0,)))
    program = build(Strategy.parse("pipe:2"), decoder_outline(2), one_prompt(8), layout=layout)
    assert words(write(program)) == words(PIECES)


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data(), strategy=st.sampled_from(STRATEGIES),
    lags=st.sampled_from([(0, 0), (0, 1)]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_layout_and_strategy_is_legal_and_reads_back(layers, data, strategy, lags) -> None:
    shares = tuple((1.0,) * data.draw(st.integers(1, 3)) for _ in layers)
    layout, outline = Layout(tuple(layers), shares), lagging(decoder_outline(sum(layers)), *lags)
    batch = Batch((Segment(0, 0, 13, wanted=2), Segment(1, 5, 1), Segment(2, 0, 26)))
    program = build(Strategy.parse(strategy), outline, batch, layout=layout)
    check(program, outline, batch, layout.world)
    assert parse(write(program)) == program
    expanded = parse(write_expanded(program))
    check(expanded, outline, batch, layout.world)
    for rank in range(layout.world):
        section = layout.section_of(rank)
        computed = {
            each.layer
            for each in program
            if each.kind in (Kind.COMPUTE, Kind.BODY) and rank in (each.step.ranks or [rank])
        }
        assert computed - {None} == set(range(section.first, section.stop))


def test_pieces_flow() -> None:
    """A section's ranks are told to receive a piece before they compute the one before it."""
    layout = Layout((2, 2, 2), ((1.0,),) * 3)
    program = build(Strategy.parse("pipe:4"), decoder_outline(6), one_prompt(64), layout=layout)
    issued = [
        each for each in program if each.kind is Kind.SEND or (each.stage, each.kind) == ("L2.attention", "compute")
    ]
    mine = [(each.kind, each.rows.start // 16) for each in issued if each.step.concerns(1) and each.step.to != (2,)]
    received = {piece: place for place, (kind, piece) in enumerate(mine) if kind is Kind.SEND}
    computed = {piece: place for place, (kind, piece) in enumerate(mine) if kind is not Kind.SEND}
    assert all(received[piece + 1] < computed[piece] for piece in range(3))


def test_a_form_grows_with_pieces_and_sections_and_not_with_layers() -> None:
    def steps(layers: int) -> int:
        layout = Layout(even_layers(layers, 4), ((1.0, 1.0),) * 4)
        program = build(Strategy.parse("pipe:8"), decoder_outline(layers), one_prompt(640), layout=layout)
        return sum(len(block.steps) for block in program.form.blocks)

    assert steps(40) == steps(80) < 400


def test_pieces_are_proven_in_reasonable_time() -> None:
    layout, outline = Layout(even_layers(80, 4), ((1.0,),) * 4), decoder_outline(80)
    program = build(Strategy.parse("pipe:8"), outline, one_prompt(643), layout=layout)
    begin = time.perf_counter()
    check(program, outline, one_prompt(643), 4)
    assert time.perf_counter() - begin < 2  # some 0.1 on an idle machine


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("pipe", "pipe:4"), ("pipe:1", "serial"), ("pipe@8,16", "pipe@8,16"), ("pipe:2+serial", "pipe:2"),
        ("pipe+iso", "pipe:4+iso:2"), ("pipe:3+iso:2/4", "pipe:3+iso:2/4"), ("pipe@5+tiles", "pipe@5+tiles:4"),
    ],
)  # fmt: skip
def test_texts(text: str, canonical: str) -> None:
    assert str(Strategy.parse(text)) == canonical and str(Strategy.parse(canonical)) == canonical


@pytest.mark.parametrize("text", ["pipe:", "pipe:0", "pipe:65", "pipe@", "pipe@3,2", "pipe+", "pipe+pipe", "iso+pipe"])
def test_texts_that_say_nothing(text: str) -> None:
    with pytest.raises(InputError, match="is not a strategy"):
        Strategy.parse(text)


def test_sums_are_not_scattered_where_rows_go_on() -> None:
    with pytest.raises(InputError, match="leave out rs, or pipe"):
        Strategy.parse("pipe:2+rs")
    with pytest.raises(InputError, match="tp 2,1 x pp 2; leave rs out"):
        demand_scattering(decoder_outline(5), TWO)


def test_layouts_in_words() -> None:
    assert [str(each) for each in (Layout.tensor(5, (1, 1)), TWO, Layout((2, 2), ((1.0,), (2.0,))))] == [
        "tp 2", "tp 2,1 x pp 2", "tp 1 x pp 2",
    ]  # fmt: skip
    assert even_layers(32, 3) == (11, 11, 10) and TWO.parts == [0.3, 0.3, 0.4] and TWO.leader == 2
    with pytest.raises(InputError, match="--pp 6: the model has 5 layers"):
        even_layers(5, 6)
