"""A group of workers with the model on it: started, given its parts by speed, measured, and there again after a loss.

Knows groups, machines' memory and costs; knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ReadOnly
from dataclasses import replace
from pathlib import Path

from weft.admission import demand_memory, kept_lines, memory_tokens, room_for_layers, settled, weights_needed
from weft.balance import balance
from weft.batching.scheduled import CopyPrefix, Move
from weft.calibration import key_of, measured, messages_measured
from weft.choosing import Decision, chosen
from weft.config import EngineConfig, ModelConfig
from weft.errors import GivenUp, InputError, Interrupted, WorkerFailed, WorkerLost, told
from weft.execute.controller import Controller
from weft.execute.protocol import Choice, Hello
from weft.execute.results import RunOptions, RunResult, Started
from weft.launch.launcher import Launcher
from weft.launch.local import LocalLauncher
from weft.layout import Layout
from weft.links import Link
from weft.plan.calibrate import TooSlow
from weft.plan.kept import keep, recall
from weft.plan.layouts import Aim
from weft.plan.planner import Plan, Planner
from weft.program.batch import Batch, one_prompt
from weft.program.strategy import AUTO
from weft.restarts import Restarts
from weft.simulate.cost import Costs
from weft.timeline.timeline import median
from weft.wires import allowed, chosen_by_cost, needed

Progress = Callable[[str, float], None]  # what goes on, and the share of it that is done
Probe = Callable[[Batch, list[int], Plan, RunOptions], RunResult]  # runs a batch of new prompts
BALANCE_TOKENS = 512  # of the prompt that the balance is of
ALIKE = 0.95  # of the fastest rank's speed: less than that is worth other shares


class Workers:
    """The group of one engine. `ready` raises what is a reason not to load the model. `on_lost` is told when it is
    lost, or doesn't start; `meanwhile` is called again and again while it starts."""

    def __init__(
        self, path: Path, config: EngineConfig, model: ModelConfig, launcher: Launcher | None,
        ready: Callable[[], object],
    ) -> None:  # fmt: skip
        self.path, self.config, self.model, self._ready = path, config, model, ready
        self.on_lost: Callable[[Exception], None] = lambda error: None
        self.meanwhile: Callable[[], None] = lambda: None
        self.restarts = Restarts()
        self.up = False  # and nothing is under way that nobody knows of
        self.controller = Controller(launcher or LocalLauncher(), config, self._waiting, self._admit)
        self.started: Started
        self.decision: Decision | None = None  # of layouts, where one was to be made

    def start(
        self, planner: Planner, tell: Progress, recalibrate: bool, by_speed: bool, aim: Aim | None = None
    ) -> list[str]:  # fmt: skip
        """The first time: brings the group up and, where they are needed, has the planner learn its costs; `by_speed`:
        and once more, with parts of the model that follow from them; `aim`: in the layout that is best for that. Lines
        for whoever should know.

        Other machines that are lost meanwhile are waited for, or others in their place. Raises `InputError` and
        `WorkerFailed`; nothing is left running then.
        """
        try:
            if self.controller.launcher.may_change:
                self._ready()  # no other machine is waited for in vain
            while True:
                try:
                    return self._started(planner, tell, recalibrate, by_speed, aim)
                except (WorkerLost, WorkerFailed) as error:
                    self._try_again(error)
        except BaseException:
            self.controller.close()
            raise

    def _started(
        self, planner: Planner, tell: Progress, recalibrate: bool, by_speed: bool, aim: Aim | None
    ) -> list[str]:  # fmt: skip
        self._bring_up(_read(tell))
        notices = [*kept_lines(self.started.loaded), *self._make_link(planner, tell)]
        chooses = self.config.overlap == AUTO or chosen_by_cost(self.config.wire)
        if not (self.config.ranks > 1 and (recalibrate or by_speed or chooses or aim is not None)):
            return notices
        notices += self._learn(planner, tell, recalibrate)
        if aim is not None:
            return notices + self._choose(planner, tell, recalibrate, aim)
        return notices + (self._share(planner, tell, recalibrate) if by_speed else [])

    def _try_again(self, error: WorkerLost | WorkerFailed) -> None:
        """After a start that failed: raises, if that will not pass."""
        self.up = False
        if isinstance(error, Interrupted) or not self.controller.launcher.may_change:
            if isinstance(error, WorkerLost):
                raise WorkerFailed(f"a rank ended while the model was loaded: {told(error)}") from None
            raise error
        self.controller.stop()
        self.restarts.failed()
        self.controller.launcher.told(f"the ranks are started again: {told(error)}")
        self._pause(self.restarts.pause)

    def _bring_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        self.started = self.controller.start(self.path, self.model, progress)
        self.up = True

    def _make_link(self, planner: Planner, tell: Progress) -> list[str]:
        """Makes the link as fast as a multiple of the balance comes to here. A line on a link that isn't what it is."""
        link = self.config.link
        if self.config.ranks == 1 or link.free:
            return self._unused()
        if link.times is not None:
            tell("looking for the balance", 0.0)
            batch = one_prompt(min(BALANCE_TOKENS, self.config.max_length))
            tokens = [13 * place % self.model.vocabulary for place in range(batch.tokens)]
            plan = planner.like("serial", "exact").plan(batch)
            self.controller.set_link(link.at(link.times * self.balance(link, batch, tokens, plan)))
            self.controller.release([0])
        found = f", {link.times:g} times the balance found here" if link.times is not None else ""
        return [f"link {self.controller.link}, emulated{found}"]

    def _unused(self) -> list[str]:
        """A line on what one rank makes no use of."""
        link, transport = self.config.link, self.config.transport
        told = ([] if link.free else [f"--link {link}"]) + ([] if transport == "auto" else [f"--transport {transport}"])
        if self.config.ranks > 1 or not told:
            return []
        return [f"{' and '.join(told)}: not used, as one rank sends nothing"]

    def balance(self, link: Link, batch: Batch, tokens: list[int], plan: Plan) -> float:
        """Bits a second at which the messages of serial's plan alone take as long as its computation alone, over a link
        of this kind. It is left at another speed. Memory must hold nothing."""

        def seconds(scope: str) -> float:
            return median(self.probe(batch, tokens, plan, RunOptions(scope)).seconds for _ in range(3))

        return balance(seconds, lambda rate: self.controller.set_link(replace(link.at(rate), delay=0.0)))

    def _learn(self, planner: Planner, tell: Progress, recalibrate: bool) -> list[str]:
        """Costs as they were kept, or measured now."""
        key = key_of(self.model, self.config, self.controller.launcher.link_name)
        by_chance = self.config.link.times is not None  # another speed each time
        kept, why = (None, None) if recalibrate or by_chance else recall(key)
        if kept is not None:
            planner.learn(kept.costs)
            return []
        begin = time.monotonic()
        try:
            costs = self.calibrate(self.probe, needed(self.config.wire), lambda share: tell("measuring costs", share))
        except TooSlow as error:
            planner.learn(None)
            chosen = chosen_by_cost(self.config.wire)
            travel = f", and all sums travel as {allowed(self.config.wire)[-1]}" if chosen else ""
            return [f"the ranks' link is too slow to measure what steps cost ({error}): auto is serial{travel}"]
        planner.learn(costs)
        return [] if by_chance else list(filter(None, [why, keep(key, costs, time.monotonic() - begin)]))

    def _share(self, planner: Planner, tell: Progress, recalibrate: bool) -> list[str]:
        """Starts again with parts of the model that take the ranks equally long, if that is worth it."""
        if planner.costs is None:
            option = "--layers" if self.config.layout.several else "--shares"
            raise InputError(f"{option} auto needs to know what steps cost, and the link is too slow to measure it")
        layout, line = self._by_speed(planner)
        return [line, *self._lay(layout, planner, tell, recalibrate)]

    def _choose(self, planner: Planner, tell: Progress, recalibrate: bool, aim: Aim) -> list[str]:
        """Starts again in the layout that is best, if it isn't this one; not if replicas are to take its place."""
        if planner.costs is None:
            return [f"layout {self.config.layout}: the link is too slow to measure what others would give"]
        tell("measuring sums", 1.0)
        sums = messages_measured(self.probe, self.model, self.config, self.controller.machines)
        if any(rank.fetched for rank in self.started.loaded):  # each would fetch the whole model: that is for who asks
            aim = replace(aim, replicas=False)
        self.decision = decision = chosen(planner, self.model, self.config, self.started.hellos, sums, aim)
        if decision.apart is not None:
            return [decision.line]
        return [decision.line, *self._lay(decision.layout, planner, tell, recalibrate)]

    def _lay(self, layout: Layout, planner: Planner, tell: Progress, recalibrate: bool) -> list[str]:
        """Another layout, loaded and measured."""
        if layout == self.config.layout:
            return []
        self.controller.stop()
        self.config = self.controller.config = replace(self.config, layout=layout)
        planner.lay(layout)
        self._bring_up(_read(tell))
        return self._learn(planner, tell, recalibrate)

    def _by_speed(self, planner: Planner) -> tuple[Layout, str]:
        """The layout that is worth it, or the one that there is, and a line on it."""
        layout = self.config.layout
        if layout.several:
            found = planner.layers_by_speed(room_for_layers(self.model, self.config, self.started.hellos))
            return replace(layout, layers=found.layers), found.describe()
        shares = planner.shares_by_speed(layout.shares[0])
        line = f"shares by speed: {','.join(f'{share:g}' for share in shares)}"
        return (layout if min(shares) >= ALIKE else replace(layout, shares=(shares,))), line

    def teach(self, planner: Planner, probe: Probe, wires: tuple[str, ...], watch: Callable[[float], None]) -> None:
        """Measures anew what the planner goes by. Over a link that is too slow for that nothing is known."""
        try:
            planner.learn(self.calibrate(probe, wires, watch))
        except TooSlow:
            planner.learn(None)

    def calibrate(self, probe: Probe, wires: tuple[str, ...], watch: Callable[[float], None]) -> Costs:
        """Measures what steps cost on these ranks, for these wires, in some 5 s. Raises `TooSlow`."""
        try:
            return measured(probe, self.model, self.config, wires, self.controller.machines, watch)
        finally:
            self.controller.release(list(range(self.config.slots)))  # the memory of what was only tried

    def move(self, moves: Iterable[Move]) -> None:
        """Does with their memory what the batcher decided; new ones have none."""
        for move in moves:
            if not self.up:
                continue
            if isinstance(move, CopyPrefix):
                self.controller.copy(*move)
            else:
                self.controller.release([move.slot])

    def probe(self, batch: Batch, tokens: list[int], plan: Plan, options: RunOptions) -> RunResult:
        """Runs a batch of new prompts by a plan of the caller's; memory must hold nothing."""
        choices = [Choice() for _ in batch.wanted_rows]
        return self.controller.run(batch, tokens, choices, plan.program, plan.wire, options)

    @property
    def memory(self) -> int:
        """Tokens whose keys and values fit on it."""
        config, (hellos, loaded) = self.config, (self.started.hellos, self.started.loaded)
        if config.replicas == 1:
            return memory_tokens(hellos, loaded)
        after = config.replicas - 1 - config.replica
        later = [after * weights for weights in weights_needed(self.model, config)]
        here = [rank for rank in range(config.ranks) if self.controller.launcher.elsewhere(rank) is None]
        return memory_tokens(hellos, loaded, config.replicas, later, here)

    def restart(self, error: Exception, blamed: bool = False) -> None:
        """A new group: one loss, however many tries that takes. `blamed`: what it computed may be why.

        Raises `GivenUp` if groups don't stay, and no other machine is there that could make the difference.
        """
        self.up = False
        self.restarts.lost(blamed)
        while not self.up:
            self.controller.stop()
            if self.restarts.hopeless and not self.controller.launcher.may_change:
                raise GivenUp(f"ranks were lost {len(self.restarts)} times within a minute; the last: {error}")
            self.on_lost(error)
            try:
                self._pause(self.restarts.pause)
                self._bring_up()
            except Interrupted:
                raise
            except Exception as again:  # whatever it is, it may pass
                self.restarts.failed()
                error = again
        self.restarts.ready()

    def close(self) -> None:
        """Ends them."""
        self.controller.close()

    def _admit(self, hellos: ReadOnly[Hello]) -> None:
        self._ready()
        self.config = self.controller.config = settled(self.path, self.model, self.config, hellos)
        demand_memory(self.model, self.config, hellos)

    def _waiting(self) -> None:
        self.meanwhile()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._waiting()
            self.controller.launcher.attend()
            time.sleep(0.05)


def _read(tell: Progress) -> Callable[[int, int], None]:
    """Tells of bytes that are read, how many there are, and how fast they come."""
    begun, first = 0.0, 0  # when the first ones were there, and how many

    def told(done: int, total: int) -> None:
        nonlocal begun, first
        if not begun:
            begun, first = time.monotonic(), done
        since = time.monotonic() - begun
        rate = f", {(done - first) / since / 1e6:,.0f} MB/s" if since > 0.05 else ""
        tell(f"reading {done / 1e6:,.0f} of {total / 1e6:,.0f} MB{rate}", done / max(1, total))

    return told
