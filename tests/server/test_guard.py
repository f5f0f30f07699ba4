"""Who may ask, how much, how slowly; what a hostile checkpoint can't do; what is never said."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.server.running import NAME, Running, running
from weft.errors import InputError
from weft.server import run
from weft.server.app import Settings
from weft.text import Tokenizer

KEY, OTHER = "sk-the-first-key", "sk-the-other-key"
ASKED = {"prompt": "import os", "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(packaged: Path) -> Iterator[Running]:
    settings = Settings(NAME, keys=(KEY, OTHER), most_body=2000, patience=1.0)
    with running(packaged, settings) as server:
        yield server


def test_only_who_has_a_key_may_ask(locked: Running) -> None:
    with locked.client() as http:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
        ):
            refused = http.post("/v1/completions", json=ASKED, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        for key in (KEY, OTHER):
            assert http.post("/v1/completions", json=ASKED, headers={"authorization": f"Bearer {key}"}).is_success
        assert http.get("/health").is_success and http.get("/metrics").is_success and http.get("/").is_success
        for path in ("/v1/models", "/live", "/tokenize", "/openapi.json"):
            assert http.get(path).status_code == 401


def test_keys_are_never_said(
    locked: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="uvicorn"), locked.client() as http:
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        answer = http.post("/v1/completions", content=b"{", headers=headers)
        http.post("/v1/completions", json=ASKED, headers={"authorization": f"Bearer {KEY}x"})
        shown = answer.text + http.get("/health").text + http.get("/metrics").text
    printed = capfd.readouterr()
    assert KEY not in shown + caplog.text + printed.out + printed.err


def test_long_bodies_are_refused(locked: Running) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with locked.client() as http:
        long = json.dumps({"prompt": "a" * 3000}).encode()
        assert http.post("/v1/completions", content=long, headers=headers).status_code == 413
        pieces = http.post("/v1/completions", content=iter([long[:1500], long[1500:]]), headers=headers)
        assert pieces.status_code == 413 and "2000 bytes" in pieces.json()["error"]["message"]


def connection(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_who_sends_a_body_slowly_is_told(locked: Running) -> None:
    with connection(locked) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 50\r\n"
        slow.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        begin = time.monotonic()
        assert b" 408 " in slow.recv(4096).splitlines()[0] and time.monotonic() - begin < 3


def test_a_head_that_does_not_come_is_not_awaited_for_ever(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    with running(packaged) as server:
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for first, then in ((b"", b""), (b"", whole[:20]), (whole, whole[:20])):
            with connection(server) as slow:
                slow.sendall(first)
                begin = time.monotonic()
                if first:
                    assert b" 200 " in slow.recv(4096)
                slow.sendall(then)
                while slow.recv(4096):
                    pass
                assert time.monotonic() - begin < 3


def test_who_takes_nothing_is_let_go(packaged: Path) -> None:
    with running(packaged, Settings(NAME, patience=0.5)) as server, connection(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # The echo fills every buffer on the way, and then the client reads no more.
        body = json.dumps({"prompt": "a b " * 400, "max_tokens": 300, "n": 4, "stream": True, "logprobs": 20}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        slow.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until = time.monotonic() + 20
        while server.service.running == 0 and time.monotonic() < until:
            time.sleep(0.01)
        begin = time.monotonic()
        while server.service.running and time.monotonic() < until:
            time.sleep(0.01)
        assert server.service.running == 0 and time.monotonic() - begin < 15


def test_web_pages_elsewhere_cannot_have_a_browser_ask(packaged: Path) -> None:
    with running(packaged) as server, server.client() as http:
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:8000", 200),
            ("[::1]", 200),
            ("127.0.0.2:8000", 200),
            ("evil.example", 403),
        ):
            assert http.get("/health", headers={"host": host}).status_code == status, host
        assert (
            "access-control-allow-origin" not in http.get("/health", headers={"origin": "http://evil.example"}).headers
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].listdir('/') }}",
        "{{ messages.append(1) }}",
        "{{ ('%s' % messages.__class__).format_map.__globals__ }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_hostile_template_reaches_nothing(packaged: Path, tmp_path: Path, template: str) -> None:
    directory = tmp_path / "hostile"
    shutil.copytree(packaged, directory)
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(directory)
    try:
        shown = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hello"}]))
    except InputError as error:
        shown = ""
        assert "the chat template refuses" in str(error)
    assert shown == "", "something inside was reached"


def test_no_type_at_all_will_do_with_a_key(locked: Running, packaged: Path) -> None:
    """A browser asks before it sends one for a page elsewhere, right or wrong; some clients send nothing else."""
    body = json.dumps(ASKED).encode()
    with locked.client() as http:
        for key in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert http.post("/v1/completions", content=body, headers=key).status_code == 200
    with running(packaged) as there, there.client() as http:
        assert http.post("/v1/completions", content=body).status_code == 415
        assert http.post("/v1/completions", content=body, headers={"x-api-key": "any"}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"]
)
def test_only_json_is_taken_for_json(locked: Running, kind: str) -> None:
    """What a web page elsewhere may have a browser send without asking computes nothing."""
    headers = {"authorization": f"Bearer {KEY}"} | {"content-type": kind}
    with locked.client() as http:
        answer = http.post("/v1/completions", content=json.dumps(ASKED).encode(), headers=headers)
        assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]
        for fine in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
            asked = http.post(
                "/v1/completions", content=json.dumps(ASKED).encode(), headers=headers | {"content-type": fine}
            )
            assert asked.status_code == 200, asked.text


def asks_first(server: Running, origin: str) -> httpx2.Response:
    """As a browser does before a page of that origin may send JSON with a key."""
    headers = {
        "origin": origin, "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }  # fmt: skip
    with server.client() as http:
        return http.options("/v1/chat/completions", headers=headers)


def test_pages_elsewhere_may_ask_where_that_is_allowed(packaged: Path, locked: Running) -> None:
    page, other = "https://chat.example", "https://other.example"
    assert "access-control-allow-origin" not in asks_first(locked, page).headers
    with running(packaged, Settings(NAME, keys=(KEY,), origins=(page,))) as server:
        allowed = asks_first(server, page)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == page
        assert "access-control-allow-origin" not in asks_first(server, other).headers
        with server.client(headers={"origin": page}) as http:
            refused = http.post("/v1/completions", json=ASKED)
            assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page
            asked = http.post("/v1/completions", json=ASKED, headers={"authorization": f"Bearer {KEY}"})
            assert asked.is_success and asked.headers["access-control-allow-origin"] == page
