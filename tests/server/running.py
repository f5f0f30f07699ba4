"""Servers in this process, for tests: the engine with real workers behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

from weft.engine import Engine
from weft.llm import LLM
from weft.server.app import Settings, application
from weft.server.run import in_background
from weft.server.service import Service
from weft.workers import Progress

NAME = "tested"


@dataclass
class Running:
    """A server that answers at `url`."""

    service: Service
    url: str
    app: FastAPI

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
    with in_background(app, service) as url:
        if make is None:
            service.wait()
        yield Running(service, url, app)
