"""By how much requests that cost much hold up who asks for little: the page, /health, and a stream under way.

    python benchmarks/holdups.py [--rounds 3] [--seconds 12] [--only NAME ...] [--json FILE]

A server with the model in the package, one rank, one thread. One process asks for /health every 5 ms and for the page
every 8 ms, at fixed times, and reads a stream; another one sends what costs much, two at a time, as fast as it is
answered. Idle and every load in turns. Said is how much longer the slowest of a thousand takes than with the idle
server of the same round (99.9th percentile), the median of the rounds and the worst one; wanted are at most 50 ms.

A stream is looked at only beside what asks nothing of the model: what computes takes its turn in the batches, and how
long that may hold up others is --token-interval's matter, not the loop's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from servers import Served, serving

from weft.hub import PACKAGED

MOST = (4 << 20) - 4096  # bytes of a body: the server's limit, less what stands around
WANTED = 50.0  # ms
SETTLE = 1.0  # seconds after a load until the next one
STREAM = {"prompt": "def main(", "max_tokens": 1900, "ignore_eos": True, "stream": True}


@dataclass(frozen=True)
class Load:
    """Requests that cost much. `computes`: they ask the model for something too. `bodies`: in turns; none is GET.
    `hostile`: of a model whose chat template does what a message tells it."""

    path: str
    bodies: Callable[[], list[bytes]]
    computes: bool = False
    hostile: bool = False


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _chat(content: str, **more: Any) -> bytes:
    return _json({"messages": [{"role": "user", "content": content}], "max_tokens": 1, **more})


def _schema(number: int, fields: int) -> dict[str, Any]:
    """Another one for every number: none is known already."""
    values = [f"v{number}_{value}" for value in range(8)]
    return {"type": "object", "properties": {f"f{number}_{field}": {"enum": values} for field in range(fields)}}


def _patterns(number: int) -> dict[str, Any]:
    """Slow to follow for its 14 kB."""
    patterns = {f"^p{part}.*q(a|b)*c{{{part}}}$": {"type": "string"} for part in range(330)}
    return {"type": "object", "patternProperties": patterns, "properties": {f"z{number}": {}}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


def _tools(number: int, count: int, schema: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """So many, with names as long and as alike as they may be."""
    functions = [{"name": f"{number}_{at}".rjust(64, "x"), "parameters": schema(at)} for at in range(count)]
    return {"tools": [{"type": "function", "function": function} for function in functions]}


def _nested(depth: int) -> dict[str, Any]:
    """An object in an object, and so on."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _slow(number: int) -> Callable[[int], dict[str, Any]]:
    """Patterns that are short to say."""
    return lambda at: _object(a={"type": "string", "pattern": f"(.*{at}[a-z]{{1,{300 + number}}}){{400}}"})


def _endless(number: int) -> Callable[[int], dict[str, Any]]:
    """What has parts like itself."""
    return lambda at: _object(**{f"{name}{number}_{at}": {"$ref": "#"} for name in "abcdefgh"})


TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% elif m.content == 'grow' %}{% set ns = namespace(x='grown ' * 1000) %}"
    "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}{% elif m.content == 'text' %}"
    "{{ 'word ' * 4000000 }}{% endif %}{{ m.content }}{% endfor %}"
)
SENTENCE = "The for statement is used to iterate over the elements of a sequence. "
LOADS: dict[str, Load] = {
    "4 MiB of text": Load("/v1/completions", lambda: [_json({"prompt": SENTENCE * (MOST // len(SENTENCE))})]),
    "4 MiB of token ids": Load("/v1/completions", lambda: [_json({"prompt": [7] * (MOST // 2)})]),
    "4 MiB of wrong ids": Load("/v1/completions", lambda: [_json({"prompt": [-1] * (MOST // 3)})]),
    "4 MiB of empty objects": Load("/v1/completions", lambda: [_json({"prompt": [{}] * (MOST // 3)})]),
    "4 MiB of unknown fields": Load(
        "/v1/completions", lambda: [_json({"prompt": "a"} | {f"x{number}": 1 for number in range(MOST // 12)})]
    ),
    "4 MiB as one message": Load("/v1/chat/completions", lambda: [_chat(SENTENCE * (MOST // len(SENTENCE)))]),
    "4096 messages": Load(
        "/v1/chat/completions",
        lambda: [_json({"messages": [{"role": "user", "content": SENTENCE * 13}] * 4096, "max_tokens": 1})],
    ),
    "4 MiB to be detokenised": Load("/detokenize", lambda: [_json({"tokens": [71] * (MOST // 3)})]),
    "4 MiB to be tokenised": Load("/tokenize", lambda: [_json({"prompt": SENTENCE * (MOST // len(SENTENCE))})]),
    "schemas of 60 kB": Load(
        "/v1/chat/completions", lambda: [_chat("a", **_form(_schema(number, 480))) for number in range(200)], True
    ),
    "schemas that take seconds": Load(
        "/v1/completions",
        lambda: [_json({"prompt": ["a"] * 8, "max_tokens": 1, **_form(_patterns(number))}) for number in range(200)],
        True,
    ),
    "patterns of 400 parts": Load(
        "/v1/chat/completions",
        lambda: [
            _chat("a", **_form({"type": "string", "pattern": f"(.*{number}[a-z]{{1,400}}){{400}}"}))
            for number in range(200)
        ],
        True,
    ),
    "64 prompts scored, 2^18 entries": Load(
        "/v1/completions",
        lambda: [_json({"prompt": [[7 + number % 9] * 195 for number in range(64)], "echo": True, "logprobs": 20,
                        "max_tokens": 1})], True,
    ),
    "64 completions": Load(
        "/v1/completions", lambda: [_json({"prompt": "def f(", "n": 64, "max_tokens": 20, "logprobs": 20})], True
    ),
    "128 tools, each another": Load(
        "/v1/chat/completions",
        lambda: [_chat("a", **_tools(number, 128, lambda at: _schema(at, 4))) for number in range(200)], True,
    ),
    "tools whose patterns take seconds": Load(
        "/v1/chat/completions",
        lambda: [_chat("a", tool_choice="required", **_tools(number, 4, _slow(number))) for number in range(100)], True,
    ),
    "tools that hold themselves": Load(
        "/v1/chat/completions",
        lambda: [_chat("a", tool_choice="required", **_tools(number, 4, _endless(number))) for number in range(100)],
        True,
    ),
    "tools nested 9 times": Load(
        "/v1/chat/completions", lambda: [_chat("a", **_tools(number, 2, lambda at: _object(a=_nested(9))))
                                         for number in range(50)], True,
    ),
    "250 calls in a conversation": Load(
        "/v1/responses",
        lambda: [_json({"max_output_tokens": 1, "input": [
            {"type": "function_call", "call_id": f"c{at}", "name": "f", "arguments": json.dumps({"a": SENTENCE * 9})}
            for at in range(250)
        ]})], True,
    ),
    "2,048 embeddings as numbers": Load(
        "/v1/embeddings", lambda: [_json({"input": [f"text {number}" for number in range(2048)]})], True
    ),
    "templates that loop": Load("/v1/chat/completions", lambda: [_chat("loop")], True, True),
    "templates that grow": Load("/v1/chat/completions", lambda: [_chat("grow")], True, True),
    "templates that write 20 MB": Load("/v1/chat/completions", lambda: [_chat("text")], True, True),
    "drawings": Load("/live", list),
    "figures": Load("/metrics", list),
}  # fmt: skip


def _asked(port: int, path: str, bodies: list[bytes], until: float, turn: int, told: list[int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while time.monotonic() < until:
        if bodies:
            body = bodies[turn % len(bodies)]
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        else:
            connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        told.append(answer.status)
        turn += 2


def loading(port: int, name: str, seconds: float, turn: int, results: Connection) -> None:
    """Two clients' worth of a load; tells how many answers of each status came."""
    load = LOADS[name]
    bodies = load.bodies()
    results.send("ready")
    told: list[int] = []
    until = time.monotonic() + seconds
    clients = [
        threading.Thread(target=_asked, args=(port, load.path, bodies, until, turn + number, told)) for number in (0, 1)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    results.send({str(status): told.count(status) for status in sorted(set(told))})


def _polled(port: int, path: str, every: float, until: float, late: list[float]) -> None:
    """Milliseconds from when each answer was due to be asked for until it was there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    due = time.monotonic()
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read()
        late.append((time.monotonic() - due) * 1e3)
        due += every


def _streamed(port: int, until: float, gaps: list[float]) -> None:
    """Milliseconds between the events of one stream after the other."""
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", _json(STREAM), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        last: float | None = None
        while (line := answer.readline()) and time.monotonic() < until:
            if line.startswith(b"data: {"):
                now = time.monotonic()
                gaps += [(now - last) * 1e3] if last is not None else []
                last = now
        connection.close()


def looking(port: int, seconds: float, stream: bool, results: Connection) -> None:
    """What others see meanwhile; tells the times of each."""
    found: dict[str, list[float]] = {"health": [], "page": [], "stream": []}
    until = time.monotonic() + seconds
    lookers = [
        threading.Thread(target=_polled, args=(port, "/health", 0.005, until, found["health"])),
        threading.Thread(target=_polled, args=(port, "/", 0.008, until, found["page"])),
    ]
    if stream:
        lookers.append(threading.Thread(target=_streamed, args=(port, until, found["stream"])))
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    results.send(found)


def percentile(values: list[float], part: float = 0.999) -> float:
    """The value that this part of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def measure(port: int, name: str | None, seconds: float, turn: int, stream: bool) -> dict[str, Any]:
    """One load, or none, and what others see beside it."""
    spawn = multiprocessing.get_context("spawn")
    answers: dict[str, int] = {}
    ours, theirs = spawn.Pipe()
    load = spawn.Process(target=loading, args=(port, name, seconds, turn, theirs)) if name is not None else None
    if load is not None:
        load.start()
        assert ours.recv() == "ready"
    mine, others = spawn.Pipe()
    look = spawn.Process(target=looking, args=(port, seconds, stream, others))
    look.start()
    found = mine.recv()
    look.join()
    if load is not None:
        answers = ours.recv()
        load.join()
    time.sleep(SETTLE)
    times = {f"{what} ms": round(percentile(values), 2) for what, values in found.items() if values}
    worst = {f"{what} worst ms": round(max(values), 2) for what, values in found.items() if values}
    counts = {what: len(values) for what, values in found.items() if values}
    return {"times": times, "worst": worst, "counts": counts, "answers": answers}


def _model(folder: Path, hostile: bool) -> list[str]:
    """What to serve."""
    if not hostile:
        return []
    shutil.copytree(PACKAGED, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return [str(folder)]


def _measured(server: Served, names: list[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Idle and every load in turns."""
    found: list[dict[str, Any]] = []
    port = int(server.url.rpartition(":")[2])
    measure(port, None, 3.0, 0, True)  # warm
    for number in range(rounds):
        for name in names:
            stream = not LOADS[name].computes
            idle = measure(port, None, seconds, 0, stream)
            busy = measure(port, name, seconds, 2 * number * 50, stream)
            found.append({"round": number, "load": name, "idle": idle, "busy": busy})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load; a thousand answers take 5")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the loads' names")
    parser.add_argument("--json", type=Path, help="where every round goes")
    asked = parser.parse_args()
    names = [name for name in LOADS if not asked.only or any(part in name for part in asked.only)]
    rounds: list[dict[str, Any]] = []
    for hostile in (False, True):
        some = [name for name in names if LOADS[name].hostile is hostile]
        if not some:
            continue
        with TemporaryDirectory() as folder, serving(*_model(Path(folder), hostile)) as server:
            rounds += _measured(server, some, asked.rounds, asked.seconds)
    kinds = ("health", "page", "stream")
    print(f"{'milliseconds more than idle, p99.9':34s} {'health':>14s} {'page':>14s} {'stream':>14s}   answers")
    most = 0.0
    for name in names:
        cells, mine = [], [each for each in rounds if each["load"] == name]
        for kind in kinds:
            more = [each["busy"]["times"][f"{kind} ms"] - each["idle"]["times"][f"{kind} ms"] for each in mine
                    if f"{kind} ms" in each["busy"]["times"]]  # fmt: skip
            cells.append(f"{median(more):6.1f} ({max(more):5.1f})" if more else f"{'-':>14s}")
            most = max(most, median(more)) if more else most
        print(f"{name:34s} {' '.join(cells)}   {mine[-1]['busy']['answers']}")
    print(f"most: {most:.1f} ms (at most {WANTED:g} wanted)")
    if asked.json:
        asked.json.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
