"""Whether ranks that can't be reached are noticed, and those that can be are not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from weft.parallel import pulse
from weft.parallel.pulse import Pulse


class Store:
    """Where ranks find each other, for threads."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 10)
            return self._values[key].encode()


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Pulse], list[tuple[int, int]]]]:
    monkeypatch.setattr(pulse, "EVERY", 0.05)
    monkeypatch.setattr(pulse, "SILENT", 0.5)
    store, lost = Store(), list[tuple[int, int]]()
    pulses: dict[int, Pulse] = {}

    def start(rank: int) -> None:
        pulses[rank] = Pulse(rank, 3, store, "127.0.0.1", lambda peer, seconds: lost.append((rank, peer)))

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield [pulses[rank] for rank in range(3)], lost
    for each in pulses.values():
        each.stop()


def test_nobody_is_lost_while_all_live(three: tuple[list[Pulse], list[tuple[int, int]]]) -> None:
    time.sleep(1.0)
    assert three[1] == []


def test_all_others_notice_a_silent_one_and_say_so_while_it_is(
    three: tuple[list[Pulse], list[tuple[int, int]]],
) -> None:
    pulses, lost = three
    time.sleep(0.3)
    pulses[1].stop()
    time.sleep(1.4)
    assert set(lost) == {(0, 1), (2, 1)} and len(lost) == 4
