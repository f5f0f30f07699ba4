"""What ranks on several machines send each other is encrypted by default; tokens and keys."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from tests.processes import Command, free_port
from weft.errors import InputError
from weft.execute.controller import Controller
from weft.execute.protocol import Hello
from weft.execute.results import RunOptions
from weft.launch.hub import Hub
from weft.launch.joined import JoinedLauncher
from weft.launch.keys import engine_of, key_of, new_key
from weft.launch.launcher import TOKEN_VARIABLE, VERSION
from weft.opening import open_engine
from weft.program.batch import one_prompt

SECRET = "a secret between us"
HELLO = b"weft\x01"  # how a rank's first message to another one begins


@contextmanager
def overheard() -> Iterator[bytearray]:
    """All that passes over this machine's loopback meanwhile."""
    heard, over = bytearray(), threading.Event()
    try:
        listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    except (AttributeError, PermissionError):
        pytest.skip("listening to a device needs Linux, and root")
    listening.bind(("lo", 0))
    listening.settimeout(0.1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)

    def listen() -> None:
        while not over.is_set():
            try:
                heard.extend(listening.recv(1 << 17))
            except TimeoutError:
                continue

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join()
        listening.close()


@pytest.mark.parametrize("plain", [False, True])
def test_ranks_of_several_machines_are_not_overheard(packaged: Path, plain: bool) -> None:
    """The same with plain data shows that it would be heard."""
    port = free_port()
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{port}", SECRET), 1)
    joining = Command("worker", "--join", f"127.0.0.1:{port}", WEFT_TOKEN=launcher.hub.token)
    with overheard() as heard, joining:
        options = {"ranks": 2, "threads": 1, "overlap": "serial", "transport": "tcp", "plain_data": plain}
        with closing(open_engine(packaged, launcher=launcher, **options)) as engine:
            batch, tokens = one_prompt(64), list(range(64))
            plan = engine.planner.like("iso:2", "exact").plan(batch)
            sent = engine.probe(batch, tokens, plan, RunOptions()).bytes_sent[0]
    assert len(heard) > sent > 100_000
    assert (HELLO in heard) == plain
    assert SECRET.encode() not in heard and launcher.hub.token.encode() not in heard
    assert z85.decode(engine_of(launcher.hub.token)) not in heard, "the public key is said to nobody, as it lets one in"


def test_gloo_is_not_taken_for_encrypted(packaged: Path) -> None:
    launcher = JoinedLauncher(Hub(f"127.0.0.1:{free_port()}", SECRET), 1)
    with closing(launcher), pytest.raises(InputError, match="gloo can't encrypt what leaves this machine"):
        open_engine(packaged, ranks=2, launcher=launcher, transport="gloo")


@pytest.mark.parametrize(("secret", "said"), [("", "0 letters"), ("short", "5 letters"), ("x" * 15, "15 letters")])
def test_short_secrets_are_refused(secret: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        key_of(secret)


def test_a_token_is_no_secret_and_a_secret_no_token() -> None:
    token = new_key().token
    with pytest.raises(InputError, match="is a token for other machines"):
        key_of(token)
    for wrong in (SECRET, "", token[:-1], token + "A", "weft-" + "!" * 43, token.upper()):
        with pytest.raises(InputError, match=f"{TOKEN_VARIABLE} is not a token"):
            engine_of(wrong)


def test_the_engines_key_is_its_own() -> None:
    """It follows from the secret, every time; the token has its public half and nothing else."""
    key, again, other = key_of(SECRET), key_of(SECRET), key_of(SECRET + ".")
    assert key == again != other and new_key() != new_key()
    assert zmq.curve_public(key.secret) == key.public == engine_of(key.token)
    assert z85.decode(key.secret) not in engine_of(key.token) and SECRET not in key.token


def test_a_place_is_for_who_has_its_ticket() -> None:
    """A machine has those of its own ranks: it can't pass for another one's."""
    key, world = new_key(), 2

    def hello(place: int, ticket: str) -> Hello:
        return Hello(VERSION, place, ticket, "host", 1, "address", "machine", 1, 1)

    said = [
        (b"wrong", hello(0, key.ticket(1))), (b"none", hello(0, "")), (b"odd", hello(0, "ü")),
        (b"other", hello(1, new_key().ticket(1))),
        (b"beyond", hello(7, key.ticket(7))), (b"below", hello(-1, key.ticket(-1))), (b"one", hello(1, key.ticket(1))),
        (b"again", hello(1, key.ticket(1))), (b"zero", hello(0, key.ticket(0))),
    ]  # fmt: skip
    controller = Controller.__new__(Controller)
    controller._receive = lambda kind, deadline: said.pop(0)  # type: ignore[method-assign, assignment, return-value]
    came = controller._hellos(world, key, 0.0)
    assert {place: identity for place, (identity, _) in came.items()} == {0: b"zero", 1: b"one"}


@pytest.mark.parametrize("command", ["worker", "serve"])
def test_the_command_line_says_what_is_wrong_with_a_token(command: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    ways = {"worker": ["worker", "--join", address], "serve": ["serve", "--tp", "2", "--join-address", address]}
    with Command(*ways[command], WEFT_TOKEN="short", XDG_CACHE_HOME=os.environ.get("TMPDIR", "/tmp")) as started:
        assert started.child.wait(30) == 2
        assert {"worker": "is not a token", "serve": "5 letters"}[command] in started.said


@pytest.mark.skipif(sys.platform != "linux", reason="looks at a process's open files")
def test_keys_are_in_no_file(packaged: Path, tmp_path: Path) -> None:
    before = set(os.listdir("/tmp"))
    with closing(open_engine(packaged, ranks=2, threads=1, overlap="serial", transport="tls")):
        new = [Path("/tmp", name) for name in set(os.listdir("/tmp")) - before]
        files = [file for path in new for file in (path.rglob("*") if path.is_dir() else [path])]
        assert not [file for file in files if file.is_file() and b"PRIVATE KEY" in file.read_bytes()]
