"""The engine: batch -> plan -> submit -> collect -> commit.

Owns every request; the workers own nothing that can't be rebuilt, so a lost rank costs time and no request, and a
request can hurt nobody but itself: what goes wrong with one sequence ends its request; those of a batch that failed are
tried once more, each by itself, and the one that fails again is refused.
Knows all rooms by their fronts; knows nothing of HTTP or the command line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as ReadOnly
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from weft.admission import demand_memory, demand_room, end_ids, limit_of, memory_tokens
from weft.batching.batcher import Batcher, Copy, Scheduled
from weft.batching.params import SamplingParams, token_ids
from weft.batching.request import Request, Sequence
from weft.calibration import granule_of, key_of, measured
from weft.completion import Completion, completion_of
from weft.config import EngineConfig, ModelConfig
from weft.errors import GivenUp, InputError, Interrupted, WorkerFailed, WorkerLost, told
from weft.execute.controller import Controller, RunOptions, RunResult, Submitted
from weft.execute.protocol import Choice, Chosen, Hello
from weft.grammar import Grammar, Grammars
from weft.launch.launcher import Launcher
from weft.launch.local import LocalLauncher
from weft.model.families import flags_of
from weft.plan.budget import Budget
from weft.plan.kept import keep, recall
from weft.plan.planner import Plan, Planner, shares_by_speed
from weft.program.batch import Batch, Segment
from weft.program.steps import decoder_stages
from weft.program.strategy import AUTO
from weft.restarts import Restarts
from weft.simulate.cost import Costs
from weft.text import reading_tokenizer

Progress = Callable[[str, float], None]  # what goes on, and the share of it that is done
ALIKE = 0.95  # of the fastest rank's speed: less than that is worth other shares
MOST_FAILURES = 3  # batches by itself, one upon the other, that a request may lose to ranks that were killed or cut off
COMPANY = 3  # failed batches from which on a request stays by itself: it may fail with others only
SCORED_BYTES = 128 << 20  # of logits that a batch's scored rows may take
ALONE = 5  # times the wanted time between tokens a batch may take while nobody is waiting for a next token
LEAST_ALONE = 512  # tokens of such a batch: smaller ones hide their communication worse


_log = logging.getLogger("weft")


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
        """Seconds of the slowest worker's part: the program, then the choice of tokens."""
        return self.result.seconds + self.result.sampling


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
        tokenizer = reading_tokenizer(directory)
        self.planner = Planner(decoder_stages(self.model.layers), config.overlap, config.wire, granule_of(config))
        self.budget = Budget(self.planner)
        self.completions: dict[Sequence, Completion] = {}
        self.last_step: Step | None = None
        self.timeline_wanted = False  # of the next batch; it then is in `last_step`
        self.on_lost: Callable[[Exception], None] = lambda error: None  # is told when workers are lost, or don't start
        self.meanwhile: Callable[[], None] = lambda: None  # is called again and again while workers are started again
        self._ahead: Flight | None = None
        self._untold: list[Sequence] = []  # that were refused while workers are started again
        self._restarts = Restarts()
        self._up = False
        self._began: dict[Request, float] = {}
        self.controller = Controller(launcher or LocalLauncher(), config, self._waiting, self._admit)
        self.notices: list[str] = []
        try:
            self._start(tell, recalibrate, share_by_speed)
            self.tokenizer = tokenizer()
            self.end_ids, lines = end_ids(directory, self.model, self.tokenizer)
            self.notices += lines
        except WorkerLost as error:
            self.controller.close()
            raise WorkerFailed(f"a worker ended while the model was loaded: {told(error)}") from None
        except BaseException:
            self.controller.close()
            raise

    def _start(self, tell: Progress, recalibrate: bool, share_by_speed: bool) -> None:
        """Workers with the model and, where they are needed, its costs; a second time with other shares."""
        config = self.config
        self.started = self.controller.start(self.directory, self.model, lambda share: tell("loading", share))
        self._up = True
        memory = memory_tokens(self.started.hellos, self.started.loaded)
        self.batcher = Batcher(
            config.max_sequences, memory, config.prefixes, granule_of(config), self.model.stretches_beyond,
            SCORED_BYTES // (4 * self.model.vocabulary),
        )  # fmt: skip
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
        costs = measured(self.probe, self.model, self.config, wires, watch)
        self.controller.release(list(range(self.config.slots)))  # the memory of what was only tried
        self.planner.learn(costs)
        return costs

    @cached_property
    def grammars(self) -> Grammars:
        """Of this model's tokenizer; making it takes a moment."""
        if self.tokenizer is None:
            raise InputError("a JSON schema needs a tokenizer, and this model has no tokenizer.json")
        return Grammars(self.tokenizer, self.model.vocabulary, self.end_ids)

    def add(
        self, prompt: ReadOnly[int], params: SamplingParams, priority: int = 0, owner: str = "",
        deadline: float | None = None, grammar: Grammar | None = None,
    ) -> Request:  # fmt: skip
        """Queues a request; see `Request` for what it can be given. `grammar`: of its schema, if it is compiled
        already. Raises `InputError` if it can't ever run."""
        tokens = token_ids(prompt, "the prompt")
        limit = self.check(tokens, params)
        if params.json_schema and grammar is None:
            grammar = self.grammars.grammar(params.json_schema)
        request = Request(tokens, params, limit, priority, owner, time.monotonic(), deadline)
        completions = [self._completion(sequence, grammar) for sequence in request.sequences]
        # Nothing was changed until here, and nothing can fail from here on.
        self._began[request] = time.perf_counter()
        self.completions.update(zip(request.sequences, completions, strict=True))
        self.batcher.add(request)
        return request

    def _completion(self, sequence: Sequence, grammar: Grammar | None) -> Completion:
        matcher = grammar.matcher() if grammar is not None else None
        return completion_of(sequence, self.tokenizer, self.end_ids, matcher)

    def check(self, prompt: ReadOnly[int], params: SamplingParams) -> int:
        """How many tokens may follow; raises `InputError` for requests that can't be run, but for what is wrong with a
        schema. For any thread."""
        ends = frozenset() if params.ignore_eos else self.end_ids
        if params.stops and self.tokenizer is None:
            raise InputError("stop texts need a tokenizer, and this model has no tokenizer.json; use stop_token_ids")
        limit = limit_of(prompt, params, self.model.vocabulary, self.config.max_length, self.batcher.memory, ends)
        demand_room(len(prompt) + limit, self.batcher.memory, self.started.loaded)
        return limit

    def step(self) -> list[Sequence]:
        """One turn; returns the sequences that got a token or ended. There must be something to do."""
        begin = time.perf_counter()
        self._demand_group()
        if expired := self.expire():
            return expired
        scheduled: Scheduled | None = None
        flight: Flight | None = None
        try:
            scheduled = self._ahead.scheduled if self._ahead else self.batcher.next(self._budget(), time.monotonic())
            flight = self._ahead or self._submit(scheduled)
            self._ahead = self._look_ahead(scheduled)
            result = self.controller.collect(flight.submitted)
            self.planner.observe(flight.plan, scheduled.batch, result.compute, result.network)
            self.budget.observe(scheduled.batch, result.seconds, result.sampling)
        except Exception as error:  # whatever it is: nobody got a token yet, so the batch can be tried again
            if flight is None and isinstance(error, WorkerLost):  # no worker has seen the batch
                self.restart(error)
                return []
            return self._recover(scheduled, error)
        except BaseException:  # Ctrl-C: who knows what the workers have been told
            self._up = False
            raise
        self._restarts.worked()
        alive = self._commit(scheduled, result)
        self.last_step = Step(scheduled, flight.plan, time.perf_counter() - begin, result)
        return alive

    def look(self) -> None:
        """Between requests: sees whether all workers are there, and starts them again if not."""
        self._demand_group()
        try:
            self.controller.look()
        except (WorkerLost, WorkerFailed, InputError) as error:
            self.restart(error)

    def _demand_group(self) -> None:
        """Starts the workers if there are none that can be relied on: they were given up, or a batch interrupted."""
        if not self._up:
            self.restart(WorkerLost("what the workers do was interrupted"))

    def expire(self) -> list[Sequence]:
        """Ends sequences whose time is over, and returns them, with those that ended and were not told yet."""
        expired, untold = self.batcher.expired(time.monotonic()), self._untold
        for sequence in expired:
            sequence.finish_reason = "timeout"
            with suppress(Exception):  # whatever it is, what can be shown already stays
                self.completions[sequence].close()
        self.forget(expired)
        self._untold = []
        return untold + expired

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
        choices = [choice for part in scheduled.parts for choice in self._choices(*part, after)]
        self._move()
        options = RunOptions(timeline=self.timeline_wanted)
        self.timeline_wanted = False
        submitted = self.controller.submit(scheduled.batch, scheduled.tokens, choices, plan.program, plan.wire, options)
        return Flight(scheduled, plan, submitted)

    def _choices(self, sequence: Sequence, segment: Segment, _: bool, after: int) -> list[Choice]:
        """Of a segment's wanted rows; where that fails, any, and the request is refused with the batch."""
        try:
            return self.completions[sequence].choices(segment, after)
        except Exception as error:  # a grammar's, say
            sequence.request.error = _said(error)
            return [Choice()] * segment.wanted

    def _move(self) -> None:
        """Has the workers do with their memory what the batcher decided; new ones have none."""
        for move in self.batcher.moves():
            if not self._up:
                continue
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

    def _recover(self, scheduled: Scheduled | None, error: Exception) -> list[Sequence]:
        """After a batch that failed: its requests are tried again, each by itself, or refused if they were.

        Returns the sequences that ended. Raises `GivenUp` where starting the workers again doesn't help.
        """
        there = (*self.batcher.running, *self.batcher.waiting) if scheduled is None else scheduled.sequences
        suspects = [sequence for sequence in there if sequence.finish_reason is None]
        by_itself = len(suspects) == 1 and suspects[0].alone
        for request in {sequence.request for sequence in suspects}:
            request.failures += 1
        if not isinstance(error, WorkerLost | WorkerFailed | InputError):
            _log.error("a batch failed; its requests are tried again, each by itself", exc_info=error)
        # A rank that was killed or cut off need not have been so because of what it computed.
        most = MOST_FAILURES if isinstance(error, WorkerLost) else 1
        if by_itself and suspects[0].failures + 1 >= most:
            reason = f"this request failed, and again by itself: {_said(error)}"
            self._untold += self._refuse(suspects[0].request, reason)  # told also while the next start takes its time
        for sequence in suspects:
            sequence.alone, sequence.failures = True, sequence.failures + by_itself
        self.restart(error, blamed=True)
        untold, self._untold = self._untold, []
        return untold

    def _refuse(self, request: Request, reason: str) -> list[Sequence]:
        """Ends a request, and no other, because of what it did; returns its sequences that were not over yet."""
        request.error = reason
        ended = [sequence for sequence in request.sequences if sequence.finish_reason is None]
        for sequence in ended:
            sequence.finish_reason = "error"
        self.forget(ended)
        return ended

    @property
    def restarts(self) -> int:
        """How often workers were lost."""
        return self._restarts.total

    def restart(self, error: Exception, blamed: bool = False) -> None:
        """A new group of workers: one loss, however many tries that takes. `blamed`: what they computed may be why.

        Raises `GivenUp` if groups don't stay, and no other machine is there that could make the difference.
        """
        self._ahead, self._up = None, False
        self.batcher.rewind()
        self._restarts.lost(blamed)
        while not self._up:
            self.controller.stop()
            if self._restarts.hopeless and not self.controller.launcher.may_change:
                raise GivenUp(f"workers were lost {len(self._restarts)} times within a minute; the last: {error}")
            self.on_lost(error)
            try:
                self._pause(self._restarts.pause)
                self.started = self.controller.start(self.directory, self.model)
                self._up = True
            except Interrupted:
                raise
            except Exception as again:  # whatever it is, it may pass
                self._restarts.failed()
                error = again
        self._restarts.ready()

    def _admit(self, hellos: ReadOnly[Hello]) -> None:
        demand_memory(self.model, self.config, hellos)

    def _waiting(self) -> None:
        self.meanwhile()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._waiting()
            time.sleep(0.05)

    def _commit(self, scheduled: Scheduled, result: RunResult) -> list[Sequence]:
        """Gives every sequence that is still alive its token, and lets go of those that are complete.

        Returns those that got one or ended.
        """
        grown, complete, row = [], [], 0
        for sequence, segment, grows in scheduled.parts:
            answers, row = result.chosen[row : row + segment.wanted], row + segment.wanted
            if not sequence.alive:
                continue
            sequence.computed = segment.end
            try:
                if sequence.request.error:
                    raise InputError(sequence.request.error)
                self._take(sequence, segment, grows, answers)
            except Exception as error:  # whatever it is, it is this request's
                grown += self._refuse(sequence.request, _said(error))
                continue
            grown += [sequence] if grows or sequence.finish_reason else []
            complete += [sequence] if sequence.finish_reason else []
        self.forget([sequence for sequence in complete if sequence.slot is not None])
        return list(dict.fromkeys(grown))

    def _take(self, sequence: Sequence, segment: Segment, grows: bool, answers: list[Chosen]) -> None:
        """What a batch gave one sequence."""
        completion, request = self.completions[sequence], sequence.request
        if sequence.scored:
            completion.score(segment, answers)
        if grows:
            sequence.tokens.append(answers[-1].token)
            if completion.first_token is None:
                completion.first_token = time.perf_counter() - self._began[request]
            sequence.finish_reason = completion.take(answers[-1])
            sequence.alone, sequence.failures = sequence.alone and request.failures >= COMPANY, 0
        elif not request.limit and sequence.computed == len(request.prompt):
            sequence.finish_reason = "length"

    def forget(self, sequences: list[Sequence]) -> None:
        """Takes sequences out; what they have so far stays with the caller."""
        self.batcher.leave(sequences)
        if self._ahead is not None and not any(s.alive for s in self._ahead.scheduled.sequences):
            self._ahead = None  # nobody waits for it; its result is dropped when the next one is collected
        with suppress(WorkerLost, WorkerFailed):  # a lost rank has no memory to free, and the next run notices
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
        choices = [Choice() for _ in batch.wanted_rows]
        return self.controller.run(batch, tokens, choices, plan.program, plan.wire, options)

    def close(self) -> None:
        """Ends the workers."""
        self.controller.close()


def _said(error: Exception) -> str:
    """An error in one line."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, WorkerLost | WorkerFailed | InputError) else f"{type(error).__name__}: {line}"
