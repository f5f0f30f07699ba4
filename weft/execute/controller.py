"""The engine's end of a group of workers: brings it up, runs batches on it, notices when a rank is lost.

Knows messages and processes; knows nothing of requests, text or plans. No torch.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError, NoRoom, WorkerFailed, WorkerLost
from weft.execute import protocol as p
from weft.execute.places import among, encrypted, introduced, numbered_machines, threads_of
from weft.execute.results import TOKENS_ALONE, RunOptions, RunResult, Started, Submitted, timeline_of
from weft.execute.sending import Sending
from weft.formats.fingerprint import Fingerprints, Held, Wanted, WeightFile, terms_of
from weft.launch.folder import Folder
from weft.launch.keys import EngineKey, new_key
from weft.launch.launcher import VERSION, Launcher
from weft.launch.sockets import bind, engine_socket
from weft.links import Link
from weft.program.batch import Batch
from weft.program.steps import Form, Program

START_SECONDS = 120.0  # to import torch and to say hello, on a loaded machine
LOOK_MILLISECONDS = 100  # how often the processes are looked at while a message is awaited
FORMS = 64  # of programs that a worker keeps
LOOK_SECONDS = 0.5  # and while messages come: machines that joined want to hear that the engine lives

M = TypeVar("M", bound=p.ToEngine)
Reading = Callable[[int, int], None]


class Controller:
    """One group of workers. Not for several threads. `meanwhile` is called again and again while they start; `admit`
    looks at those that have come, by rank, and raises `InputError` if they can't load the model."""

    def __init__(
        self, launcher: Launcher, config: EngineConfig, meanwhile: Callable[[], None] = lambda: None,
        admit: Callable[[Sequence[p.Hello]], None] = lambda hellos: None,
    ) -> None:  # fmt: skip
        self.launcher, self.config, self._meanwhile, self._admit = launcher, config, meanwhile, admit
        self._context: zmq.Context[Any] = zmq.Context()
        self._folder = Folder()
        self._socket: zmq.Socket[bytes] | None = None
        self._ranks: list[bytes] = []  # identities, by rank
        self._forms: OrderedDict[Form, int] = OrderedDict()  # those that the workers know
        self.link = config.link  # a multiple of the balance is none yet
        self.machines: list[int] = []  # of each rank a number, equal for ranks of one machine
        self._number = 0
        self._done: dict[int, dict[bytes, p.Done]] = {}  # what ranks said, by the number of the run
        self._due: dict[int, float] = {}  # when what was chosen may be had, of runs of which another rank says it
        self._looked = 0.0  # when the processes were looked at
        self._loaded = self._complete = False  # the model, now, and ever
        self._fingerprints = Fingerprints()

    def start(self, path: Path, model: ModelConfig, progress: Reading | None = None) -> Started:
        """Starts the workers and loads the model on them. `progress` is given bytes that are read, and all of them.

        Raises `InputError` for what the user can change, `WorkerFailed` for the rest; no worker is left then.
        """
        begin, self._loaded = time.monotonic(), False
        try:
            held = Held(str(path), self._files(path) if self.launcher.may_change else [])
            self.launcher.demand(terms_of(held))
            hellos = self._bring_up()
            loaded = self._load(held, model, progress or (lambda done, total: None))
            self._loaded = self._complete = True
        except BaseException:
            self.stop()
            raise
        return Started(tuple(hellos), tuple(loaded), time.monotonic() - begin)

    def _bring_up(self) -> list[p.Hello]:
        world, key = self.config.ranks, new_key()
        (self._folder.path / "link").unlink(missing_ok=True)  # what an earlier group has not sent yet
        self._socket = engine_socket(self._context, key)
        control = self.launcher.control_address(str(self._folder.path))
        self._socket.ipv6 = "[" in control
        bind(self._socket, control)
        address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)  # with the port, where it was left open
        self.launcher.meanwhile, tokens = self._meanwhile, [key.token_of(place) for place in range(world)]
        self.launcher.start(self.config.threads, address, tokens)
        deadline = time.monotonic() + START_SECONDS
        hellos = self._hellos(world, key, deadline)
        came = [hellos[place] for place in range(world)]
        self._ranks, by_rank = [identity for identity, _ in came], [hello for _, hello in came]
        self._admit_all(by_rank)
        self.machines = numbered_machines(by_rank, self.launcher.shares_memory)
        gloo, secured = self.config.transport == "gloo", encrypted(self.config, self.launcher)
        for rank, identity in enumerate(self._ranks):
            near, place = among(rank, by_rank, self.config, self.launcher)
            threads, shared = threads_of(self.config, by_rank[rank], near)
            how = threads, gloo, secured, shared, self._cores(rank), near, place
            self._send(identity, p.Assign(rank, world, *how))
        if world > 1:
            self._introduce(by_rank, deadline)
        for _ in range(world):
            self._receive(p.Joined, deadline)
        return by_rank

    def _files(self, path: Path) -> list[WeightFile]:
        """What other machines must have of the model. Where they are compared whole, that takes long."""

        def tick() -> None:
            self._meanwhile()
            self.launcher.attend()

        return self._fingerprints.of(path, self.config.check_content, tick)

    def _hellos(self, world: int, key: EngineKey, deadline: float) -> dict[int, tuple[bytes, p.Hello]]:
        """Of every rank, with its identity; each has the ticket of its place."""
        hellos: dict[int, tuple[bytes, p.Hello]] = {}
        try:
            while len(hellos) < world:
                identity, hello = self._receive(p.Hello, deadline)
                if 0 <= hello.place < world and key.admits(hello.place, hello.ticket):
                    hellos.setdefault(hello.place, (identity, hello))
        except WorkerFailed:
            for place in set(range(world)) - set(hellos):
                if (other := self.launcher.elsewhere(place)) is not None and time.monotonic() > deadline:
                    other.doubt("this machine's rank did not reach the server: is the way to its ports open?")
                    raise WorkerFailed(f"rank {place}, on {other}, said nothing for {START_SECONDS:.0f} s") from None
            raise
        return hellos

    def _admit_all(self, hellos: Sequence[p.Hello]) -> None:
        """Looks at those that have come. Raises `InputError`, or `WorkerLost` where another machine may do better."""
        for rank, hello in enumerate(hellos):
            if hello.version != VERSION:
                reason = f"it runs another version of weft; this engine speaks protocol {VERSION}"
                self._blame(rank, reason)
                raise InputError(f"rank {rank}: {reason}")
        try:
            self._admit(hellos)
        except NoRoom as error:
            self._blame(error.rank, str(error), not self._complete)
            raise

    def _introduce(self, hellos: Sequence[p.Hello], deadline: float) -> None:
        """Tells every rank where the others are."""
        said = dict(self._receive(p.Meeting, deadline) for _ in self._ranks)
        transport = self.config.transport
        near = self.launcher.shares_memory and not self.config.link.paced and transport in ("auto", "shm")
        meetings = [said[identity] for identity in self._ranks]
        meets = introduced(hellos, meetings, self.machines, near, transport == "shm")
        for identity, meet in zip(self._ranks, meets, strict=True):
            self._send(identity, meet)

    def _cores(self, rank: int) -> list[int] | None:
        if self.config.cores is None:
            return None
        threads = self.config.threads
        return list(self.config.cores[rank * threads : (rank + 1) * threads])

    def _load(self, held: Held, model: ModelConfig, progress: Reading) -> list[p.Loaded]:
        config = self.config
        for kept in (self._forms, self._done, self._due):
            kept.clear()
        load = p.Load(
            held.path, model, config.layout, config.dtype, config.weights, config.kv, config.device,
            config.reproducible, config.max_length, config.slots, held.files,
        )  # fmt: skip
        for identity in self._ranks:
            self._send(identity, load)
        read = dict.fromkeys(self._ranks, p.Loading(0, 0))
        ready: dict[bytes, p.Loaded] = {}
        sending: dict[bytes, Sending] = {}
        while len(ready) < len(self._ranks):
            identity, message = self._next()
            if identity not in read:
                continue
            if isinstance(message, p.Loaded):
                ready[identity] = message
                if identity in sending:
                    sending[identity].over()
            elif isinstance(message, p.Fetch):
                self._bring(identity, message.wanted, held, sending, read[identity].share)
            elif isinstance(message, p.Loading):
                read[identity] = message
                progress(sum(each.done for each in read.values()), sum(each.total for each in read.values()))
        if not self.link.free and self.link.times is None:
            self.set_link(self.link)
        return [ready[identity] for identity in self._ranks]

    def _bring(self, identity: bytes, wanted: Wanted, held: Held, sending: dict[bytes, Sending], share: float) -> None:
        """To a rank on a machine that has not got the model, what it asks for of it."""
        rank = self._ranks.index(identity)
        other = self.launcher.elsewhere(rank)
        assert other is not None, "ranks of this machine read the model themselves"
        if identity not in sending:
            sending[identity] = Sending(held, other, self.launcher.told)
        try:
            self._send(identity, p.Brought(sending[identity].cut_out(wanted, share)))
        except LookupError as error:
            self._blame(rank, str(error))

    def set_link(self, link: Link) -> None:
        """Has the ranks' messages take what they would over this link, from the next run on."""
        self.link = link
        if self.launcher.shape(link.rate):
            return
        shared = str(self._folder.path / "link") if link.shared else ""
        for identity in self._ranks if len(self._ranks) > 1 else ():
            self._send(identity, p.SetLink(link.rate, link.delay, shared))

    def run(
        self, batch: Batch, tokens: Sequence[int], choices: Sequence[p.Choice], program: Program, wire: str,
        options: RunOptions = TOKENS_ALONE,
    ) -> RunResult:  # fmt: skip
        """Runs a program on every rank. Raises `WorkerLost` if a rank ends meanwhile."""
        return self.collect(self.submit(batch, tokens, choices, program, wire, options))

    def submit(
        self, batch: Batch, tokens: Sequence[int], choices: Sequence[p.Choice], program: Program, wire: str,
        options: RunOptions = TOKENS_ALONE, follows: Sequence[int] = (),
    ) -> Submitted:  # fmt: skip
        """Has every rank run a program after what it was given before. `follows`: see `protocol.Run`."""
        self._number += 1
        message = self._message(batch, tokens, choices, program, wire, options, follows)
        for identity in self._ranks:
            self._send(identity, message)
        return Submitted(self._number, program, options)

    def collect(self, submitted: Submitted) -> RunResult:
        """Waits for what was submitted; results of earlier submissions that nobody collected are dropped."""
        while len(self._done.get(submitted.number, ())) < len(self._ranks):
            identity, answer = self._receive(p.Done)
            self._done.setdefault(answer.number, {})[identity] = answer  # one rank may be a batch ahead of another
            if answer.chosen and identity != self._ranks[0]:  # it is as on another machine, where a link seems longer
                self._due[answer.number] = time.monotonic() + self.link.delay
        time.sleep(max(0.0, self._due.pop(submitted.number, 0.0) - time.monotonic()))
        self._due = {number: due for number, due in self._due.items() if number > submitted.number}
        answers = [self._done[submitted.number][identity] for identity in self._ranks]
        self._done = {number: each for number, each in self._done.items() if number > submitted.number}
        chosen = next((each for each in answers if each.chosen or each.logits), answers[0])
        return RunResult(
            chosen.chosen, max(a.seconds for a in answers), max(a.sampling for a in answers),
            [a.processor for a in answers],
            max(a.lanes[0] for a in answers), min(a.lanes[1] for a in answers), [a.bytes_sent for a in answers],
            timeline_of(submitted.program, answers, self.launcher.one_clock) if submitted.options.timeline else None,
            [a.checksums for a in answers], chosen.logits, next((a.pooled for a in answers if a.pooled), []),
        )  # fmt: skip

    def _message(
        self, batch: Batch, tokens: Sequence[int], choices: Sequence[p.Choice], program: Program, wire: str,
        options: RunOptions, follows: Sequence[int],
    ) -> bytes:  # fmt: skip
        number, sent = self._numbered(program.form)
        segments = [(s.sequence, s.start, s.length, s.wanted, s.prompt, s.pooled) for s in batch.segments]
        return p.encode(
            p.Run(
                self._number, number, None if sent else program.form, list(program.offsets), segments, list(tokens),
                list(choices), wire, options.scope, options.timeline, options.checksums, options.logits,
                list(follows),
            )
        )  # fmt: skip

    def _numbered(self, form: Form) -> tuple[int, bool]:
        """A form's number, and whether the workers know it by that: the number of the one that was not used for longest
        goes to a new one."""
        sent = form in self._forms
        if not sent and len(self._forms) == FORMS:
            self._forms[form] = self._forms.popitem(last=False)[1]
        number = self._forms.setdefault(form, len(self._forms))
        self._forms.move_to_end(form)
        return number, sent

    def release(self, slots: Sequence[int]) -> None:
        """Tells every rank that these sequences are over."""
        for identity in self._ranks:
            self._send(identity, p.Release(list(slots)))

    def copy(self, source: int, target: int, length: int) -> None:
        """Tells every rank to copy the first `length` positions of one slot to another."""
        for identity in self._ranks:
            self._send(identity, p.Copy(source, target, length))

    def stop(self) -> None:
        """Ends the workers; the controller can be started again."""
        for identity in self._ranks:
            with suppress(WorkerLost, WorkerFailed):
                self._send(identity, p.Shutdown())
        deadline = time.monotonic() + (1.0 if self._ranks else 0.0)
        while self._ranks and time.monotonic() < deadline and len(self.launcher.dead()) < len(self._ranks):
            time.sleep(0.01)
        self.launcher.stop()
        if self._socket is not None:
            self._socket.close(0)
        self._socket, self._ranks = None, []

    def close(self) -> None:
        """Ends everything and removes what it left on disk."""
        self.stop()
        self.launcher.close()
        self._context.term()
        self._folder.remove()

    def _send(self, identity: bytes, message: p.ToWorker | bytes) -> None:
        assert self._socket is not None, "the group is not started"
        data = message if isinstance(message, bytes) else p.encode(message)
        try:
            self._socket.send_multipart([identity, data], zmq.NOBLOCK)  # who reads nothing is lost
        except zmq.ZMQError as error:
            self._demand_workers()
            rank = self._ranks.index(identity)
            raise WorkerLost(f"rank {rank} can't be reached ({error}){self._where(rank)}") from None

    def _receive(self, kind: type[M], deadline: float | None = None) -> tuple[bytes, M]:
        """The next message of this kind, with its sender; others are of no interest at that moment."""
        while True:
            identity, message = self._next(deadline)
            if isinstance(message, kind) and (not self._ranks or identity in self._ranks):
                return identity, message

    def _next(self, deadline: float | None = None) -> tuple[bytes, p.ToEngine]:
        """The next message. Raises if a rank failed or ended, or if it is too late (seconds, monotonic)."""
        assert self._socket is not None, "the group is not started"
        if time.monotonic() - self._looked > LOOK_SECONDS:  # also while messages come one upon the other
            self._look(deadline)
        while not self._socket.poll(LOOK_MILLISECONDS):
            self._look(deadline)
        identity, *frames = self._socket.recv_multipart()
        try:
            [data] = frames
            message = p.decode_to_engine(data)
        except (ValueError, msgspec.MsgspecError):
            raise WorkerLost("a rank said what can't be understood") from None
        if isinstance(message, p.Failed):
            self._failed(identity, message)
        if isinstance(message, p.Lost) and self._loaded:  # a rank that loads may be silent for a while
            if message.ended:
                self._await_death()
            raise WorkerLost(message.reason + self._where(message.peer))
        return identity, message

    def _where(self, rank: int) -> str:
        """On which machine it is, if that is another one."""
        other = self.launcher.elsewhere(rank)
        return f" (rank {rank} is on {other})" if other is not None else ""

    def look(self) -> None:
        """Raises `WorkerLost` if a worker has ended or hangs; for the times when nothing is awaited."""
        self._look(None)
        assert self._socket is not None, "the group is not started"
        while self._socket.poll(0):
            self._next()

    def _look(self, deadline: float | None) -> None:
        """Raises if a worker has ended, or if the time is over."""
        self._looked = time.monotonic()
        if not self._loaded:
            self._meanwhile()
            self.launcher.attend()
        self._demand_workers()
        if deadline is not None and time.monotonic() > deadline:
            way = ", or is the way to this one closed" if self.launcher.may_change else ""
            raise WorkerFailed(f"ranks were not ready within {START_SECONDS:.0f} s; is a machine overloaded{way}?")

    def _demand_workers(self) -> None:
        """Raises if a worker has ended, hangs or is silent."""
        if dead := self.launcher.dead():
            error = (WorkerFailed if self.launcher.crashed() else WorkerLost)("; ".join(dead))
            for line in self.launcher.last_words():
                error.add_note(line)
            raise error

    def _failed(self, identity: bytes, message: p.Failed) -> None:
        if message.kind in ("input", "memory"):
            if identity not in self._ranks:
                raise WorkerFailed(message.message)
            if not self._loaded:
                lacking = message.kind == "memory" and self._complete  # it was enough once, and may be again
                self._blame(self._ranks.index(identity), message.message, not lacking)
            raise InputError(message.message)
        self._await_death()
        raise (WorkerLost if message.kind == "link" else WorkerFailed)(message.message)

    def _blame(self, rank: int, reason: str, for_good: bool = True) -> None:
        """If it is the fault of another machine: doesn't use that any more, or only tells it, and raises
        `WorkerLost`, because another one may take its place."""
        if (other := self.launcher.elsewhere(rank)) is None:
            return
        other.refuse(reason) if for_good else other.say(reason)
        raise WorkerLost(f"rank {rank}, on {other}: {reason}")

    def _await_death(self) -> None:
        """A rank whose peer has died may say so before the death is seen, and what killed it. Raises then."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            self._demand_workers()
            time.sleep(0.01)
