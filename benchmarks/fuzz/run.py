"""The fuzz: clients that ask at random, and whether every answer is what that request gets alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.fuzz import faults
from benchmarks.fuzz.cases import MALFORMED, Case, Cases
from benchmarks.fuzz.models import KINDS, Reference, save
from benchmarks.fuzz.others import Others
from weft.detokenizer import BYTES
from weft.launch.local import LocalLauncher
from weft.llm import LLM
from weft.server.app import Settings, application
from weft.server.run import in_background
from weft.server.service import Service

CLIENTS = 8
WEIGHTS = {"whole": 30, "stream": 30, "foreign": 10, "vectors": 5, "cancelled": 10, "malformed": 10, "fault": 10}
SECONDS = 60.0  # that an answer may take: with ranks lost on the way, and others before it
CLOSE = 1e-3  # of log-probabilities to transformers'


@dataclass
class Found:
    """What the fuzz came to. `wrong`: what must not be, a line each."""

    kind: str
    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answered: int = 0  # tokens of prompts whose request was answered,
    maybe: int = 0  # and of those that were cancelled, or ended by a fault
    restarts: int = 0
    reused: float = 0.0


def _strict(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Fuzz:
    """One model behind one server. `ranks_lost`: kinds of faults that end a group of workers, once each. `enough`: the
    fuzz ends once so much was wrong. `patience`: seconds that an answer may take."""

    def __init__(
        self, kind: str, folder: Path, seed: int, cases: int, ranks_lost: tuple[str, ...] = (), enough: int = 50,
        patience: float = SECONDS,
    ) -> None:  # fmt: skip
        self.enough, self.patience = enough, patience
        self.kind, self.found, self.draw = KINDS[kind], Found(kind), random.Random(seed)
        self.directory = save(self.kind, folder)
        self.seed, self.count, self.lethal = seed, cases, list(ranks_lost)
        self.known: list[Case] = []

    def run(self, seconds: float) -> Found:
        """Answers the cases alone, then asks for so long."""
        with faults.in_engine(), self._serving() as (service, url):
            asyncio.run(self._ask(service, url, seconds))
            if len(self.found.wrong) < self.enough:
                self._look(service)
        return self.found

    @contextmanager
    def _serving(self) -> Iterator[tuple[Service, str]]:
        launcher = LocalLauncher()
        launcher.command = faults.COMMAND
        llm = LLM(
            self.directory, tensor_parallel_size=self.kind.ranks, overlap="iso:2" if self.kind.ranks > 1 else "serial",
            num_threads=1, reproducible=True, max_num_seqs=4, max_num_batched_tokens=256, launcher=launcher,
        )  # fmt: skip
        made = Cases(llm.engine, Reference(self.directory), self.seed)
        for _ in range(self.count):
            self.known.append(case := made.make())
            try:
                made.answer(case)
            except Exception as error:  # whatever it is, there is an answer to a request that stands alone
                self._wrong("alone", f"{type(error).__name__}: {error}", case)
        self.others = Others(made.reference, self.draw, self._wrong)
        self.sayable = [case for case in self.known if self.others.sayable(case)]
        self.harmful = {name: made.harmful(name) for name in faults.KINDS}
        self.spelling = made
        llm.engine.batcher.forget_prefixes()
        llm.engine.batcher.memory = 2000  # tokens: so few that some wait again
        service = Service(lambda tell: llm.engine)
        service.metrics.named("fuzz")
        with in_background(application(service, Settings("fuzz")), service) as url:
            service.wait()
            yield service, url

    async def _ask(self, service: Service, url: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=self.patience, limits=limits, trust_env=False) as http:
            await asyncio.gather(*(self._client(http, end) for _ in range(CLIENTS)))
            if len(self.found.wrong) >= self.enough:
                return
            ready = await http.get("/ready")
            if not ready.is_success:
                self._wrong("at the end", f"not ready: {ready.text}")
            else:
                await self._whole(http, next(case for case in self.known if not case.refused))
                self._count((await http.get("/metrics")).text)

    async def _client(self, http: httpx2.AsyncClient, end: float) -> None:
        while time.monotonic() < end and len(self.found.wrong) < self.enough:
            kind = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            case = self.draw.choice(self.known)
            try:
                if case.source is not None and kind in ("whole", "stream"):
                    await self._whole(http, case.source)  # so that it may find that one's memory
                await getattr(self, f"_{kind}")(http, case)
            except Exception as error:  # whatever it is, the promise was broken
                self._wrong(kind, f"{type(error).__name__}: {error}")
            self.found.asked[kind] += 1

    async def _vectors(self, http: httpx2.AsyncClient, _: Case) -> None:
        sound = [case for case in self.known if not case.refused]
        tokens = await self.others.vectors(http, self.draw.sample(sound, self.draw.randrange(1, 7)))
        self.found.answered += tokens  # not before the await: others add meanwhile

    async def _foreign(self, http: httpx2.AsyncClient, _: Case) -> None:
        case = self.draw.choice(self.sayable)
        await self.others.foreign(http, case)
        self.found.answered += len(case.prompt)

    def _wrong(self, what: str, why: str, case: Case | None = None) -> None:
        body = f" {json.dumps(case.body)[:300]}" if case is not None else ""
        self.found.wrong.append(f"{self.kind.name}, {what}: {why[:400]}{body}")

    async def _whole(self, http: httpx2.AsyncClient, case: Case) -> None:
        answer = await http.post(case.path, json=case.body)
        content = _strict(answer.text)
        if case.refused:
            if answer.status_code != 400:
                self._wrong("whole", f"{answer.status_code} instead of a refusal", case)
        elif answer.status_code != 200:
            self._wrong("whole", f"{answer.status_code}: {answer.text}", case)
        else:
            self.found.answered += len(case.prompt)
            texts = [choice["message"]["content"] if case.chat else choice["text"] for choice in content["choices"]]
            self._compare("whole", case, content["choices"], texts)

    async def _stream(self, http: httpx2.AsyncClient, case: Case) -> None:
        choices: dict[int, dict[str, Any]] = {}
        texts: dict[int, str] = {}
        async with http.stream("POST", case.path, json=case.body | {"stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        if case.refused or answer.status_code != 200:
            if not (case.refused and answer.status_code == 400):
                self._wrong("stream", f"{answer.status_code}: {lines}", case)
            return
        if lines[-1] != "data: [DONE]":
            self._wrong("stream", f"ends with {lines[-1]}", case)
        for line in lines[:-1]:
            if line.startswith("data: "):
                event = _strict(line[6:])
                if "error" in event:
                    self._wrong("stream", str(event), case)
                    return
                for part in event["choices"]:
                    _join(choices, texts, part, case.chat)
        self.found.answered += len(case.prompt)
        self._compare("stream", case, [choices[at] for at in sorted(choices)], [texts[at] for at in sorted(texts)])

    def _compare(self, how: str, case: Case, choices: list[dict[str, Any]], texts: list[str]) -> None:
        """Whatever was asked for must be what it gets alone."""
        if len(choices) != len(case.choices):
            self._wrong(how, f"{len(choices)} choices", case)
            return
        for expected, choice, text in zip(case.choices, choices, texts, strict=True):
            echo = self._echo(case) if case.body.get("echo") else ""
            if text != echo + expected["text"]:
                self._wrong(how, f"{text!r} instead of {echo + expected['text']!r}", case)
            for name in ("finish_reason", "stop_reason"):
                if choice.get(name) != expected[name]:
                    self._wrong(how, f"{name} {choice.get(name)} instead of {expected[name]}", case)
            if case.params.logprobs is not None:
                self._compare_logprobs(how, case, choice["logprobs"], expected, echo, text)

    def _echo(self, case: Case) -> str:
        given = case.body["prompt"]
        return given if isinstance(given, str) else self.spelling.tokenizer.decode(list(case.prompt))

    def _compare_logprobs(
        self, how: str, case: Case, given: dict[str, Any], expected: dict[str, Any], echo: str, text: str
    ) -> None:
        scored = list(case.prompt) if case.body.get("echo") else []
        tokens = scored + expected["tokens"]
        if case.chat:
            entries = given["content"]
            values, raw = [entry["logprob"] for entry in entries], [bytes(entry["bytes"]) for entry in entries]
            tops = [[entry["logprob"] for entry in each["top_logprobs"]] for each in entries]
            if raw != [self._bytes(token) for token in tokens]:
                self._wrong(how, f"bytes {raw}", case)
        else:
            values = given["token_logprobs"]
            tops = [sorted((each or {}).values(), reverse=True) for each in given["top_logprobs"]]
            self._compare_offsets(how, case, given, text, len(scored))
            pairs = zip(tokens, given["tokens"], strict=False)
            if not all(name in (self._name(token), f"token_id:{token}") for token, name in pairs):
                self._wrong(how, f"tokens {given['tokens']}", case)
        if values[len(scored) :] != expected["logprobs"]:
            self._wrong(how, f"logprobs {values[len(scored) :]} instead of {expected['logprobs']}", case)
        alone = [sorted((value for _, value in top), reverse=True) for top in expected["top"]]
        if tops[len(scored) :] != alone:
            self._wrong(how, f"alternatives {tops[len(scored) :]} instead of {alone}", case)
        if scored and case.scores is not None:
            pairs = zip(values[1 : len(scored)], case.scores, strict=True)
            far = [at for at, (a, b) in enumerate(pairs) if not abs(a - b) <= CLOSE]
            if values[0] is not None or far:
                self._wrong(how, f"scores of the prompt's tokens {far} are not transformers'", case)

    def _compare_offsets(self, how: str, case: Case, given: dict[str, Any], text: str, scored: int) -> None:
        """They rise, and each token that is a text stands where it is said to."""
        offsets, tokens = given["text_offset"], given["tokens"]
        if offsets != sorted(offsets) or len(offsets) != len(tokens):
            self._wrong(how, f"offsets {offsets}", case)
            return
        if scored and isinstance(case.body["prompt"], str):
            offsets, tokens = offsets[scored:], tokens[scored:]  # a text need not be what its tokens decode to
        for offset, token in zip(offsets, tokens, strict=True):
            plain = token.isalnum() and token.isascii() and len(token) == 1 and self.kind.name != "byte-fallback"
            if plain and offset < len(text) and text[offset] != token:
                self._wrong(how, f"{token!r} is not at {offset} of {text!r}", case)

    def _bytes(self, token: int) -> bytes:
        """Of a token, worked out by decoding it between others."""
        backend = self.spelling.backend
        piece = backend.id_to_token(token)
        if self.kind.name == "byte-fallback" and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if self.kind.name == "byte-level" and token not in self.spelling.special:
            return bytes(BYTES[character] for character in piece)
        return str(piece.replace("▁", " ")).encode()

    def _name(self, token: int) -> str:
        raw = self._bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    async def _cancelled(self, http: httpx2.AsyncClient, case: Case) -> None:
        self.found.maybe += len(case.prompt)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.draw.uniform(0.001, 0.1)):
                async with http.stream("POST", case.path, json=case.body | {"stream": True}) as answer:
                    async for _ in answer.aiter_lines():
                        pass

    async def _malformed(self, http: httpx2.AsyncClient, _: Case) -> None:
        body = self.draw.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        if not 400 <= answer.status_code < 500 or not _strict(answer.text)["error"]["message"]:
            self._wrong("malformed", f"{content[:80]!r} got {answer.status_code}: {answer.text}")

    async def _fault(self, http: httpx2.AsyncClient, _: Case) -> None:
        """A request that fails, for a reason of its own, and says so."""
        usual = [kind for kind in faults.KINDS if kind not in faults.RANK]
        kind = self.lethal.pop() if self.lethal else self.draw.choice(usual)
        case = self.harmful[kind]
        self.found.maybe += len(case.prompt)
        answer = await http.post(case.path, json=case.body)
        message = _strict(answer.text).get("error", {}).get("message", "")
        grounds = "by itself: " if kind in faults.RANK else "planted"
        if answer.status_code != 500 or grounds not in message:
            self._wrong(f"fault: {kind}", f"{answer.status_code}: {answer.text}")
        self.found.asked[kind] += 1

    def _count(self, metrics: str) -> None:
        """Every prompt is counted once, whatever became of its memory."""
        [line] = [line for line in metrics.splitlines() if line.startswith("vllm:prompt_tokens_total")]
        counted = float(line.split()[-1])
        if not self.found.answered <= counted <= self.found.answered + self.found.maybe:
            self._wrong("metrics", f"{counted} tokens of prompts, of {self.found.answered} to {self.found.maybe} more")

    def _look(self, service: Service) -> None:
        """At the end nothing is left, and all is where it should be."""
        end = time.monotonic() + 10
        while (service.running or service.waiting) and time.monotonic() < end:
            time.sleep(0.01)  # cancelled ones go with the next batch
        try:
            service.check_integrity()
            assert service.running == service.waiting == 0, f"{service.running} run, {service.waiting} wait"
            engine, requests = service.engine, service.engine.requests
            assert not requests.completions and not requests._began, "something is kept of requests that are over"
        except Exception as error:
            self._wrong("at the end", f"{type(error).__name__}: {error}")
        else:
            lost = sum(self.found.asked[kind] for kind in faults.RANK)
            # Each is tried twice; where its rank was killed, which need not be its doing, three times more.
            most = 2 * lost + 2 * self.found.asked["rank is killed"]
            self.found.restarts = engine.workers.restarts.total
            if engine.workers.restarts.total > most:
                self._wrong("at the end", f"{engine.workers.restarts.total} restarts for {lost} faults of ranks")
            counts = engine.batcher.counts
            self.found.reused = counts.reused / max(1, counts.looked_up)


def _join(choices: dict[int, dict[str, Any]], texts: dict[int, str], part: dict[str, Any], chat: bool) -> None:
    """One more chunk of a streamed choice."""
    at = part["index"]
    whole = choices.setdefault(at, {"logprobs": None})
    texts[at] = texts.get(at, "") + (part["delta"].get("content", "") if chat else part["text"])
    for name in ("finish_reason", "stop_reason"):
        whole[name] = part.get(name) or whole.get(name)
    for name, values in (part["logprobs"] or {}).items():
        whole["logprobs"] = whole["logprobs"] or {}
        whole["logprobs"].setdefault(name, []).extend(values)
