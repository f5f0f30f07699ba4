"""Servers in this process, for tests: uvicorn on a thread, the engine with real workers behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from weft.engine import Engine, Progress
from weft.llm import LLM
from weft.server.app import Settings, application
from weft.server.run import Server, bound
from weft.server.service import Service

NAME = "tested"


@dataclass
class Running:
    """A server that answers at `url`."""

    service: Service
    url: str

    def client(self, **options: Any) -> httpx2.Client:
        """A plain HTTP client."""
        return httpx2.Client(**{"base_url": self.url, "timeout": 60, **options})


@contextmanager
def running(
    model: Path | None = None, settings: Settings | None = None, most_waiting: int = 256, patience: float = 30.0,
    make: Callable[[Progress], Engine] | None = None, **options: Any,
) -> Iterator[Running]:  # fmt: skip
    """A server with the model loaded; ends its workers and its thread."""
    given = {"num_threads": 1, "overlap": "serial", "token_interval": 0.2, **options}
    service = Service(make or (lambda tell: LLM(model, progress=tell, **given).engine), most_waiting)
    service.metrics.named(NAME)
    app = application(service, settings or Settings(NAME, patience=patience))
    listening = bound("127.0.0.1", 0)
    server = _Server(app, service, drain=5)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    service.start()
    thread.start()
    try:
        if make is None:
            service.wait()
        server.ready.wait(30)
        yield Running(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()
        listening.close()
        assert not thread.is_alive(), "the server did not end"


class _Server(Server):
    """Without signals, which are for main threads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ready = threading.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, *arguments: Any, **options: Any) -> None:
        await super().startup(*arguments, **options)
        self.ready.set()
