"""What engine and workers say to each other: msgpack over ZeroMQ, never pickle. No torch.

worker -> engine   Hello, Meeting, Joined, Fetch, Loading, Loaded, Done, Lost, Failed
engine -> worker   Assign, Meet, SetLink, Load, Brought, Run, Release, Copy, Shutdown
"""

from __future__ import annotations

import msgspec

from weft.config import ModelConfig
from weft.formats.fingerprint import Wanted, WeightFile
from weft.layout import Layout
from weft.program.steps import Form


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A worker has come. `ticket`: of its place, see launch/keys.py. `machine`: equal for workers that share memory;
    `free`: bytes of it that they may take; `cores`: that this one may use."""

    version: int
    place: int  # in the order of ranks
    ticket: str
    host: str
    pid: int
    address: str  # where other ranks reach it
    machine: str
    free: int
    cores: int


class Assign(msgspec.Struct, tag=True, frozen=True):
    """You are this rank. `gloo`: carries messages; `encrypted`: all that isn't in memory. `crowded`: other ranks want
    the same cores. `cores`: pin to these; None leaves it to the system. `beside`: ranks of this machine, replicas' too;
    `place`: of this one among them."""

    rank: int
    world: int
    threads: int
    gloo: bool
    encrypted: bool
    crowded: bool
    cores: list[int] | None = None
    beside: int = 1
    place: int = 0


class Meeting(msgspec.Struct, tag=True, frozen=True):
    """This rank listens here for the others. `name`: of its socket for ranks of the same machine, if it has one;
    `store`: the port of gloo's meeting point, on rank 0. `machine`: equal for ranks of one, as the engine counts.
    `certificate`: what it shows, where connections are encrypted."""

    address: str
    port: int
    name: str = ""
    store: int = 0
    machine: int = 0
    certificate: bytes = b""


class Meet(msgspec.Struct, tag=True, frozen=True):
    """Join the group: where each rank listens, as this one is to reach it, and the key that it shares with each."""

    places: list[Meeting]
    keys: list[bytes]


class SetLink(msgspec.Struct, tag=True, frozen=True):
    """Messages between ranks take as long as over a link of so many bits a second (None: any number), so many seconds
    long. `shared`: a file of this machine that the ranks map, if both directions share the rate."""

    rate: float | None
    delay: float
    shared: str = ""


class Joined(msgspec.Struct, tag=True, frozen=True):
    """The group is complete, as seen from this rank."""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Load your share of this model and reserve key/value memory; replaces what was loaded before. `files`: what the
    engine's machine has of it, if this may be another one."""

    path: str
    config: ModelConfig
    layout: Layout
    dtype: str
    weights: str
    kv: str
    device: str
    exact_rows: bool
    length: int
    slots: int
    files: list[WeightFile] = []


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """This machine has not got the model, and wants these bytes of one of its files."""

    wanted: Wanted


class Brought(msgspec.Struct, tag=True, frozen=True):
    """Here they are."""

    data: bytes


class Loading(msgspec.Struct, tag=True, frozen=True):
    """Bytes of this rank's part of the checkpoint that are read so far, and all of them."""

    done: int
    total: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.done / max(1, self.total)


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """Ready. Bytes; `peak` is what loading took at most beyond what the process had before, `free` what its machine
    has left; `kinds`: of weights in each format. `finer`: matrices that lose too much in the format that was asked for,
    and are kept in more bits. `fetched`: its machine has no model of its own."""

    weights: int
    peak: int
    kv_bytes_per_token: int
    free: int
    kinds: dict[str, int] = {}
    finer: list[str] = []
    fetched: bool = False


class Choice(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose one predicting row's next token. `prompt` and `output` are there if penalties need them.

    `given`: the token that does follow, as in a prompt; it is scored and nothing is chosen.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    index: int = 0  # of the token in its completion: with the seed, all that the draw depends on
    banned: list[int] = []
    prompt: list[int] = []
    output: list[int] = []
    logprobs: int | None = None
    given: int | None = None
    bias: dict[int, float] = {}  # added to the logits of these tokens
    allowed: bytes = b""  # a bit for every token that may be chosen, the lowest of each byte first; empty: all


class Run(msgspec.Struct, tag=True, frozen=True):
    """Run a program: a form, which is given the first time that its number is used, with a batch's offsets.

    `follows` stands in place of tokens that are not known yet: for each row, the wanted row of the run before whose
    choice it gets.
    """

    number: int
    form_number: int
    form: Form | None
    offsets: list[int]
    segments: list[tuple[int, int, int, int, int, bool]]  # as in `program.batch.Segment`
    tokens: list[int]
    choices: list[Choice]
    wire: str
    scope: str = "both"
    spans: bool = False
    checksums: bool = False
    logits: bool = False
    follows: list[int] = []


class Chosen(msgspec.Struct, frozen=True):
    """One token; its log-probability and rank (1 is likeliest) and the likeliest tokens, if asked for.

    `error`: why there is none, for this row alone.
    """

    token: int
    logprob: float = 0.0
    rank: int = 0
    top: list[tuple[int, float]] = []
    error: str = ""

    def ranked(self) -> dict[int, tuple[float, int]]:
        """Log-probability and rank of the token and of the likeliest ones, by token."""
        found = {token: (value, rank) for rank, (token, value) in enumerate(self.top, start=1)}
        return found | {self.token: (self.logprob, self.rank)}


class Done(msgspec.Struct, tag=True, frozen=True):
    """A program ended. `seconds`: of the program alone, on this rank; `sampling`: of choosing tokens after it;
    `processor`: those of the process, all threads; of messages beside a computation, those of their lanes' threads.

    `lanes`: seconds that the compute and the network lane were busy. `spans`: start and end of every step.
    """

    number: int
    seconds: float
    sampling: float
    processor: float
    lanes: tuple[float, float]
    bytes_sent: int
    chosen: list[Chosen] = []
    spans: list[tuple[float, float]] = []
    checksums: list[int] = []
    logits: bytes = b""  # float32 [predicting rows, vocabulary]
    pooled: list[bytes] = []  # float64 [width], of each pooled segment; on one rank


class Lost(msgspec.Struct, tag=True, frozen=True):
    """That peer of this rank has ended, or hangs, or the link between them is down; `reason` says how that was seen."""

    rank: int
    peer: int
    reason: str
    ended: bool


class Failed(msgspec.Struct, tag=True, frozen=True):
    """It could not be done. `kind`: "input" (the user's), "memory", "link" (to another rank) or "error"."""

    kind: str
    message: str


class Release(msgspec.Struct, tag=True, frozen=True):
    """These slots' sequences are over."""

    slots: list[int]


class Copy(msgspec.Struct, tag=True, frozen=True):
    """The first `length` positions of one slot are to be those of another too."""

    source: int
    target: int
    length: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """End."""


ToWorker = Assign | Meet | SetLink | Load | Brought | Run | Release | Copy | Shutdown
ToEngine = Hello | Meeting | Joined | Fetch | Loading | Loaded | Done | Lost | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
