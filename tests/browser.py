"""Pages in a real browser: the system's Chromium, headless."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (the package chromium)")


@contextmanager
def opened(place: Path | str) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of a file or an address, with what it complained of and what it asked for, both growing."""
    from playwright.sync_api import sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, *(["--no-sandbox"] if root else [])]
        )
        try:
            page = browser.new_page(viewport={"width": 1200, "height": 800})
            complaints: list[str] = []
            requests: list[str] = []
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(place.as_uri() if isinstance(place, Path) else place)
            yield page, complaints, requests
        finally:
            browser.close()
