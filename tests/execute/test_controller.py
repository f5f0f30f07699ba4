"""The engine's end of a group, without a group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.outlines import decoder_outline
from weft.execute.controller import Controller
from weft.execute.protocol import Chosen, Done
from weft.execute.results import RunOptions, Submitted
from weft.program.batch import one_prompt
from weft.program.build import build
from weft.program.strategy import Strategy


class Heard:
    """What ranks say, in an order of the test's."""

    one_clock = True

    def __init__(self, *said: tuple[bytes, int]) -> None:
        self._said = iter(said)

    def __call__(self, kind: type[Done]) -> tuple[bytes, Done]:
        rank, number = next(self._said)
        return rank, Done(number, 0.1, 0.0, 0.1, (0.1, 0.0), 0, [Chosen(100 * number)] if rank == b"0" else [])


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    made = Controller.__new__(Controller)
    made._ranks, made._done = [b"0", b"1"], {}
    made._due = {}
    yield made


@pytest.mark.parametrize(
    "order",
    ["0.1 1.1 0.2 1.2 0.3 1.3", "0.1 0.2 1.1 1.2 0.3 1.3", "1.1 1.2 0.1 0.2 1.3 0.3", "0.1 0.2 1.1 0.3 1.2 1.3"],
)
def test_a_rank_may_be_a_batch_ahead_of_another(controller: Controller, order: str) -> None:
    said = [(rank.encode(), int(number)) for rank, _, number in (each.partition(".") for each in order.split())]
    controller.launcher = heard = Heard(*said)  # type: ignore[assignment]
    controller._receive = heard  # type: ignore[assignment, method-assign]
    program = build(Strategy(), decoder_outline(2), one_prompt(4))
    for number in (1, 2, 3):
        result = controller.collect(Submitted(number, program, RunOptions()))
        assert [chosen.token for chosen in result.chosen] == [100 * number]
    assert not controller._done


def test_results_that_nobody_collects_are_dropped(controller: Controller) -> None:
    controller.launcher = heard = Heard((b"0", 1), (b"0", 2), (b"1", 1), (b"1", 2))  # type: ignore[assignment]
    controller._receive = heard  # type: ignore[assignment, method-assign]
    program = build(Strategy(), decoder_outline(2), one_prompt(4))
    assert controller.collect(Submitted(2, program, RunOptions())).chosen[0].token == 200
    assert not controller._done
