"""`weft chat`: a conversation on the terminal, with a model here or with a running server.

Knows terminals and conversations; knows nothing of how answers are made.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import typer
from rich.console import Console

from weft.cli.options import (
    DTYPE,
    KV,
    LAYERS,
    MODEL,
    OVERLAP,
    PP,
    SHARES,
    STORED,
    THREADS,
    TP,
    TRANSPORT,
    WIRE,
    layers_or_auto,
    ranks_or_auto,
    shares_or_auto,
)
from weft.cli.terminal import loaded
from weft.errors import InputError
from weft.llm import LLM
from weft.speech.dialect import thinks_already
from weft.speech.listener import Part, Thought, listener
from weft.text import leave_torch_out

if TYPE_CHECKING:
    import httpx2

HELP = """Talk with MODEL on the terminal, or with a running server (--url).

MODEL is a directory in Hugging Face format, a .gguf file or a hub id (owner/repo:Q4_K_M), with a chat template;
without it, the small model in the package, which goes on with what you write. Answers stream; each is followed by its
time to first token and speed.

While you write: arrow keys for what you wrote before, Ctrl-C stops an answer, Ctrl-D ends. Commands: /reset forgets
the conversation, /system TEXT says who the model is to be, /help, /exit.

Examples:

  weft chat

  weft chat Qwen/Qwen3-0.6B --tp 2 --system "Answer in one sentence."

  weft chat --url http://localhost:8000
"""

COMMANDS = "/reset forgets the conversation · /system TEXT says who the model is to be · /help · /exit (or Ctrl-D)"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class AnswerEnd:
    """An answer's end: how many tokens it has, and why it ended."""

    tokens: int
    reason: str | None


class ThoughtPiece(NamedTuple):
    """What is thought before an answer, and is no part of it."""

    text: str


class Partner(Protocol):
    """Who answers. Pieces of text and of thoughts, `AnswerEnd` last; raises `InputError` for what users can change."""

    def answer(self, messages: Messages) -> Iterator[str | ThoughtPiece | AnswerEnd]:
        """To the last of the messages."""
        ...


class Local:
    """A model of this process."""

    def __init__(self, llm: LLM, wishes: dict[str, Any]) -> None:
        self.llm, self.params = llm, llm.get_default_sampling_params(**wishes)
        if llm.engine.tokenizer is None or not llm.engine.tokenizer.has_template:
            raise InputError(f"{llm.engine.path} has no chat template; use weft generate")

    def answer(self, messages: Messages) -> Iterator[str | ThoughtPiece | AnswerEnd]:
        """By the checkpoint's own template."""
        tokenizer = self.llm.engine.tokenizer
        assert tokenizer is not None
        rendered, dialect = tokenizer.rendered(messages), tokenizer.dialect()
        heard, params = None, self.params
        if dialect.thoughts is not None or dialect.channels is not None:  # whose marks may be special tokens
            heard = listener(dialect, (), thinks_already(dialect, rendered), tokenizer.special)
            params = replace(params, skip_special_tokens=False)
        for piece in self.llm.stream({"prompt_token_ids": tokenizer.conversation(rendered)}, params):
            if isinstance(piece, str):
                yield from _told(heard.grow(piece)) if heard is not None else [piece]
                continue
            if piece.error is not None:
                raise InputError(piece.error)
            yield from _told(heard.end()) if heard is not None else []
            yield AnswerEnd(len(piece.outputs[0].token_ids), piece.outputs[0].finish_reason)


def _told(parts: Sequence[Part]) -> Iterator[str | ThoughtPiece]:
    """What is said, and what is only thought."""
    for part in parts:
        yield ThoughtPiece(part.text) if isinstance(part, Thought) else part[0]


class Remote:
    """A server that speaks OpenAI's API."""

    def __init__(self, http: httpx2.Client, wishes: dict[str, Any]) -> None:
        self.http, self.wishes = http, wishes
        listed = self._checked(self._sent(lambda: http.get("models"))).json()["data"]
        if not listed:
            raise InputError(f"{http.base_url} serves no model")
        self.model = listed[0]["id"]

    def answer(self, messages: Messages) -> Iterator[str | ThoughtPiece | AnswerEnd]:
        """As the server streams it."""
        import httpx2

        asked = {
            "model": self.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True},
            **self.wishes,
        }  # fmt: skip
        tokens, reason = 0, None
        try:
            with self.http.stream("POST", "chat/completions", json=asked) as answer:
                if not answer.is_success:
                    answer.read()
                for event in _events(self._checked(answer).iter_lines()):
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in event["choices"]:
                        reason = choice.get("finish_reason") or reason
                        if thought := choice["delta"].get("reasoning_content"):
                            yield ThoughtPiece(thought)
                        if text := choice["delta"].get("content"):
                            yield text
        except httpx2.TransportError as error:
            raise InputError(f"the server's answer ended early ({error}); try again") from None
        yield AnswerEnd(tokens, reason)

    def _sent(self, send: Any) -> httpx2.Response:
        import httpx2

        try:
            response: httpx2.Response = send()
        except (httpx2.TransportError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise InputError(
                f"no server answers at {self.http.base_url} ({error}); start one with weft serve"
            ) from None
        return response

    def _checked(self, response: httpx2.Response) -> httpx2.Response:
        if not response.is_success:
            try:
                message = response.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{response.status_code} {response.reason_phrase}"
            raise InputError(f"the server says: {message}")
        return response


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events, parsed; an error among them is raised."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line[6:])
            if "error" in event:
                raise InputError(f"the server says: {event['error']['message']}")
            yield event


def chat(
    model: MODEL = None,
    url: Annotated[
        str | None, typer.Option(help="Of a running server; then MODEL and its options are not used.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For --url.", envvar="WEFT_API_KEY", show_envvar=True, show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="Who the model is to be.")] = None,
    tp: TP = "1",
    pp: PP = 1,
    layers: LAYERS = None,
    overlap: OVERLAP = "auto",
    wire: WIRE = "exact",
    transport: TRANSPORT = "auto",
    dtype: DTYPE = "float32",
    weights: STORED = "auto",
    kv: KV = "auto",
    shares: SHARES = None,
    threads: THREADS = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the checkpoint's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens with this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same draws again.")] = None,
) -> None:
    """See HELP."""
    leave_torch_out()
    console = Console(stderr=True)
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    wishes = {name: value for name, value in given.items() if value is not None}
    with ExitStack() as stack:
        partner: Partner
        if url is not None:
            if model is not None:
                raise InputError(f"MODEL {model!r} and --url can't both be given; the server has its own model")
            partner = Remote(stack.enter_context(_client(url, api_key)), wishes)
        else:
            llm = loaded(
                console, model, tensor_parallel_size=ranks_or_auto(tp), pipeline_parallel_size=pp,
                layers=layers_or_auto(layers), overlap=overlap, wire=wire, transport=transport,
                shares=shares_or_auto(shares),
                num_threads=threads, dtype=dtype, weights=weights, kv_cache_dtype=kv,
            )  # fmt: skip
            partner = Local(stack.enter_context(llm), wishes)
        Conversation(partner, console, system).run()


def _client(url: str, api_key: str | None) -> httpx2.Client:
    import httpx2

    base = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # No limit for what is read: the first token of a long prompt takes its time.
        return httpx2.Client(
            base_url=base if base.endswith("/v1") else f"{base}/v1", headers=headers,
            timeout=httpx2.Timeout(10.0, read=None), trust_env=False,
        )  # fmt: skip
    except httpx2.InvalidURL as error:
        raise InputError(f"--url {url!r} is not an address ({error}); write it like http://localhost:8000") from None


class Conversation:
    """Turns of user and model, until the user ends it."""

    def __init__(self, partner: Partner, console: Console, system: str | None) -> None:
        self.partner, self.console, self.system = partner, console, system
        self.messages: Messages = []

    def run(self) -> None:
        """Reads, answers, and so on."""
        asked = sys.stdin.isatty()
        if asked:
            with suppress(ImportError):
                import readline  # noqa: F401  (gives input() its arrow keys)
            self.console.print(COMMANDS, style="dim")
        while True:
            try:
                line = input("> " if asked else "")
            except (EOFError, KeyboardInterrupt):
                return
            if line.strip() == "/exit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif line.strip():
                self._turn(line)

    def _obey(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command == "/reset":
            self.messages.clear()
            self.console.print("the conversation is forgotten", style="dim")
        elif command == "/system":
            self.system = rest.strip() or None
            self.console.print(f"system: {self.system or 'none'}", style="dim", markup=False)
        elif command == "/help":
            self.console.print(COMMANDS, style="dim")
        else:
            self.console.print(f"{command} is not known. {COMMANDS}", style="yellow", markup=False)

    def _turn(self, line: str) -> None:
        """One question and its answer; a question that can't be answered is forgotten."""
        self.messages.append({"role": "user", "content": line})
        system = [{"role": "system", "content": self.system}] if self.system else []
        text, note, thinking = "", "", False
        begin = time.perf_counter()
        first: float | None = None
        try:
            for piece in self.partner.answer(system + self.messages):
                if isinstance(piece, AnswerEnd):
                    note = _timing(piece, begin, first)
                    continue
                first = first or time.perf_counter()
                if isinstance(piece, ThoughtPiece):
                    self.console.print(piece.text, end="", style="dim italic", markup=False, highlight=False)
                    thinking = True
                    continue
                print(("\n" if thinking and not text else "") + piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            note = "stopped"
        except InputError as error:
            self.messages.pop()
            self.console.print(f"{'' if not text else chr(10)}{error}", style="red", markup=False)
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": text})
        self.console.print(note, style="dim")


def _timing(ended: AnswerEnd, begin: float, first: float | None) -> str:
    if first is None:
        return "the answer is empty"
    rest = time.perf_counter() - first
    speed = f", {(ended.tokens - 1) / rest:.1f} tokens/s after it" if ended.tokens > 1 and rest > 0 else ""
    cut = "; cut at --max-tokens" if ended.reason == "length" else ""
    return f"first token after {(first - begin) * 1e3:.0f} ms, {ended.tokens} tokens{speed}{cut}"
