"""Configurations: what a checkpoint is, and how the engine was asked to run it. Frozen; no other room is known.

`ModelConfig` comes from what a `config.json` says (model/configuration.py). `EngineConfig` holds what the user chose.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import InputError
from weft.layout import Layout, even_layers
from weft.links import NO_LINK, Link
from weft.units import counted
from weft.wires import allowed


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions that every family has, and the configuration they came from.

    `fields` is the configuration as transformers normalises it (a plain dict): family-specific flags are looked up
    there.
    """

    model_type: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    activation: str
    tied_embeddings: bool
    max_length: int
    fields: dict[str, Any] = field(compare=False, repr=False)

    @property
    def stretches_beyond(self) -> int | None:
        """Tokens of a prompt beyond which its rotary angles depend on its length; None if they never do."""
        rope = self.fields.get("rope_parameters") or {}
        said = {"dynamic": self.fields.get("max_position_embeddings"),
                "longrope": rope.get("original_max_position_embeddings")}  # fmt: skip
        trained = said.get(str(rope.get("rope_type")))
        return None if trained is None else int(trained)

    @property
    def turns_anew(self) -> bool:
        """Beyond that, all positions of a sequence are turned by other angles, which no longer length changes."""
        return (self.fields.get("rope_parameters") or {}).get("rope_type") == "longrope"


TRANSPORTS = ("auto", "shm", "tcp", "tls", "gloo")
DTYPES = ("float32", "bfloat16")
WEIGHTS = ("auto", *DTYPES, "int8", "int4")
SETTLED = ("auto:int8", "auto:int4")  # what auto comes to
KEPT = ("auto", "int8")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Every value is what the user gave or what "auto" came to; nothing changes later.

    Lengths are in tokens. `prefixes`: sequences that are over and kept for others that begin alike. `token_interval`:
    seconds between tokens that prompts should leave to whoever is answered meanwhile; None: throughput is all that
    counts. `layout`: how the ranks share the model. `threads`: of each rank; with `threads_by_machine` of one here, and
    others have what their own machines allow. `cores`: those that the ranks are pinned to, `threads` each in turn;
    None leaves it to the system. `transport`: of messages between ranks; auto is shared memory on one machine and
    TCP between machines, encrypted there but for `plain_data`; tls is TCP, encrypted anywhere. `link`: over which they
    seem to travel.
    `check_content`: other machines' weights are compared whole, not by their headers alone. `dtype`: what is computed
    in; `weights`: what weights are kept in. auto comes to auto:int8 or auto:int4 once it is known what room there is on
    the ranks' machines: what the checkpoint has in few bits is kept so, in no fewer, the rest in `dtype`.
    `kv`: what keys and values are kept in; auto: what is computed in. `replicas`: engines like this one, with it, that
    have ranks on this machine, where they are started one after the other; `replica`: its number among them.
    """

    layout: Layout
    overlap: str = "auto"
    wire: str = "exact"
    transport: str = "auto"
    link: Link = NO_LINK
    plain_data: bool = False
    check_content: bool = False
    reproducible: bool = False
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    weights: str = "float32"
    kv: str = "auto"
    max_length: int = 2048
    max_sequences: int = 16
    max_batch_tokens: int = 8192
    prefixes: int = 16
    token_interval: float | None = None
    cores: tuple[int, ...] | None = None
    replicas: int = 1
    replica: int = 0
    threads_by_machine: bool = False

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.layout.world

    @property
    def slots(self) -> int:
        """Sequences that key/value memory has an address for."""
        return self.max_sequences + self.prefixes

    @classmethod
    def resolve(
        cls, model: ModelConfig, *, ranks: int = 1, sections: int = 1, layers: tuple[int, ...] | None = None,
        shares: tuple[float, ...] | None = None, overlap: str = "auto", wire: str = "exact", transport: str = "auto",
        link: Link = NO_LINK, plain_data: bool = False, check_content: bool = False, reproducible: bool = False,
        threads: int | None = None, device: str = "cpu", dtype: str = "float32", weights: str = "auto",
        kv: str = "auto", max_length: int | None = None, max_sequences: int = 16, max_batch_tokens: int = 8192,
        prefixes: int = 16, token_interval: float | None = None, cores: tuple[int, ...] | None = None,
        replicas: int = 1, replica: int = 0, here: Callable[[int], int] = lambda ranks: ranks,
    ) -> EngineConfig:  # fmt: skip
        """Fills in what was left open; raises `InputError` for values that are not allowed. `ranks`: of each of the
        `sections`; `shares`: one number for each of all ranks. `here`: how many of them are on this machine."""
        layout = laid_out(model.layers, ranks, sections, layers, shares)
        ranks, by_machine = layout.world, threads is None and cores is None
        allowed(wire)
        demand_way(transport, link, plain_data)
        one_of(dtype, "--dtype", DTYPES)
        one_of(weights, "--weights", (*WEIGHTS, *SETTLED))
        one_of(kv, "--kv", KEPT)
        positive(max_sequences, "max_num_seqs")
        positive(max_batch_tokens, "max_num_batched_tokens")
        positive(threads, "num_threads")
        if token_interval is not None and not 0 < token_interval < float("inf"):
            raise InputError(f"the time between tokens, {token_interval} s, must be above 0")
        positive(max_length, "max_model_len")
        if max_length == 1:
            raise InputError("max_model_len 1 holds no prompt with an answer; give 2 or more")
        if max_length is not None and max_length > model.max_length:
            raise InputError(f"max_model_len {max_length} is more than the model's context of {model.max_length}")
        threads = threads or max(1, available_cores() // max(1, here(ranks) * replicas))
        if cores is not None and len(cores) < ranks * threads:
            raise InputError(f"{ranks} ranks of {threads} threads need {ranks * threads} cores, not {len(cores)}")
        return cls(
            layout, overlap, wire, transport, link, plain_data, check_content, reproducible, threads, device,
            dtype, weights, kv, max_length or model.max_length, max_sequences, max_batch_tokens, prefixes,
            token_interval, cores, replicas, replica, by_machine,
        )  # fmt: skip


def laid_out(
    model: int, ranks: int, sections: int, layers: Sequence[int] | None, shares: Sequence[float] | None
) -> Layout:  # fmt: skip
    """Of a model of so many layers, over so many ranks in each section. Raises `InputError`."""
    positive(ranks, "--tp")
    positive(sections, "--pp")
    layers = tuple(layers) if layers is not None else even_layers(model, sections)
    if sections == 1 < len(layers) and sum(layers) == model and min(layers) > 0:
        raise InputError(f"--layers {','.join(map(str, layers))} is for as many sections: give --pp {len(layers)} too")
    if len(layers) != sections or sum(layers) != model or min(layers) < 1:
        why = "a section has none" if min(layers) < 1 else f"they add up to {sum(layers)}"
        if len(layers) != sections:
            why = f"these are {counted(len(layers), 'number')}"
        raise InputError(
            f"--layers {','.join(map(str, layers))} does not go with --pp {sections} and a model of {model} layers: "
            f"{why}; give a number for each section, as in {','.join(map(str, even_layers(model, sections)))}"
        )
    world = ranks * sections
    shares = shares or (1.0,) * world
    if len(shares) != world:
        given, there = counted(len(shares), "number"), counted(world, "rank")
        raise InputError(f"--shares gives {given} for {there}; give one a rank, as in 2,1 for two")
    if not all(0 < share < float("inf") for share in shares):
        raise InputError(f"--shares {','.join(map(str, shares))}: every share must be a number above 0")
    return Layout(layers, tuple(tuple(shares[first : first + ranks]) for first in range(0, world, ranks)))


def positive(value: int | None, name: str) -> None:
    """Raises `InputError` unless `value` is None or a whole number from 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{name} {value!r} is not allowed; give a whole number from 1")


def demand_way(transport: str, link: Link, plain_data: bool = False) -> None:
    """Raises `InputError` for messages that can't travel so."""
    one_of(transport, "--transport", TRANSPORTS)
    if link.shaped and transport == "shm":
        raise InputError(f"--link {link}: ranks are as on several machines there; leave out --transport shm")
    if link.paced and transport not in ("auto", "tcp", "tls"):
        raise InputError(f"--link {link} is kept by weft's own transport over TCP; leave out --transport {transport}")
    if plain_data and transport == "tls":
        raise InputError("--plain-data leaves plain what --transport tls encrypts; give one of them")


def one_of(value: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raises `InputError` that lists what is allowed."""
    if value not in allowed:
        raise InputError(f"{name} {value!r} is not known; allowed: {', '.join(allowed)}")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's own name, where the system tells it."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
