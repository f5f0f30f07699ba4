"""`weft plan`'s comparison: every layout of every group beside a single device, what they cost, and a sentence that
concludes.

Knows outlooks and ratings; knows nothing of how they are shown. Everything is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from weft.config import ModelConfig
from weft.errors import InputError
from weft.layout import Layout
from weft.model.families import blueprint_of
from weft.model.shares import shares_of
from weft.outlook.figures import Memory, Misfit, Outlook, Question, memory_of, planned_shares
from weft.plan.layouts import (
    LATENCY,
    THROUGHPUT,
    Aim,
    Rating,
    Workload,
    divisions,
    even_layout,
    rate,
)  # fmt: skip
from weft.program.batch import one_prompt
from weft.simulate.hardware import Device, Hardware
from weft.units import duration, times

ALONE = "one alone"


@dataclass(frozen=True)
class Row:
    """One layout of one group for prompts of a length: what it is predicted to give on the `wire` that is best for it,
    with its fullest device's memory; or why it can't be. `devices`: names of those that it uses, of all replicas;
    `replica`: the layout of one of these; `requests`: how many run at a time, in all, where their number a second is
    told."""

    hardware: str
    tokens: int
    layout: str
    devices: tuple[str, ...]
    replicas: int = 1
    replica: str = ""
    requests: int = 0
    wire: str = ""
    rating: Rating | None = None
    memory: Memory | None = None
    saved: float = 0.0
    why: str = ""


def load_of(asked: Question, tokens: int) -> Workload:
    """Prompts of this length, and as many at a time as are asked for, or several."""
    return Workload(prompt=tokens, requests=asked.decoding or Workload.requests)


def compared(model: ModelConfig, group: Hardware, asked: Question, tokens: int) -> list[Row]:
    """A single device, its fastest one, and all ways to use all of them."""
    return [_row(model, group, replace(asked, tokens=(tokens,)), *way) for way in _ways(model, group, asked)]


def _row(
    model: ModelConfig, group: Hardware, asked: Question, name: str, devices: tuple[Device, ...],
    layout: Layout | None, replicas: int,
) -> Row:  # fmt: skip
    [tokens] = asked.tokens
    whole = name if replicas == 1 else f"{replicas} replicas" + (f" of {name}" if name != ALONE else "")
    row = Row(group.text, tokens, whole, tuple(device.key for device in devices) * replicas, replicas, name)
    part = replace(group, devices=devices)
    own = asked if len(devices) == group.world else replace(asked, shares=None)
    try:
        outlook = Outlook(model, part, own, layout and _by_speed(model, part, own, layout))
    except InputError as error:
        return replace(row, why=error.short if isinstance(error, Misfit) else str(error))
    load, memory, found = load_of(asked, tokens), outlook.memory[tokens], list[Row]()
    there = max(asked.prompts, asked.decoding or 1) * memory.room * (tokens + 1) / (tokens + load.answer)  # at a time
    if asked.decoding is None:
        load = replace(load, requests=min(load.requests, max(1, int(there)) * replicas))
    for wire in asked.wires if len(devices) > 1 else asked.wires[:1]:
        planner = outlook.planner("auto", wire)
        predicted = planner.expect(one_prompt(tokens))
        found.append(
            replace(
                row, wire=wire, rating=rate(planner, load, replicas), requests=load.requests,
                memory=memory, saved=1 - predicted.seconds / predicted.serial,
            )
        )  # fmt: skip
    return min(found, key=lambda each: each.rating.first_token if each.rating else 0.0)


def _ways(
    model: ModelConfig, group: Hardware, asked: Question
) -> Iterator[tuple[str, tuple[Device, ...], Layout | None, int]]:  # fmt: skip
    """Of one replica its name, devices and layout (None: all layers over all of them), and how many there are; several
    only of devices that are alike."""
    fastest = min(range(group.world), key=lambda rank: group.seconds_of(1.0, rank))
    alike = len(set(group.devices)) == 1
    yield ALONE if group.world > 1 else "alone", (group.devices[fastest],), None, 1
    for tp, pp, replicas in divisions(group.world, model.layers, model.heads) if group.world > 1 else ():
        if (replicas > 1 and not alike) or (asked.shares and (pp > 1 or replicas > 1)):
            continue
        words = ([f"tp {tp}"] if tp > 1 else []) + ([f"pp {pp}"] if pp > 1 else [])
        layout = even_layout(model.layers, tp, pp) if pp > 1 else None
        yield " x ".join(words) or ALONE, group.devices[: tp * pp], layout, replicas


def _by_speed(model: ModelConfig, group: Hardware, asked: Question, layout: Layout) -> Layout:
    """Layers and shares that follow from the devices' speed and memory."""
    speeds = planned_shares(group)
    shares = tuple(tuple(speeds[rank] for rank in section.ranks) for section in layout.sections)
    layout = replace(layout, shares=shares)
    try:
        planner = Outlook(model, group, asked, layout, fitting=False).planner("serial", asked.wires[0])
        return replace(layout, layers=planner.layers_by_speed(_room(model, group, asked, layout)).layers)
    except InputError:
        return layout  # whose own complaint says more


def _room(model: ModelConfig, group: Hardware, asked: Question, layout: Layout) -> list[int]:
    """Layers that fit on each section's devices."""
    blueprint, tokens = blueprint_of(model), asked.tokens[0]
    parts, rooms = shares_of(blueprint, layout), list[int]()
    for section in layout.sections:
        fits = []
        for rank in section.ranks:
            part = replace(group, devices=(group.devices[rank],))
            one, two = (
                memory_of(blueprint, part, [replace(parts[rank], layers=range(count))], asked, tokens)
                for count in (1, 2)
            )
            fits.append(1 + int((one.usable - one.needed) / max(1, two.needed - one.needed)))
        rooms.append(max(1, min(*fits, model.layers)))
    return rooms


def conclusion(rows: Sequence[Row], asked: Question, first_token: float | None = None) -> str:
    """A line for each length on what is best, and what more devices are worth beside a single one; `first_token`: and
    on what has it in so many seconds."""
    lines = [_concluded([row for row in rows if row.tokens == tokens], asked, tokens) for tokens in asked.tokens]
    if first_token is not None:
        lines.append(_in_time(rows, max(asked.tokens), first_token))
    return "\n".join(filter(None, lines))


def _in_time(rows: Sequence[Row], tokens: int, wanted: float) -> str:
    fitting = [(row.rating.first_token, row) for row in rows if row.rating is not None and row.tokens == tokens]
    if not fitting:
        return ""
    seconds, fastest = min(fitting, key=lambda each: each[0])
    soon = [(len(row.devices) // row.replicas, taken, row) for taken, row in fitting if taken <= wanted]
    first = f"the first of {tokens} tokens within {duration(wanted)}"
    if not soon:
        soonest = f"{fastest.hardware} as {fastest.layout}: {duration(seconds)}"
        return f"Nothing of this gives {first}; the soonest is {soonest}."
    devices, _, fewest = min(soon, key=lambda each: each[:2])
    return f"Fewest of these devices that give {first}: {devices} of {fewest.hardware}, as {fewest.replica}."


def _concluded(rows: Sequence[Row], asked: Question, tokens: int) -> str:
    load = load_of(asked, tokens)
    fitting = [(row, row.rating) for row in rows if row.rating is not None]
    if not fitting:
        return f"Nothing of this holds the model with {tokens} tokens."
    said = []
    for aim in (LATENCY, THROUGHPUT):
        row, rating = min(fitting, key=lambda each: each[1].cost(aim, load))
        whom = "one request" if aim == LATENCY else f"{row.requests} at a time"
        alone = next((r for c, r in fitting if c.hardware == row.hardware and c.layout == ALONE), None)
        if row.layout in (ALONE, "alone"):
            beside = ""
        elif alone is None:
            beside = "; one alone doesn't hold it"
        else:
            beside = f", {times(alone.cost(aim, load) / rating.cost(aim, load))} as fast as one alone"
        said.append(f"for {whom} {row.hardware} as {row.layout}: {Aim(aim, load).describe(rating)}{beside}")
    return f"Best ({load.prompt} tokens and {load.answer} of answer, predicted) {'; '.join(said)}."


@dataclass(frozen=True)
class Offer:
    """What one layout costs, for the longest prompts. `price`: of its devices for an hour; `per_million_prompt`: of
    tokens of prompts, which come one after the other, to each replica; `per_thousand`: of whole requests, as many at a
    time as the row says."""

    hardware: str
    layout: str
    first_token: float
    price: float
    per_million_prompt: float
    per_thousand: float
    in_time: bool | None  # where there is a time


def offers(rows: Sequence[Row], prices: Mapping[str, float], first_token: float | None) -> list[Offer]:
    """Those in time first, the cheapest per token of the prompt first among them; of each group only layouts that no
    other one of it is both sooner and cheaper than. Raises `InputError` for devices without a price."""
    longest = max((row.tokens for row in rows), default=0)
    if missing := sorted({device for row in rows for device in row.devices if device not in prices}):
        raise InputError(f"--price says nothing of {missing[0]}; write it like --price {missing[0]}=0.50 (an hour)")
    found = [_offer(row, prices, first_token) for row in rows if row.rating is not None and row.tokens == longest]
    worth = [one for one in found if not any(_better(other, one) for other in found)]
    return sorted(worth, key=lambda offer: (offer.in_time is False, offer.per_million_prompt, offer.first_token))


def _offer(row: Row, prices: Mapping[str, float], first_token: float | None) -> Offer:
    assert row.rating is not None, "only what fits is offered"
    price = sum(prices[device] for device in row.devices)
    prompts = row.replicas * row.tokens / row.rating.first_token  # tokens a second
    second = price / 3600
    in_time = None if first_token is None else row.rating.first_token <= first_token
    return Offer(
        row.hardware, row.layout, row.rating.first_token, price, 1e6 * second / prompts,
        1e3 * second / row.rating.requests, in_time,
    )  # fmt: skip


def _better(one: Offer, other: Offer) -> bool:
    """In all that counts, of the same group."""
    mine, theirs = ((offer.first_token, offer.per_million_prompt, offer.per_thousand) for offer in (one, other))
    return one.hardware == other.hardware and mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))
