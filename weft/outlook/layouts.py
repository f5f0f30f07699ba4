"""`weft plan`'s comparison: every layout of every group beside a single device, and a sentence that concludes.

Knows outlooks and ratings; knows nothing of how they are shown. Everything is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from weft.config import ModelConfig
from weft.errors import InputError
from weft.layout import Layout
from weft.model.families import blueprint_of
from weft.model.shares import shares_of
from weft.outlook.figures import Memory, NoMemory, Outlook, Question, memory_of, planned_shares
from weft.plan.layouts import LATENCY, THROUGHPUT, Rating, Workload, divisions, even_layout, rate
from weft.simulate.hardware import Device, Hardware

ALONE = "one alone"


@dataclass(frozen=True)
class Row:
    """One layout of one group: what it is predicted to give, with its fullest device's memory; or why it can't be."""

    hardware: str
    layout: str
    devices: int
    rating: Rating | None = None
    memory: Memory | None = None
    saved: float = 0.0
    why: str = ""


def load_of(asked: Question) -> Workload:
    """The longest prompts, and as many at a time as decode together, but several."""
    return Workload(prompt=max(asked.tokens), requests=asked.decoding if asked.decoding > 1 else Workload.requests)


def compared(model: ModelConfig, group: Hardware, asked: Question) -> list[Row]:
    """A single device, its fastest one, and all ways to use all of them."""
    asked, found = replace(asked, tokens=(max(asked.tokens),)), list[Row]()
    for name, devices, layout, replicas in _ways(model, group, asked):
        part = replace(group, devices=devices)
        own = asked if len(devices) == group.world else replace(asked, shares=None)
        try:
            outlook = Outlook(model, part, own, layout and _by_speed(model, part, own, layout))
            planner = outlook.planner("auto", asked.wires[0])
            rating = rate(planner, load_of(asked), replicas)
            predicted = planner.expect(outlook.batch(asked.tokens[0]))
            saved = 1 - predicted.seconds / predicted.serial
            row = Row(group.text, name, len(devices) * replicas, rating, outlook.memory[asked.tokens[0]], saved)
        except NoMemory as error:
            row = Row(group.text, name, len(devices) * replicas, why=error.short)
        except InputError as error:
            row = Row(group.text, name, len(devices) * replicas, why=str(error))
        found.append(row)
    return found


def _ways(
    model: ModelConfig, group: Hardware, asked: Question
) -> Iterator[tuple[str, tuple[Device, ...], Layout | None, int]]:  # fmt: skip
    """Name, devices, layout (None: all layers over all of them) and replicas; these only of devices that are alike."""
    fastest = min(range(group.world), key=lambda rank: group.seconds_of(1.0, rank))
    alike = len(set(group.devices)) == 1
    yield ALONE if group.world > 1 else "alone", (group.devices[fastest],), None, 1
    for tp, pp, replicas in divisions(group.world, model.layers, model.heads) if group.world > 1 else ():
        if (replicas > 1 and not alike) or (asked.shares and (pp > 1 or replicas > 1)):
            continue
        words = ([f"tp {tp}"] if tp > 1 else []) + ([f"pp {pp}"] if pp > 1 else [])
        whole = " x ".join(words)
        name = whole if replicas == 1 else f"{replicas} replicas" + (f" of {whole}" if whole else "")
        layout = even_layout(model.layers, tp, pp) if pp > 1 else None
        yield name, group.devices[: tp * pp], layout, replicas


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


def conclusion(rows: Sequence[Row], asked: Question) -> str:
    """One sentence on what is best, and what more devices are worth beside a single one."""
    load = load_of(asked)
    fitting = [(row, row.rating) for row in rows if row.rating is not None]
    if not fitting:
        return "Nothing of this holds the model."
    said = []
    for aim, whom in ((LATENCY, "one request"), (THROUGHPUT, f"{load.requests} at a time")):
        row, rating = min(fitting, key=lambda each: each[1].cost(aim, load))
        unit = f"{rating.request(load):.3g} s" if aim == LATENCY else f"{rating.requests:.3g} requests/s"
        alone = next((r for c, r in fitting if c.hardware == row.hardware and c.layout == ALONE), None)
        if row.layout in (ALONE, "alone"):
            beside = ""
        elif alone is None:
            beside = "; one alone doesn't hold it"
        else:
            beside = f", {alone.cost(aim, load) / rating.cost(aim, load):.2g} times as fast as one alone"
        said.append(f"for {whom} {row.hardware} as {row.layout}: {unit}{beside}")
    tokens = f"{load.prompt} tokens and {load.answer} of answer"
    return f"Best ({tokens}, predicted) {'; '.join(said)}."
