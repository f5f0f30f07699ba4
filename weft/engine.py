"""The engine: batch -> plan -> submit -> collect -> commit.

Owns every request; the workers own nothing that can't be rebuilt, so a lost rank costs time and no request, and a
request can hurt nobody but itself: what goes wrong with one sequence ends its request; those of a batch that failed are
tried once more, each by itself, and the one that fails again is refused.
Knows all rooms by their fronts; knows nothing of HTTP or the command line.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ReadOnly
from contextlib import suppress
from pathlib import Path

from weft.batching.batcher import Batcher
from weft.batching.params import SamplingParams
from weft.batching.request import Request, Sequence
from weft.batching.scheduled import Scheduled
from weft.calibration import granule_of
from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError, WorkerFailed, WorkerLost, in_a_line
from weft.execute.results import RunOptions, RunResult
from weft.grammar import Grammar
from weft.launch.launcher import Launcher
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.plan.budget import Budget
from weft.plan.layouts import Aim
from weft.plan.planner import Plan, Planner
from weft.program.batch import Batch, Segment
from weft.requests import Requests, blame
from weft.text import Tokenizer, reading_tokenizer
from weft.turn import Flight, Turn
from weft.workers import Progress, Workers

SCORED_BYTES = 128 << 20  # of logits that a batch's scored rows may take

_log = logging.getLogger("weft")


class Engine:
    """Runs requests on a group of workers. `progress` is told what goes on, and how much of it is done, 0 to 1.

    With several ranks and `auto`, what steps cost is measured first, unless it was on an earlier start; `recalibrate`
    measures in any case. `share_by_speed`: what each rank takes of the model follows from how fast it was with the
    configuration's shares; `aim`: its layout, from what is best for that. `notices`: lines that a user should be told.

    Raises `InputError` where the model, the options and this machine don't go together; nothing is left running.
    """

    def __init__(
        self, path: Path, config: EngineConfig, model: ModelConfig | None = None,
        launcher: Launcher | None = None, progress: Progress | None = None, recalibrate: bool = False,
        share_by_speed: bool = False, aim: Aim | None = None,
    ) -> None:  # fmt: skip
        self.path, self.model = path, model or model_config(path)
        granule, outline = granule_of(config), blueprint_of(self.model).outline
        self.planner = Planner(outline, config.overlap, config.wire, granule, layout=config.layout)
        tokenizer = reading_tokenizer(path)
        self.budget, tell = Budget(self.planner), progress or (lambda what, share: None)
        self.workers = Workers(path, config, self.model, launcher, ready=tokenizer)
        self.notices = self.workers.start(self.planner, tell, recalibrate, share_by_speed, aim)
        self.config, started = self.workers.config, self.workers.started
        scored = SCORED_BYTES // (4 * self.model.vocabulary)
        self.batcher = Batcher(
            config.max_sequences, self.workers.memory, config.prefixes, granule, self.model.stretches_beyond, scored,
            self.model.turns_anew, len(self.config.layout.sections),
        )  # fmt: skip
        try:
            self.requests = Requests(
                path, self.model, tokenizer(), config.max_length, lambda: self.batcher.memory, started.loaded
            )
        except BaseException:
            self.close()
            raise
        self.notices += self.requests.notices
        self.last_turn: Turn | None = None
        self.flights: deque[Flight] = deque()  # batches under way, in the order in which ranks run them
        self._made: Scheduled | None = None  # the next one, until it is under way
        self._untold: list[Sequence] = []  # that were refused while workers are started again

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, if it has one."""
        return self.requests.tokenizer

    def calibrate(self, wires: tuple[str, ...], watch: Callable[[float], None] = lambda share: None) -> None:
        """Measures what steps cost on these ranks, between requests, in some 5 s; plans follow from it then on."""
        self.workers.teach(self.planner, self.probe, wires, watch)

    def add(
        self, prompt: ReadOnly[int], params: SamplingParams, priority: int = 0, owner: str = "",
        deadline: float | None = None, grammar: Grammar | None = None, salt: str = "",
    ) -> Request:  # fmt: skip
        """Queues a request; see `Requests.open`."""
        request = self.requests.open(prompt, params, priority, owner, deadline, grammar, salt)
        self.batcher.add(request)
        return request

    def step(self, timeline: bool = False, meanwhile: Callable[[], None] = lambda: None) -> list[Sequence]:
        """One turn; returns the sequences that got a token or ended. There must be something to do. `timeline`: the
        next batch that is sent off brings one, in `last_turn`; `meanwhile`: what to do while workers compute."""
        begin = time.perf_counter()
        self._demand_group()
        if expired := self.expire():
            return expired
        try:
            self._send_off(timeline)
            flight = self.flights[0]
            meanwhile()
            result = self.workers.controller.collect(flight.submitted)
            self.planner.observe(flight.plan, flight.scheduled.batch, result.compute, result.network)
            self.budget.observe(flight.scheduled.batch, result.seconds, result.sampling)
        except Exception as error:  # whatever it is: nobody got a token yet, so the batches can be tried again
            if not self.flights and isinstance(error, WorkerLost):  # no worker has seen one
                self.restart(error)
                return []
            return self._recover(error)
        except BaseException:  # Ctrl-C: who knows what the workers have been told
            self.workers.up = False
            raise
        self.flights.popleft()
        self.workers.restarts.worked()
        alive = self._commit(flight.scheduled, result)
        self.last_turn = Turn(flight.scheduled, flight.plan, time.perf_counter() - begin, result)
        return alive

    def look(self) -> None:
        """Between requests: sees whether all workers are there, and starts them again if not."""
        self._demand_group()
        try:
            self.workers.controller.look()
        except (WorkerLost, WorkerFailed, InputError) as error:
            self.restart(error)

    def _demand_group(self) -> None:
        """Starts the workers if there are none that can be relied on: they were given up, or a batch interrupted."""
        if not self.workers.up:
            self.restart(WorkerLost("what the workers do was interrupted"))

    def expire(self) -> list[Sequence]:
        """Ends sequences whose time is over, and returns them, with those that ended and were not told yet."""
        expired, untold, self._untold = self.batcher.expired(time.monotonic()), self._untold, []
        for sequence in expired:
            self.requests.time_out(sequence)
        self.forget(expired)
        return untold + expired

    def _budget(self) -> int:
        """Tokens of the next batch; where only answers go on, nobody need wait for fewer."""
        decoding = [Segment(0, sequence.sent, 1) for sequence in self.batcher.running if sequence.unsent == 1]
        prompts = self.batcher.waiting or any(sequence.unsent > 1 for sequence in self.batcher.running)
        interval = self.config.token_interval if prompts else None
        return self.budget.tokens(interval, decoding, self.config.max_batch_tokens)

    def _send_off(self, timeline: bool) -> None:
        """Has a batch under way for each section, one more where it can be foreseen: workers needn't wait."""
        if not self.flights:
            self._fly(self.batcher.next(self._budget(), time.monotonic()), timeline)
        while more := self.batcher.further([f.scheduled for f in self.flights], self._budget, time.monotonic()):
            self._fly(more, timeline)

    def _fly(self, scheduled: Scheduled, timeline: bool) -> None:
        self._made = scheduled
        plan = self.planner.plan(scheduled.batch)
        after = 1 if scheduled.follows else 0  # tokens that its sequences will have got by then, beyond those they have
        choices = [choice for part in scheduled.parts for choice in self.requests.choices(*part[:2], after)]
        self.workers.move(self.batcher.moves())
        given = scheduled.batch, scheduled.tokens, choices, plan.program, plan.wire, RunOptions(timeline=timeline)
        self.flights.append(Flight(scheduled, plan, self.workers.controller.submit(*given, scheduled.follows)))
        self._made = None

    def _recover(self, error: Exception) -> list[Sequence]:
        """After a batch that failed: requests of those under way are tried again, each by itself, or refused if they
        were.

        Returns the sequences that ended. Raises `GivenUp` where starting the workers again doesn't help.
        """
        made = [*(flight.scheduled for flight in self.flights), *filter(None, [self._made])]
        there = [s for each in made for s in each.sequences] or [*self.batcher.running, *self.batcher.waiting]
        suspects = list(dict.fromkeys(sequence for sequence in there if sequence.finish_reason is None))
        if not isinstance(error, WorkerLost | WorkerFailed | InputError):
            _log.error("a batch failed; its requests are tried again, each by itself", exc_info=error)
        if blame(suspects, error):
            reason = f"this request failed, and again by itself: {in_a_line(error)}"
            self._untold += self._refuse(suspects[0].request, reason)  # told also while the next start takes its time
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

    def restart(self, error: Exception, blamed: bool = False) -> None:
        """A new group of workers, for which everything is computed again; see `Workers.restart`."""
        self.flights.clear()
        self._made = None
        self.batcher.rewind()
        self.workers.restart(error, blamed)

    def _commit(self, scheduled: Scheduled, result: RunResult) -> list[Sequence]:
        """Gives every sequence that is still alive its token, and lets go of those that are complete.

        Returns those that got one or ended.
        """
        grown, complete, row, pooled = [], [], 0, iter(result.pooled)
        for sequence, segment, grows in scheduled.parts:
            answers, row = result.chosen[row : row + segment.predicting], row + segment.predicting
            total = next(pooled) if segment.pooled and segment.wanted else None
            if not sequence.alive:
                continue
            sequence.land(segment.end)
            try:
                self.requests.take(sequence, segment, grows, answers, total)
            except Exception as error:  # whatever it is, it is this request's
                grown += self._refuse(sequence.request, in_a_line(error))
                continue
            grown += [sequence] if grows or sequence.finish_reason else []
            complete += [sequence] if sequence.finish_reason else []
        self.forget([sequence for sequence in complete if sequence.slot is not None])
        return list(dict.fromkeys(grown))

    def forget(self, sequences: list[Sequence]) -> None:
        """Takes sequences out; what they have so far stays with the caller."""
        self.batcher.leave(sequences)
        while self.flights and not any(s.alive for s in self.flights[-1].scheduled.sequences):
            self.flights.pop()  # nobody waits for it; its result is dropped when a later one is collected
        with suppress(WorkerLost, WorkerFailed):  # a lost rank has no memory to free, and the next run notices
            self.workers.move(self.batcher.moves())

    def probe(self, batch: Batch, tokens: list[int], plan: Plan, options: RunOptions) -> RunResult:
        """Runs a batch of new prompts by a plan of the caller's, for measuring; between requests only."""
        assert self.batcher.idle, "a probe would overwrite a running sequence's memory"
        self.batcher.forget_prefixes()
        self.workers.move(self.batcher.moves())
        return self.workers.probe(batch, tokens, plan, options)

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()
