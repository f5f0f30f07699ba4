"""`weft plan`'s figures: times, plans and memory of a model on catalogued hardware, from its config alone.

Knows configurations, the catalogue and the planner; knows nothing of how figures are shown. Everything is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from weft.config import ModelConfig, positive
from weft.errors import InputError
from weft.layout import Layout
from weft.model.blueprint import Axis, Blueprint, StageParts, size
from weft.model.families import blueprint_of
from weft.model.shares import STORED_BITS, Share, kept_bytes, remembered, shard_bytes, shares_of, tensor_shares
from weft.plan.planner import Plan, Planner
from weft.program.batch import Batch, Segment
from weft.program.strategy import Strategy
from weft.simulate.cost import Costs, window_shares
from weft.simulate.hardware import Device, Hardware, Keeping, Products, Shard, costs_of
from weft.timeline.timeline import Timeline
from weft.units import counted
from weft.wires import allowed, needed

GIB = 2**30
MOST = 64  # devices of a group that is proposed
NOTHING = "nothing in the catalogue; use fewer tokens, or weights of fewer bits"
USABLE = 0.92  # of a device's memory: the rest is the runtime's
FASTEST, SLOWEST = 4096.0, 1 / 64  # times the link's rate: where the end of overlap's gain is looked for


@dataclass(frozen=True)
class Question:
    """What is asked. `tokens`: of each of `prompts` prompts; `decoding`: sequences at a time, for which there must be
    memory; None: several, or as many as there is memory for. `shares`: None plans them by the devices' speed.
    `weights`, `kv`: what weights, keys and values are kept in; auto: what the devices compute in."""

    tokens: tuple[int, ...]
    overlaps: tuple[str, ...]
    wires: tuple[str, ...]
    prompts: int = 1
    decoding: int | None = None
    shares: tuple[float, ...] | None = None
    weights: str = "auto"
    kv: str = "auto"

    def demand(self, model: ModelConfig) -> None:
        """Raises `InputError` for what no hardware can do."""
        for tokens in self.tokens:
            positive(tokens, "--tokens")
            if tokens > model.max_length:
                raise InputError(f"--tokens {tokens} is more than the model's context of {model.max_length}")
        positive(self.prompts, "--prompts")
        positive(self.decoding, "--decoding")
        for wire in self.wires:
            allowed(wire)


@dataclass(frozen=True)
class Forecast:
    """One strategy on one wire for one length, in seconds. `decode`: of one more token for each running sequence."""

    tokens: int
    wire: str
    overlap: str
    plan: str
    seconds: float
    serial: float
    bound: float
    compute_alone: float
    network_alone: float
    decode: float

    @property
    def saving(self) -> float:
        """Of serial's time."""
        return 1 - self.seconds / self.serial

    @property
    def saving_bound(self) -> float:
        """What any schedule can save of it."""
        return 1 - self.bound / self.serial


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, and what it has."""

    weights: int
    keys_and_values: int
    working: int
    usable: int

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.keys_and_values + self.working

    @property
    def room(self) -> float:
        """How many times as many keys and values there is memory for."""
        return (self.usable - self.weights - self.working) / max(1, self.keys_and_values)


class Outlook:
    """One model on one group, all layers over all ranks unless another `layout` is given. Raises `InputError` if it
    doesn't fit, saying what is missing and what would do, but where that is not to be looked at (`fitting`)."""

    def __init__(
        self, model: ModelConfig, group: Hardware, question: Question, layout: Layout | None = None,
        fitting: bool = True,
    ) -> None:  # fmt: skip
        question.demand(model)
        self.model, self.group, self.question = model, group, question
        self.shares = question.shares or planned_shares(group)
        demand_shares(self.shares, group)
        self.blueprint = blueprint_of(model)
        self.layout = layout or Layout.tensor(model.layers, self.shares)
        self.parts = shares_of(self.blueprint, self.layout)
        empty = [
            part.rank for part in self.parts if not any(part.numbers(m) for p in self.blueprint.layer for m in p.first)
        ]
        if empty:
            raise Misfit(
                f"--hardware {group.text!r}: rank {empty[0]} would hold nothing of a model with {model.heads} heads "
                f"and an MLP of {model.intermediate}; use fewer devices", "too many devices"
            )  # fmt: skip
        if layout is None and group.world > model.heads:
            raise Misfit(
                f"{group.text}: {group.world} devices are more than the model's {model.heads} heads; use fewer, or a "
                "number that sections of fewer divide", "too many devices"
            )  # fmt: skip
        self.memory = {
            tokens: memory_of(self.blueprint, group, self.parts, question, tokens) for tokens in question.tokens
        }
        for tokens, memory in self.memory.items():
            if fitting and memory.needed > memory.usable:
                raise _missing(model, group, question, tokens, memory)

    @cached_property
    def costs(self) -> Costs:
        """Of the group."""
        return self._costs(self.group)

    def _costs(self, group: Hardware) -> Costs:
        shards = [shard_of(self.blueprint, part) for part in self.parts]
        kept, tp = keeping_of(self.blueprint, group.devices[0], self.question), max(map(len, self.layout.shares))
        return costs_of(group, shards, self._wires, kept, tp)

    @property
    def _wires(self) -> list[str]:
        return list(dict.fromkeys(each for wire in self.question.wires for each in needed(wire)))

    def planner(self, overlap: str, wire: str, costs: Costs | None = None) -> Planner:
        """A planner on these costs."""
        return Planner(self.blueprint.outline, overlap, wire, costs=costs or self.costs, layout=self.layout)

    def batch(self, tokens: int) -> Batch:
        """The prompts of one pass."""
        return Batch(tuple(Segment(i, 0, tokens) for i in range(self.question.prompts)))

    @cached_property
    def forecasts(self) -> list[Forecast]:
        """Every length, wire and strategy."""
        asked = self.question
        overlaps = dict.fromkeys(("serial", *(asked.overlaps if self.group.world > 1 else ())))
        wires = asked.wires if self.group.world > 1 else asked.wires[:1]
        return [
            self._forecast(tokens, overlap, wire)
            for tokens in asked.tokens for wire in wires for overlap in overlaps
        ]  # fmt: skip

    def plan(self, tokens: int, overlap: str, wire: str) -> Plan:
        """The plan for one length."""
        return self.planner(overlap, wire).plan(self.batch(tokens))

    def _forecast(self, tokens: int, overlap: str, wire: str) -> Forecast:
        plan = self.plan(tokens, overlap, wire)
        running = Batch(tuple(Segment(i, tokens, 1) for i in range(self.question.decoding or 1)))
        decode = self.planner(overlap, wire).plan(running).predicted
        known = plan.predicted
        assert known is not None and decode is not None, "the catalogue has costs for every wire"
        return Forecast(
            tokens, wire, overlap, plan.describe(), known.seconds, known.serial, known.bound, known.compute_alone,
            known.network_alone, decode.seconds,
        )  # fmt: skip

    def timeline(self, tokens: int, overlap: str, wire: str) -> Timeline:
        """The predicted timeline; of one rank where all are alike."""
        planner = self.planner(overlap, wire)
        timeline = planner.predict(planner.plan(self.batch(tokens)), self.batch(tokens), f"{overlap}, wire {wire}")
        if len(self.costs.ranks) > 1:
            return timeline
        return replace(timeline, events=tuple(event for event in timeline.events if event.rank == 0))

    def at_rates(self, tokens: int, wire: str, factors: Sequence[float]) -> list[tuple[float, float, float, str]]:
        """For links of other rates: bytes a second, saving of auto, possible saving, strategy."""
        rates = []
        for factor in factors:
            link = self.group.link.faster(factor)
            plan = self.planner("auto", wire, self._costs(replace(self.group, link=link))).plan(self.batch(tokens))
            predicted = plan.predicted
            assert predicted is not None
            saved, possible = (1 - seconds / predicted.serial for seconds in (predicted.seconds, predicted.bound))
            rates.append((link.reached, saved, possible, str(plan.strategy)))
        return rates

    def pays_until(self, tokens: int, wire: str) -> float | None:
        """Bytes a second of the fastest link on which overlap still pays; None if it pays on none that was tried."""
        if self.group.world == 1:
            return None
        factor, last = FASTEST, None
        while factor >= SLOWEST:
            [(rate, _, _, strategy)] = self.at_rates(tokens, wire, [factor])
            if replace(Strategy.parse(strategy), scattered=False) != Strategy():  # scattered sums alone hide nothing
                last = rate
                break
            factor /= 2**0.5
        return last


def demand_shares(shares: Sequence[float], group: Hardware) -> None:
    """Raises `Misfit` unless each device of the group has one."""
    if len(shares) != group.world:
        given, devices = counted(len(shares), "number"), counted(group.world, "device")
        raise Misfit(f"--shares gives {given} for {devices}; give one each", "other --shares")


def planned_shares(group: Hardware) -> tuple[float, ...]:
    """In proportion to the devices' speed in large products, of which a prompt mostly consists."""
    speeds = [1 / group.seconds_of(1e12, rank) for rank in range(group.world)]
    return tuple(speed / max(speeds) for speed in speeds)


def shard_of(blueprint: Blueprint, share: Share) -> Shard:
    """A rank's part of a model as hardware sees it."""

    def numbers(side: Axis | int) -> int:
        return size(side, lambda axis: len(share.of(axis)))

    def products(parts: StageParts) -> Products:
        outputs = sum(numbers(matrix.outputs) for matrix in parts.first)
        last = (sum(numbers(matrix.inputs) for matrix in parts.last), blueprint.hidden if parts.last else 0)
        moved = sum(b.traffic * numbers(matrix.outputs) for b in parts.branches for matrix in b.first)
        return Products((blueprint.hidden, outputs), last, moved)

    scored = next(parts for parts in blueprint.layer if parts.remembers)
    assert scored.remembers, "what remembers rows has heads"
    return Shard(
        blueprint.hidden, tuple((parts.stage.part, products(parts)) for parts in blueprint.layer),
        (blueprint.after[-1].stage.part, Products((blueprint.hidden, numbers(blueprint.head.outputs)))),
        tuple(parts.stage.part for parts in blueprint.before), scored.stage.part, numbers(blueprint.axis("heads")),
        numbers(scored.remembers), window_shares(blueprint.windows), tuple(blueprint.outline.aside.items()),
        blueprint.kept,
    )  # fmt: skip


def keeping_of(blueprint: Blueprint, device: Device, asked: Question) -> Keeping:
    """What weights, keys and values are kept in there."""
    dtype = "float32" if device.itemsize == 4 else "bfloat16"
    weights = dtype if asked.weights == "auto" else asked.weights
    matrix, width = STORED_BITS[weights] / 8, blueprint.axis("kv_heads").width
    return Keeping(weights, matrix, max(matrix, STORED_BITS["int8"] / 8), kept_bytes(asked.kv, dtype, width))


def memory_of(blueprint: Blueprint, group: Hardware, parts: Sequence[Share], asked: Question, tokens: int) -> Memory:
    """Of the rank with the least room left."""
    of_ranks = []
    for part, device in zip(parts, group.devices, strict=True):
        itemsize, sequences = device.itemsize, max(asked.prompts, asked.decoding or 1)
        kept = keeping_of(blueprint, device, asked)
        keys = int(remembered(blueprint, part) * kept.key * (tokens + 1) * sequences)
        stages = (p.first[1] + p.last[0] for _, p in shard_of(blueprint, part).layer)
        row = 4 * blueprint.hidden + max(stages)  # each row is in one stage at a time
        working = row * itemsize * tokens * asked.prompts
        weights = shard_bytes(blueprint, part, kept.weights)
        of_ranks.append(Memory(weights, keys, working, int(USABLE * device.memory * GIB)))
    return min(of_ranks, key=lambda memory: memory.usable - memory.needed)


class Misfit(InputError):
    """A model can't be had this way. `short`: why, in a few words."""

    def __init__(self, text: str, short: str) -> None:
        super().__init__(text)
        self.short = short


class NoMemory(Misfit):
    """The devices have too little. `found`: what would fit, which takes a moment to find."""

    def __init__(self, text: str, short: str, found: Callable[[], list[str]]) -> None:
        super().__init__(text, short)
        self._text, self._found = text, found

    def __str__(self) -> str:
        return f"{self._text}; what would fit: {'; '.join(self._found()) or NOTHING}"


def _missing(model: ModelConfig, group: Hardware, asked: Question, tokens: int, memory: Memory) -> NoMemory:
    missing = f"{math.ceil(10 * (memory.needed - memory.usable) / GIB) / 10:.1f} GiB"
    return NoMemory(
        f"{group.text} doesn't hold this model with {tokens} tokens: the fullest device needs "
        f"{memory.needed / GIB:.1f} GiB and {memory.usable / GIB:.1f} are usable, so {missing} are missing",
        f"{missing.removesuffix(' GiB')} missing", partial(would_fit, model, group, asked, tokens),
    )  # fmt: skip


def would_fit(model: ModelConfig, group: Hardware, asked: Question, tokens: int) -> list[str]:
    """Other parts, more of the first device, or as many of the smallest other one that does."""
    device, plain = group.devices[0], " without --shares" if asked.shares else ""
    even = replace(asked, shares=None)
    found = ["the same without --shares, with parts by speed"] if asked.shares and _fits(
        model, group, replace(asked, shares=planned_shares(group)), tokens, group.devices
    ) else []  # fmt: skip
    found += [
        f"{count}x {device.key}{plain}"
        for count in range(group.world + 1, min(MOST, model.heads) + 1)
        if _fits(model, group, even, tokens, (device,) * count)
    ][:1]
    found += [
        f"{group.text} with --weights {weights}{plain}"
        for weights in ("int8", "int4")
        if STORED_BITS[weights] < _bits(group, asked)
        and _fits(model, group, replace(even, weights=weights), tokens, group.devices)
    ][:1]
    alike = [(d.memory, n, d) for n, d in group.source.device.items() if bool(d.cores) == bool(device.cores)]
    for _, other, known in sorted(alike, key=lambda entry: entry[:2]):
        if other != device.key and _fits(model, group, even, tokens, (known,) * group.world):
            return [*found, f"{group.world}x {other}{plain}"]
    return found


def _bits(group: Hardware, asked: Question) -> float:
    """Of a weight."""
    return STORED_BITS[asked.weights] if asked.weights != "auto" else 8.0 * group.devices[0].itemsize


def _fits(model: ModelConfig, group: Hardware, asked: Question, tokens: int, devices: tuple[Device, ...]) -> bool:
    other = replace(group, devices=devices)
    blueprint = blueprint_of(model)
    shares = asked.shares if asked.shares and len(asked.shares) == len(devices) else [1.0] * len(devices)
    memory = memory_of(blueprint, other, tensor_shares(blueprint, shares), asked, tokens)
    return memory.needed <= memory.usable
