"""Lanes: order, overlap, errors."""

from __future__ import annotations

import threading

import pytest

from weft.execute.lanes import ThreadLanes
from weft.program.stages import NETWORK


@pytest.fixture
def lanes():
    made = ThreadLanes()
    yield made
    made.close()


def test_network_work_runs_in_order_of_submission(lanes: ThreadLanes) -> None:
    order: list[int] = []
    gate = threading.Event()
    first = lanes.submit(NETWORK, lambda: (gate.wait(5), order.append(0)), urgent=False)
    later = [lanes.submit(NETWORK, lambda i=i: order.append(i), urgent=i % 2 == 0) for i in range(1, 6)]
    assert order == []  # also urgent work waits its turn
    gate.set()
    for task in [first, *later]:
        task.wait()
    assert order == [0, 1, 2, 3, 4, 5]


def test_urgent_work_on_an_idle_lane_runs_at_once_and_here(lanes: ThreadLanes) -> None:
    ran: list[str] = []
    lanes.submit(NETWORK, lambda: ran.append(threading.current_thread().name), urgent=True)
    assert ran == [threading.current_thread().name]


def test_errors_reach_who_waits(lanes: ThreadLanes) -> None:
    def fail() -> None:
        raise RuntimeError("link down")

    for urgent in (True, False):
        with pytest.raises(RuntimeError, match="link down"):
            lanes.submit(NETWORK, fail, urgent).wait()
    lanes.submit(NETWORK, lambda: None, urgent=False).wait()  # the lane goes on
