"""The engine: batch -> plan -> submit -> collect -> commit.

Owns every request; the workers own nothing that can't be rebuilt, so a lost rank costs time and no request.
Knows all rooms by their fronts; knows nothing of HTTP or the command line.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random

import psutil

from weft.batching.batcher import Batcher, Copy, Scheduled
from weft.batching.params import SamplingParams
from weft.batching.request import Request, Sequence
from weft.calibration import granule_of, key_of, subject_of
from weft.config import EngineConfig, ModelConfig
from weft.errors import GivenUp, InputError, WorkerFailed, WorkerLost
from weft.execute.controller import Controller, RunOptions, RunResult, Started, Submitted
from weft.execute.protocol import Choice, Chosen
from weft.grammar import Grammars, Matcher
from weft.launch.launcher import Launcher
from weft.launch.local import LocalLauncher
from weft.model.families import flags_of
from weft.model.shares import shard_bytes, shares_of
from weft.plan.budget import Budget
from weft.plan.calibrate import MOST, calibrate
from weft.plan.kept import keep, recall
from weft.plan.planner import Plan, Planner, shares_by_speed
from weft.plan.readings import Sample
from weft.program.batch import Batch, Segment
from weft.program.steps import Program, decoder_stages
from weft.program.strategy import AUTO, Strategy
from weft.simulate.cost import Costs
from weft.text import Detokenizer, StopText, Tokenizer, generation_defaults

Progress = Callable[[str, float], None]  # what goes on, and the share of it that is done
ALIKE = 0.95  # of the fastest rank's speed: less than that is worth other shares
MOST_RESTARTS = 3  # within RESTART_SECONDS; then whatever ends the workers will not go away by itself
RESTART_SECONDS = 60.0
SEEDS = 1 << 62  # with a completion's number added, still one of 64 bits
MEMORY_PART = 0.9  # of what is free after loading may become key/value memory
ALONE = 5  # times the wanted time between tokens a batch may take while nobody is waiting for a next token
LEAST_ALONE = 512  # tokens of such a batch: smaller ones hide their communication worse


@dataclass
class Completion:
    """What the engine keeps of a sequence beside its tokens."""

    seed: int
    detokenizer: Detokenizer | None
    text: StopText
    chosen: list[Chosen] = field(default_factory=list)
    stop_reason: int | str | None = None
    first_token: float | None = None  # seconds after the request came
    matcher: Matcher | None = None  # if it must follow a grammar


@dataclass(frozen=True)
class Flight:
    """A batch under way."""

    scheduled: Scheduled
    plan: Plan
    submitted: Submitted


@dataclass
class Step:
    """One turn of the loop, for who looks on. `wall`: seconds of all of it."""

    scheduled: Scheduled
    plan: Plan
    wall: float
    result: RunResult

    @property
    def run(self) -> float:
        """Seconds of the slowest worker's part."""
        return self.result.seconds


class Engine:
    """Runs requests on a group of workers. `progress` is told what goes on, and how much of it is done, 0 to 1.

    With several ranks and `auto`, what steps cost is measured first, unless it was on an earlier start; `recalibrate`
    measures in any case. `share_by_speed`: what each rank takes of the model follows from how fast it was with the
    configuration's shares. `notices`: what a user should be told, one line each.

    Raises `InputError` where the model, the options and this machine don't go together; nothing is left running.
    """

    def __init__(
        self, directory: Path, config: EngineConfig, model: ModelConfig | None = None,
        launcher: Launcher | None = None, progress: Progress | None = None, recalibrate: bool = False,
        share_by_speed: bool = False,
    ) -> None:  # fmt: skip
        self.directory, self.config = directory, config
        tell = progress or (lambda what, share: None)
        self.model = model or ModelConfig.from_directory(directory)
        flags_of(self.model)  # says so now if the family is unknown
        _demand_memory(self.model, config)
        self.tokenizer = Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
        self.end_ids = self._end_ids()
        self.planner = Planner(decoder_stages(self.model.layers), config.overlap, config.wire, granule_of(config))
        self.budget = Budget(self.planner)
        self.completions: dict[Sequence, Completion] = {}
        self.notices: list[str] = []
        self.last_step: Step | None = None
        self.timeline_wanted = False  # of the next batch; it then is in `last_step`
        self.restarts = 0
        self.on_lost: Callable[[str], None] = lambda reason: None  # is told when workers are lost
        self._ahead: Flight | None = None
        self._restarts: list[float] = []
        self._began: dict[Request, float] = {}
        self.controller = Controller(launcher or LocalLauncher(), config)
        try:
            self._start(tell, recalibrate, share_by_speed)
        except WorkerLost as error:
            self.controller.close()
            raise WorkerFailed(f"a worker ended while the model was loaded: {error}") from None
        except BaseException:
            self.controller.close()
            raise

    def _start(self, tell: Progress, recalibrate: bool, share_by_speed: bool) -> None:
        """Workers with the model and, where they are needed, its costs; a second time with other shares."""
        config = self.config
        self.started = self.controller.start(self.directory, self.model, lambda share: tell("loading", share))
        memory = self._memory_tokens(self.started)
        self.batcher = Batcher(config.max_sequences, memory, config.prefixes, granule_of(config))
        if config.ranks > 1 and (recalibrate or share_by_speed or config.overlap == AUTO):
            self._learn(tell, recalibrate)
        if not share_by_speed or self.planner.costs is None:
            return
        shares = shares_by_speed(self.planner.costs, config.shares)
        self.notices.append(f"shares by speed: {','.join(f'{share:g}' for share in shares)}")
        if min(shares) < ALIKE:
            self.controller.stop()
            self.config = self.controller.config = replace(config, shares=shares)
            self._start(tell, recalibrate, share_by_speed=False)

    def _learn(self, tell: Progress, recalibrate: bool) -> None:
        """Costs as they were kept, or measured now."""
        key = key_of(self.model, self.config, self.controller.launcher.link_name)
        found, why = (None, None) if recalibrate else recall(key)
        if found is not None:
            self.planner.learn(found.costs)
            return
        begin = time.monotonic()
        costs = self.calibrate((self.config.wire,), lambda share: tell("measuring costs", share))
        self.notices += filter(None, [why, keep(key, costs, time.monotonic() - begin)])

    def calibrate(self, wires: tuple[str, ...], watch: Callable[[float], None] = lambda share: None) -> Costs:
        """Measures what steps cost on these ranks, between requests, in at most 5 s; plans follow from it then on."""
        random = Random(0)
        tokens = [random.randrange(self.model.vocabulary) for _ in range(MOST)]

        def probe(batch: Batch, program: Program, wire: str, part: str) -> Sample:
            plan = Plan(Strategy(), program, wire)
            result = self.probe(batch, tokens[: batch.tokens], plan, RunOptions(part, timeline=True))
            assert result.timeline is not None
            return Sample(result.seconds, result.processor, result.timeline)

        costs = calibrate(probe, subject_of(self.model, self.config, wires), watch)
        self.controller.release(list(range(self.config.slots)))  # the memory of what was only tried
        self.planner.learn(costs)
        return costs

    def _end_ids(self) -> frozenset[int]:
        """Tokens that end a completion: generation_config.json's, else config.json's, and the tokenizer's."""
        given = generation_defaults(self.directory).get("eos_token_id", self.model.fields.get("eos_token_id"))
        listed = given if isinstance(given, list) else [given]
        own = self.tokenizer.end_ids if self.tokenizer else set()
        return frozenset({token for token in listed if isinstance(token, int)} | own)

    def _memory_tokens(self, started: Started) -> int:
        """Tokens whose keys and values fit into what is free now, over all ranks of this machine."""
        a_token = max(1, sum(loaded.kv_bytes_per_token for loaded in started.loaded))
        return int(MEMORY_PART * psutil.virtual_memory().available / a_token)

    @cached_property
    def grammars(self) -> Grammars:
        """Of this model's tokenizer; making it takes a moment."""
        if self.tokenizer is None:
            raise InputError("a JSON schema needs a tokenizer, and this model has no tokenizer.json")
        return Grammars(self.tokenizer, self.model.vocabulary, self.end_ids)

    def add(
        self, prompt: list[int], params: SamplingParams, priority: int = 0, owner: str = "",
        deadline: float | None = None,
    ) -> Request:  # fmt: skip
        """Queues a request; see `Request` for what it can be given. Raises `InputError` if it can't ever run."""
        limit = self.check(prompt, params)
        request = Request(tuple(prompt), params, limit, priority, owner, time.monotonic(), deadline)
        schema = params.json_schema
        matchers = [self.grammars.matcher(schema) if schema else None for _ in request.sequences]
        self._began[request] = time.perf_counter()
        seed = params.seed % SEEDS if params.seed is not None else secrets.randbits(62)
        for sequence, matcher in zip(request.sequences, matchers, strict=True):
            stream = self.tokenizer.stream(request.prompt, params.skip_special_tokens) if self.tokenizer else None
            text = StopText(params.stops, params.include_stop_str_in_output)
            self.completions[sequence] = Completion(seed + sequence.index, stream, text, matcher=matcher)
        self.batcher.add(request)
        return request

    def check(self, prompt: list[int], params: SamplingParams) -> int:
        """How many tokens may follow; raises `InputError` for requests that can't be run. For any thread."""
        limit = self._limit(prompt, params)
        if (room := len(prompt) + limit) > self.batcher.memory:
            a_token = sum(loaded.kv_bytes_per_token for loaded in self.started.loaded)
            needed, there = (tokens * a_token / 2**30 for tokens in (room, self.batcher.memory))
            raise InputError(
                f"{room} tokens need {needed:.2f} GiB of key/value memory and {there:.2f} GiB are free; "
                "shorten the prompt or max_tokens"
            )
        if params.json_schema:
            self.grammars.matcher(params.json_schema)
        return limit

    def _limit(self, prompt: list[int], params: SamplingParams) -> int:
        length, known = self.config.max_length, range(self.model.vocabulary)
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if outside := [t for t in (*prompt, *(params.stop_token_ids or ())) if t not in known]:
            raise InputError(f"token id {outside[0]!r} is not in the vocabulary, 0 to {self.model.vocabulary - 1}")
        if len(prompt) >= length:
            raise InputError(
                f"the prompt has {len(prompt)} tokens and the context holds {length}, the answer included; shorten it"
            )
        if params.stops and self.tokenizer is None:
            raise InputError("stop texts need a tokenizer, and this model has no tokenizer.json; use stop_token_ids")
        return min(params.max_tokens or max(1, self.batcher.memory - len(prompt)), length - len(prompt))

    def step(self) -> list[Sequence]:
        """One turn; returns the sequences that got a token or ended. There must be something to do."""
        begin = time.perf_counter()
        if expired := self._expire():
            return expired
        try:
            flight = self._ahead or self._submit(self.batcher.next(self._budget(), time.monotonic()))
            self._ahead = self._look_ahead(flight.scheduled)
            result = self.controller.collect(flight.submitted)
        except WorkerLost as error:
            self.restart(str(error))
            return []
        alive = self._commit(flight.scheduled, result)
        self.planner.observe(flight.plan, flight.scheduled.batch, result.compute, result.network)
        self.budget.observe(flight.scheduled.batch, result.seconds)
        self.last_step = Step(flight.scheduled, flight.plan, time.perf_counter() - begin, result)
        return alive

    def look(self) -> None:
        """Between requests: sees whether all workers are there, and starts them again if not."""
        try:
            self.controller.look()
        except (WorkerLost, WorkerFailed) as error:
            self.restart(str(error))

    def _expire(self) -> list[Sequence]:
        """Ends sequences whose time is over."""
        expired = self.batcher.expired(time.monotonic())
        for sequence in expired:
            sequence.finish_reason = "timeout"
        self.forget(expired)
        return expired

    def _budget(self) -> int:
        """Tokens of the next batch: as many as go well with those who wait for their next token."""
        most, wanted = self.config.max_batch_tokens, self.config.token_interval
        if wanted is None:
            return most
        decoding = [Segment(0, s.computed, 1) for s in self.batcher.running if s.left == 1]
        if decoding:
            return self.budget.rows(wanted, decoding, most)
        return max(min(LEAST_ALONE, most), self.budget.rows(ALONE * wanted, (), most))

    @property
    def idle(self) -> bool:
        """True if no request is left."""
        return self.batcher.idle

    def _submit(self, scheduled: Scheduled, after: int = 0) -> Flight:
        """Sends a batch off. `after`: tokens that its sequences will have got by then, beyond those they have."""
        plan = self.planner.plan(scheduled.batch)
        choices = [self._choice(sequence, after) for sequence in scheduled.sampled]
        self._move()
        options = RunOptions(timeline=self.timeline_wanted)
        self.timeline_wanted = False
        submitted = self.controller.submit(scheduled.batch, scheduled.tokens, choices, plan.program, plan.wire, options)
        return Flight(scheduled, plan, submitted)

    def _move(self) -> None:
        """Has the workers do with their memory what the batcher decided."""
        for move in self.batcher.moves():
            if isinstance(move, Copy):
                self.controller.copy(*move)
            else:
                self.controller.release([move.slot])

    def _look_ahead(self, scheduled: Scheduled) -> Flight | None:
        """Sends the next batch off too, where it can be foreseen: the worker then never waits for the engine.

        With several ranks only one of them knows the tokens that were chosen, so there it waits.
        """
        following = self.batcher.ahead(scheduled) if self.config.ranks == 1 else None
        return self._submit(following, after=1) if following is not None else None

    def restart(self, reason: str) -> None:
        """A new group of workers. Raises `GivenUp` if that has been needed too often lately."""
        self._ahead = None
        self.batcher.rewind()
        while True:
            self.restarts += 1
            self.on_lost(reason)
            now = time.monotonic()
            self._restarts = [then for then in self._restarts if now - then < RESTART_SECONDS] + [now]
            self.controller.stop()
            if len(self._restarts) > MOST_RESTARTS:
                raise GivenUp(f"workers were lost {len(self._restarts)} times within a minute; the last: {reason}")
            try:
                self.started = self.controller.start(self.directory, self.model)
                return
            except WorkerLost as error:
                reason = str(error)

    def _choice(self, sequence: Sequence, after: int = 0) -> Choice:
        params, index = sequence.request.params, sequence.produced + after
        banned = sorted(self._ends(sequence)) if index < params.min_tokens else []
        matcher = self.completions[sequence].matcher
        if params.greedy and not (params.penalised or banned or matcher or params.logprobs is not None):
            return Choice()
        return Choice(
            temperature=0.0 if params.greedy else params.temperature, top_p=params.top_p,
            top_k=max(0, params.top_k), min_p=params.min_p, presence=params.presence_penalty,
            frequency=params.frequency_penalty, repetition=params.repetition_penalty,
            seed=self.completions[sequence].seed, index=index, banned=banned,
            prompt=list(sequence.request.prompt) if params.penalised else [],
            output=list(sequence.output) if params.penalised else [], logprobs=params.logprobs,
            allowed=matcher.allowed() if matcher else b"",
        )  # fmt: skip

    def _ends(self, sequence: Sequence) -> frozenset[int]:
        """Tokens that end this completion."""
        params = sequence.request.params
        own = frozenset(params.stop_token_ids or ())
        return own if params.ignore_eos else own | self.end_ids

    def _commit(self, scheduled: Scheduled, result: RunResult) -> list[Sequence]:
        """Gives every sequence that is still alive its token, and lets go of those that are complete."""
        for sequence, segment in zip(scheduled.sequences, scheduled.batch.segments, strict=True):
            if sequence.alive:
                sequence.computed = segment.end
        pairs = [(s, chosen) for s, chosen in zip(scheduled.sampled, result.chosen, strict=True) if s.alive]
        for sequence, chosen in pairs:
            sequence.tokens.append(chosen.token)
            self._grow(sequence, chosen)
        self.forget([sequence for sequence, _ in pairs if sequence.finish_reason])
        return [sequence for sequence, _ in pairs]

    def _grow(self, sequence: Sequence, chosen: Chosen) -> None:
        """Text, stop conditions and first-token time of one new token."""
        completion = self.completions[sequence]
        completion.chosen.append(chosen)
        if completion.first_token is None:
            completion.first_token = time.perf_counter() - self._began[sequence.request]
        if chosen.token in self._ends(sequence):
            sequence.finish_reason = "stop"
            completion.stop_reason = None if chosen.token in self.end_ids else chosen.token
            return
        if completion.matcher is not None:
            completion.matcher.advance(chosen.token)
        if completion.detokenizer is not None:
            completion.text.grow(completion.detokenizer.step(chosen.token))
        if completion.matcher is not None and completion.matcher.finished:
            sequence.finish_reason = "stop"
        elif completion.text.stopped is not None and sequence.produced >= sequence.request.params.min_tokens:
            sequence.finish_reason, completion.stop_reason = "stop", completion.text.stopped
        elif sequence.produced >= sequence.request.limit:
            sequence.finish_reason = "length"

    def forget(self, sequences: list[Sequence]) -> None:
        """Takes sequences out; what they have so far stays with the caller."""
        self.batcher.leave(sequences)
        if self._ahead is not None and not any(s.alive for s in self._ahead.scheduled.sequences):
            self._ahead = None  # nobody waits for it; its result is dropped when the next one is collected
        with suppress(WorkerLost):  # a lost rank has no memory to free, and the next run notices
            self._move()

    def settle(self, request: Request) -> list[Completion]:
        """The request's completions, which the engine then forgets."""
        self._began.pop(request, None)
        return [self.completions.pop(sequence) for sequence in request.sequences]

    def probe(self, batch: Batch, tokens: list[int], plan: Plan, options: RunOptions) -> RunResult:
        """Runs a batch of new prompts by a plan of the caller's, for measuring; between requests only."""
        assert self.idle, "a probe would overwrite a running sequence's memory"
        self.batcher.forget_prefixes()
        self._move()
        choices = [Choice() for _ in batch.sampled_rows]
        return self.controller.run(batch, tokens, choices, plan.program, plan.wire, options)

    def close(self) -> None:
        """Ends the workers."""
        self.controller.close()


def _demand_memory(model: ModelConfig, config: EngineConfig) -> None:
    """Raises `InputError` before anything is started if the weights of all ranks of this machine can't fit."""
    size = {"float32": 4, "bfloat16": 2}[config.dtype]
    needed = sum(shard_bytes(model, share, size) for share in shares_of(model, config.shares))
    free = psutil.virtual_memory().available
    if config.device == "cpu" and needed > free:
        raise InputError(
            f"the weights need {needed / 2**30:.1f} GiB in {config.dtype} over {config.ranks} ranks, and "
            f"{free / 2**30:.1f} GiB are free; use a smaller model, dtype bfloat16 or a machine with more memory"
        )
