"""The page, in a real browser: chat, live view, errors, keys; and nothing from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import needs_browser, opened
from tests.server.running import NAME, Running, running
from tests.server.scripted import with_template
from weft.server.app import Settings

pytestmark = needs_browser


def until(page: Any, expression: str, seconds: float = 10) -> None:
    """Waits until it is true in the page, whose policy forbids what Playwright's own waiting does."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"after {seconds} s not yet: {expression}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[Running]:
    with running(packaged, tensor_parallel_size=2, max_num_batched_tokens=512) as there:
        yield there


def test_a_conversation_and_the_live_view(server: Running) -> None:
    with opened(f"{server.url}/") as (page, complaints, requests):
        page.wait_for_selector("#status[data-state=ready]")
        assert page.text_content("#model") == NAME
        assert page.evaluate("document.activeElement.id") == "prompt", "one can type at once"
        page.fill("#temperature", "0")
        page.fill("#tokens", "40")
        page.focus("#prompt")
        page.keyboard.type("The for statement is used to")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.message').length == 2")
        until(page, "/first token after/.test(document.querySelector('.message:last-child small').textContent)")
        first = page.text_content(".message:last-child div")
        assert len(first) > 20 and "40 tokens" in page.text_content(".message:last-child small")
        page.keyboard.type("and")
        page.keyboard.press("Enter")  # the second turn holds the first one
        until(page, "document.querySelectorAll('.message').length == 4")
        until(page, "/tokens;/.test(document.querySelector('.message:last-child small').textContent)")
        page.wait_for_selector("#timeline svg .step", state="attached", timeout=15000)
        assert "strategy" not in page.text_content("#plan") and " of 1 sequence in " in page.text_content("#plan")
        assert float(page.text_content("#speed")) > 0
        until(page, "document.querySelector('#running').textContent == '0 of 16'", 5)
        assert page.evaluate("document.querySelector('#rate path').getAttribute('d').startsWith('M')")
        page.click("#reset")
        assert page.locator(".message").count() == 0
        assert complaints == []
        assert {request.split("/")[2] for request in requests if request.startswith("http")} == {server.url[7:]}


def test_thoughts_stand_apart(packaged: Path, tmp_path: Path) -> None:
    with_template(packaged, tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}<think>{# </think> #}")
    with running(tmp_path) as there, opened(f"{there.url}/") as (page, complaints, _):
        page.fill("#temperature", "0")
        page.fill("#tokens", "12")
        page.focus("#prompt")
        page.keyboard.type("import os")
        page.keyboard.press("Enter")
        until(page, "/tokens;/.test(document.querySelector('.message:last-child small').textContent)")
        assert len(page.text_content(".message:last-child .thought")) > 10
        assert page.text_content(".message:last-child div") == "" and complaints == []


def test_escape_stops_and_long_prompts_show_how_far_they_are(server: Running) -> None:
    with opened(f"{server.url}/") as (page, complaints, _):
        page.wait_for_selector("#status[data-state=ready]")
        page.fill("#tokens", "1000")
        page.fill("#prompt", "def f(x): return x + 1\n" * 100)
        page.focus("#prompt")
        page.evaluate(
            "new MutationObserver(() => { if (document.querySelector('progress')) window.seen = true; })"
            ".observe(document.body, { childList: true, subtree: true })"
        )
        page.keyboard.press("Enter")
        until(page, "window.seen === true", 15)
        until(page, "document.querySelector('.message:last-child div').textContent.length > 5")
        page.keyboard.press("Escape")
        until(page, "document.querySelector('.message:last-child small').textContent == 'stopped'")
        until(page, "document.querySelector('#running').textContent.startsWith('0')", 5)
        assert complaints == []


def test_errors_are_shown_where_they_belong(server: Running) -> None:
    with opened(f"{server.url}/") as (page, _, __):
        page.fill("#tokens", "0")
        page.evaluate("document.getElementById('ask').noValidate = true")
        page.fill("#prompt", "hello")
        page.focus("#prompt")
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.error")
        assert "max_tokens" in page.text_content(".message.error div")


def test_a_key_is_asked_for(packaged: Path) -> None:
    with running(packaged, Settings(NAME, keys=("secret",))) as server, opened(f"{server.url}/") as (page, _, __):
        page.wait_for_selector("#key-field:not([hidden])")
        page.fill("#key", "secret")
        page.wait_for_selector("#status[data-state=ready]", timeout=5000)


def test_dark_and_narrow(server: Running, tmp_path: Path) -> None:
    with opened(f"{server.url}/") as (page, complaints, _):
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 400, "height": 800})
        page.wait_for_selector("#status[data-state=ready]")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 26)"
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, "nothing sticks out"
        assert complaints == []
