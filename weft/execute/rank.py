"""One rank, in a worker process: answers the engine's messages.

Owns a shard of the weights, key/value memory and an executor, and nothing that can't be rebuilt. Knows the
engine's messages; knows nothing of requests.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import Tensor

from weft.cache.slabs import Slabs
from weft.config import DTYPES, available_cores
from weft.errors import InputError, LinkLost
from weft.execute import protocol as p
from weft.execute.draws import Slice
from weft.execute.executor import Executor, Scope
from weft.execute.lanes import ThreadLanes
from weft.execute.process import (
    Peak,
    free_memory,
    give_back_freed_memory,
    keep_freed_memory,
    machine_name,
    own_cores,
    pin,
    settle,
)
from weft.execute.sampler import sample
from weft.formats.checkpoint import Checkpoint
from weft.formats.content import content_of
from weft.formats.fetched import FetchedFiles
from weft.formats.fingerprint import Held, Wanted, held_here
from weft.formats.gguf.files import is_gguf
from weft.formats.schemes import scheme_of
from weft.launch.launcher import MODEL_VARIABLE, PLACE_VARIABLE, VERSION
from weft.model.decoder import Decoder
from weft.model.families import blueprint_of
from weft.model.kept_weights import KeptWeights
from weft.model.kernels.choice import Kernels
from weft.model.opening import open_model
from weft.model.rope import ropes_for
from weft.model.shares import shares_of
from weft.model.weights import load
from weft.parallel import gloo
from weft.parallel.allreduce import gather_columns, swap
from weft.parallel.codec import codec_named
from weft.parallel.direct import Direct
from weft.parallel.group import Group
from weft.parallel.listening import Place
from weft.parallel.mesh import Mesh
from weft.parallel.pace import Pace
from weft.parallel.tls import Identity
from weft.parallel.transport import Transport
from weft.program.batch import Batch, Segment
from weft.program.stages import COMPUTE, NETWORK
from weft.program.steps import Form, Program


@dataclass
class _Model:
    """A model that this rank can run."""

    decoder: Decoder
    slabs: Slabs
    executor: Executor
    forms: dict[int, Form]
    vocabulary: list[int]  # tokens of the slice of each rank that has one
    told: Group | None  # these ranks, which choose tokens together, if this one is among them


class Worker:
    """Answers the engine's messages, one at a time."""

    def __init__(
        self, control: zmq.Socket[bytes], address: str, port: int, folder: str | None, alarm: zmq.Socket[bytes],
        ticket: str,
    ) -> None:  # fmt: skip
        self.control, self.address, self.port, self.folder, self.alarm = control, address, port, folder, alarm
        self.ticket = ticket
        self.lanes = ThreadLanes(torch.inference_mode)
        self.rank = self.world = 0
        self.spins = True
        self.cores: list[int] = []  # on which computation begins, rather than on those of other ranks
        self.others: set[int] = set()
        self.mesh: Mesh | None = None
        self.transport: Transport | None = None
        self.store: Any = None  # gloo's meeting point; None without gloo
        self.group: Group | None = None
        self.model: _Model | None = None
        self.chosen: list[p.Chosen] = []  # by the last run

    def say(self, message: p.ToEngine) -> None:
        """Sends one message."""
        self.control.send(p.encode(message))

    def serve(self) -> None:
        """Until the engine says that it is over."""
        place = int(os.environ.get(PLACE_VARIABLE, "0"))
        here = socket.gethostname(), os.getpid(), self.address, machine_name(), free_memory(), available_cores()
        self.say(p.Hello(VERSION, place, self.ticket, *here))
        while True:
            data = self.control.recv()
            try:
                message = p.decode_to_worker(data)
                if isinstance(message, p.Shutdown):
                    return
                self.answer(message)
            except Exception as error:  # whatever it is, the engine decides what follows
                self.say(_failure(error))

    def answer(self, message: p.ToWorker) -> None:
        """Does what one message asks."""
        match message:
            case p.Assign():
                self._assign(message)
            case p.Meet():
                self._meet(message)
            case p.SetLink():
                self._pace(message)
            case p.Load():
                self._load(message)
            case p.Run():
                self._run(message)
            case p.Release():
                for slot in message.slots:
                    self._loaded.slabs.release(slot)
                self._loaded.slabs.check_integrity()
            case p.Copy():
                self._loaded.slabs.copy(message.source, message.target, message.length)

    @property
    def _loaded(self) -> _Model:
        assert self.model is not None, "the engine runs nothing before it has loaded a model"
        return self.model

    def _assign(self, message: p.Assign) -> None:
        self.rank, self.world, self.spins = message.rank, message.world, not message.crowded
        torch.set_num_threads(message.threads)
        if message.cores:
            pin(message.cores)
        elif self.spins:
            cores = [own_cores(place, message.threads) for place in range(message.beside)]
            self.cores, self.others = cores[message.place], set(chain(*cores)) - set(cores[message.place])
        if self.world == 1:
            self._join(None)
            return
        identity, store = Identity() if message.encrypted else None, 0
        self.mesh = Mesh(self.address, self.port, self.folder, identity)
        if message.gloo and self.rank == 0:
            self.store, store = gloo.host_store(self.address)
        self.say(p.Meeting(*self.mesh.place, store, certificate=identity.certificate if identity else b""))

    def _meet(self, m: p.Meet) -> None:
        assert self.mesh is not None, "the engine says who is there after it was told where this rank listens"
        places = [Place(each.address, each.port, each.name) for each in m.places]
        self.mesh.join(self.rank, places, m.keys, self._lost, [each.certificate for each in m.places])
        if not m.places[0].store:
            self._join(Direct(self.mesh, self.spins, self._settle), [each.machine for each in m.places])
            return
        store = self.store if self.rank == 0 else gloo.join_store(m.places[0].address, m.places[0].store)
        self._join(gloo.Gloo(self.rank, store), [each.machine for each in m.places])

    def _settle(self) -> None:
        settle(self.cores, self.others)

    def _pace(self, m: p.SetLink) -> None:
        assert isinstance(self.transport, Direct), "the engine paces weft's own transport"
        self.transport.pace(Pace(m.rate, m.delay, m.shared) if m.rate or m.delay else None)

    def _join(self, transport: Transport | None, machines: Sequence[int] = ()) -> None:
        self.transport, self.group = transport, Group(transport, range(self.world), machines=machines)
        self.group.barrier()
        self.say(p.Joined())

    def _lost(self, peer: int, reason: str, ended: bool) -> None:
        """By a socket of its own: this is another thread, and the worker's may wait in a collective."""
        self.alarm.send(p.encode(p.Lost(self.rank, peer, reason, ended)))

    def _load(self, m: p.Load) -> None:
        assert self.group is not None
        self.model = None
        blueprint = blueprint_of(m.config)
        shares = shares_of(blueprint, m.layout)
        share, dtype = shares[self.rank], getattr(torch, m.dtype)
        give_back_freed_memory()
        with Peak() as peak, ExitStack() as stack:
            checkpoint, here = self._checkpoint(m, stack)
            weights = load(
                checkpoint, blueprint, share, device=m.device, dtype=dtype, kernels=Kernels(m.exact_rows),
                kept=self._kept(m, here, repr(blueprint)),
                weights=m.weights,
                progress=lambda done, total: self.say(p.Loading(done, total)),
            )  # fmt: skip
        kv_heads = len(share.kv_heads)
        slabs = Slabs(
            m.slots, len(share.layers), kv_heads, m.length, m.config.head_dim, dtype, m.device, m.kv == "int8"
        )
        decoder = Decoder(blueprint, share, weights, ropes_for(m.config, blueprint, m.device), m.exact_rows)
        ends = m.layout.sections[-1].ranks
        vocabulary = [len(shares[rank].ranges["vocabulary"]) for rank in ends]
        part = Slice.of(ends.index(self.rank), vocabulary) if share.ends else Slice(0, 0, 0, m.config.vocabulary)
        executor = Executor(decoder, blueprint.outline, self.group, self.lanes, part)
        told = self.group.on(NETWORK, ends if m.layout.several else ()) if share.ends else None
        self.model = _Model(decoder, slabs, executor, {}, vocabulary, told)
        keep_freed_memory()
        gc.freeze()  # what is loaded stays: collections need not look at it again
        kept = weights.kinds, weights.finer
        self.say(p.Loaded(weights.bytes, peak.taken, slabs.bytes_per_token, free_memory(), *kept, here is None))

    def _kept(self, m: p.Load, path: Path | None, model: str) -> Callable[[str], KeptWeights] | None:
        """What earlier starts have left of parts of the model, where weights may be rounded. `path`: of the checkpoint,
        if it is on this machine: what others hold, it doesn't know to the last byte."""
        if path is None or m.weights in DTYPES:
            return None
        content = content_of(path, lambda done, total: self.say(p.Loading(done, total)))
        how = version("weft"), repr(scheme_of(m.config.fields)), m.weights, m.dtype
        return lambda part: KeptWeights([content, *how, model, part], lambda: content_of(path) == content)

    def _checkpoint(self, m: p.Load, stack: ExitStack) -> tuple[Checkpoint, Path | None]:
        """The model's on this machine, which need not be the engine's, and where it is; where it has none, the engine's
        machine's. It is closed with the stack."""
        here, bring = held_here(Held(m.path, m.files), os.environ.get(MODEL_VARIABLE)), None
        path = here
        if path is None:
            files = FetchedFiles(m.files, self._fetch)
            stack.callback(files.close)
            path = files.directory / Path(m.path).name if is_gguf(Path(m.path)) else files.directory
            bring = files.bring
        return stack.enter_context(closing(open_model(path, m.config, bring))), here

    def _fetch(self, wanted: Wanted) -> bytes:
        self.say(p.Fetch(wanted))
        message = p.decode_to_worker(self.control.recv())
        if not isinstance(message, p.Brought):  # it is over
            raise SystemExit(1)
        return message.data

    @torch.inference_mode()
    def _run(self, m: p.Run) -> None:
        model = self._loaded
        assert self.group is not None
        if m.form is not None:
            model.forms[m.form_number] = m.form
        batch = Batch(tuple(Segment(*values) for values in m.segments))
        tokens = [self.chosen[row].token for row in m.follows] or m.tokens
        self._settle()
        scope = Scope(m.scope)

        def processor_time() -> float:  # beside a computation messages take what their threads do
            return self.lanes.processor if scope is Scope.BESIDE else time.process_time()

        sent, processor, begin = self.group.bytes_sent, processor_time(), time.perf_counter()
        forward = model.decoder.begin(batch, tokens, model.slabs)
        program, codec = Program(model.forms[m.form_number], tuple(m.offsets)), codec_named(m.wire)
        result = model.executor.run(program, forward, codec, scope, m.checksums)
        seconds, processor = time.perf_counter() - begin, processor_time() - processor
        self.chosen, logits, begin = [], b"", time.perf_counter()
        if model.told is not None and result.logits is not None and m.choices:
            exchange = partial(swap, model.told)
            self.chosen = sample(result.logits, m.choices, model.executor.part, result.told, exchange)
        sampling = time.perf_counter() - begin
        if model.told is not None and result.logits is not None and m.logits:
            logits = _whole_rows(model.told, result.logits, model.vocabulary)
        spans = result.spans if m.spans else []
        sent = self.group.bytes_sent - sent
        compute = result.busy[COMPUTE]
        lanes = compute, sum(result.busy.values()) - compute
        chosen = self.chosen if model.told is not None and model.told.rank == 0 else []  # all have the same
        checksums = [checksum for _, checksum in sorted(result.checksums.items())]
        pooled = [total.numpy().tobytes() for total in result.pooled]
        self.say(p.Done(m.number, seconds, sampling, processor, lanes, sent, chosen, spans, checksums, logits, pooled))


def _whole_rows(group: Group, logits: Tensor, vocabulary: list[int]) -> bytes:
    """Whole rows of logits, on the first rank."""
    whole = gather_columns(group, logits, vocabulary)
    return whole.numpy().tobytes() if whole is not None else b""


def _failure(error: Exception) -> p.Failed:
    """What the engine is told of an error; one that is nobody's wish also goes to the log, whole."""
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, InputError):
        print(line, file=sys.stderr)  # the last words of this rank, on its machine's terminal
        return p.Failed("input", line)
    if isinstance(error, LinkLost):
        return p.Failed("link", line)
    if isinstance(error, MemoryError) or "can't allocate memory" in line:  # torch raises RuntimeError for it
        return p.Failed("memory", f"a rank ran out of memory: {line or 'no more is free'}")
    traceback.print_exception(error)
    return p.Failed("error", f"{type(error).__name__}: {line}")
