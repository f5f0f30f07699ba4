"""Whose turn it is, over HTTP: keys share fairly, and priorities are kept."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.server.running import NAME, Running, running
from weft.server.app import Settings


class Asking:
    """Requests at once, and the order in which they were answered."""

    def __init__(self, server: Running) -> None:
        self.server, self.order = server, list[str]()
        self._threads: list[threading.Thread] = []

    def ask(self, name: str, key: str, **more: object) -> None:
        def one() -> None:
            with self.server.client(headers={"authorization": f"Bearer {key}"}) as http:
                asked = {"prompt": f"{name} is", "max_tokens": 40, "ignore_eos": True, **more}
                assert http.post("/v1/completions", json=asked).is_success
            self.order.append(name)

        self._threads.append(threading.Thread(target=one))
        self._threads[-1].start()

    def wait_for(self, waiting: int) -> None:
        until = time.monotonic() + 10
        while self.server.service.waiting < waiting:
            assert time.monotonic() < until
            time.sleep(0.005)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


def test_a_busy_key_does_not_keep_another_waiting(packaged: Path) -> None:
    with running(packaged, Settings(NAME, keys=("busy", "calm")), max_num_seqs=1) as server:
        asking = Asking(server)
        for number in range(8):
            asking.ask(f"busy {number}", "busy", max_tokens=80)
        asking.wait_for(7)
        asking.ask("calm", "calm")
        asking.join()
    assert asking.order.index("calm") <= 3, asking.order


def test_a_lower_priority_number_goes_first(packaged: Path) -> None:
    with running(packaged, max_num_seqs=1) as server:
        asking = Asking(server)
        asking.ask("first", "any", max_tokens=200)
        while not server.service.running:
            time.sleep(0.005)
        for number in range(4):
            asking.ask(f"late {number}", "any", priority=1)
        asking.wait_for(4)
        asking.ask("urgent", "any", priority=-1)
        asking.join()
    assert asking.order[:2] == ["first", "urgent"], asking.order
