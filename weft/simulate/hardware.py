"""The catalogue of hardware, and costs that follow from its figures: rooflines, hops and bytes.

What has such costs was not measured here: whoever shows them says "predicted". Knows makers' figures and shapes of
shards; knows nothing of checkpoints or machines at hand.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from weft.errors import InputError
from weft.parallel.sizes import LIKELIEST_BYTES, NUMBER_BYTES, row_bytes
from weft.simulate.cost import ComputeCosts, Contention, Costs, Table, WireCosts

PACKAGED = Path(__file__).with_name("catalogue.toml")
SMALL_SUM = 64 * 1024  # bytes up to which a sum is small
HIGHEST = 1e6  # rows or bytes at which tables end; they go on straight
_DTYPES = {size: dtype for dtype, size in NUMBER_BYTES.items()}


class Assumed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What no maker states: parts of the stated rates that are reached, seconds of each stage beside its work, and
    the part of its speed that computation loses beside a collective; seconds until a computation that waited for one
    goes on; how many times as fast large products are with weights of few bits."""

    efficiency: float
    memory_efficiency: float
    step: float
    share: float
    wake: float = 0.0
    int8: float = 1.0
    int4: float = 1.0


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device. `tflops` dense, `memory` in GiB, `bandwidth` of it in GB/s. `cores`: of a CPU; 0 for a GPU. `key`:
    its name in the catalogue.

    What is None is taken from the catalogue's assumptions.
    """

    name: str
    tflops: float
    memory: float
    bandwidth: float
    link: str
    source: str
    cores: int = 0
    efficiency: float | None = None
    memory_efficiency: float | None = None
    step: float | None = None
    share: float | None = None
    key: str = ""

    @property
    def itemsize(self) -> int:
        """Bytes of a number there: GPUs compute in bfloat16, CPUs in float32."""
        return 4 if self.cores else 2


class Interconnect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What joins ranks. `rate`: GB/s each way for each rank; `hop`: seconds of an empty message.

    Measured ones have a table: `sum_us` and `hop_us` against `bytes` of the whole partial, for so many `ranks`;
    `fused` ones take the norm along.
    """

    rate: float
    efficiency: float
    hop: float
    source: str
    ranks: int | None = None
    fused: bool = False
    bytes: list[float] = []
    sum_us: list[float] = []
    hop_us: list[float] = []

    @property
    def reached(self) -> float:
        """Bytes a second each way."""
        return self.rate * self.efficiency * 1e9

    def faster(self, factor: float) -> Interconnect:
        """The same link at another rate."""
        return msgspec.structs.replace(self, rate=self.rate * factor, bytes=[], sum_us=[], hop_us=[], ranks=None)


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices and links by name."""

    assumed: dict[str, Assumed]
    device: dict[str, Device]
    link: dict[str, Interconnect]

    def assumption(self, device: Device, name: str) -> float:
        """What the device states itself, or its kind's assumption."""
        own = getattr(device, name, None)
        return float(own if own is not None else getattr(self.assumed["cpu" if device.cores else "gpu"], name))


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    """A user's own file: any part of a catalogue."""

    assumed: dict[str, Assumed] = {}
    device: dict[str, Device] = {}
    link: dict[str, Interconnect] = {}


@cache
def catalogue(own: Path | None = None) -> Catalogue:
    """The packaged catalogue with a user's own entries over it. Raises `InputError` that names what is wrong there."""
    packaged = msgspec.convert(tomllib.loads(PACKAGED.read_text("utf-8")), Catalogue)
    if own is None:
        return packaged
    try:
        entries = msgspec.convert(tomllib.loads(own.read_text("utf-8")), _Entries)
    except OSError as error:
        raise InputError(f"--catalogue {own} can't be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise InputError(f"--catalogue {own}: {error}; docs/predictions.md shows an entry") from None
    merged = Catalogue(
        packaged.assumed | entries.assumed, packaged.device | entries.device, packaged.link | entries.link
    )
    for name, device in entries.device.items():
        _known(device.link, merged.link, f"--catalogue {own}: device {name}: link")
        if min(device.tflops, device.memory, device.bandwidth) <= 0:
            raise InputError(f"--catalogue {own}: device {name}: tflops, memory and bandwidth must be above 0")
    for name, link in entries.link.items():
        if min(link.rate, link.efficiency) <= 0:
            raise InputError(f"--catalogue {own}: link {name}: rate and efficiency must be above 0")
    return merged


@dataclass(frozen=True)
class Hardware:
    """Ranks, one device each, and what joins them."""

    text: str
    devices: tuple[Device, ...]
    link_name: str
    link: Interconnect
    source: Catalogue

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.devices)

    def seconds_of(self, flops: float, rank: int) -> float:
        """Of so many operations in large matrix products on one rank."""
        device = self.devices[rank]
        return flops / (device.tflops * 1e12 * self.source.assumption(device, "efficiency"))


def parse_hardware(text: str, link: str | None = None, own: Path | None = None) -> Hardware:
    """Reads "4x rtx4090" or "1x rtx4090 + 2x rtx3090", and a link by name or speed ("10gbit").

    Raises `InputError` with the nearest names for what is not in the catalogue.
    """
    entries = catalogue(own)
    devices: list[Device] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d+)\s*[xX]\s+|(\d+)\s*[xX])?\s*([\w.-]+)", part.strip())
        if match is None:
            raise InputError(f"--hardware {text!r} is not a group; write it like '4x rtx4090' or '1x l4 + 1x a10g'")
        count = int(match[1] or match[2] or 1)
        if not 1 <= count <= 256:
            raise InputError(f"--hardware {text!r}: give 1 to 256 devices")
        key = _known(match[3], entries.device, "--hardware")
        devices += [msgspec.structs.replace(entries.device[key], key=key)] * count
    name = link or devices[0].link
    return Hardware(text, tuple(devices), name, _link(name, len(devices), entries), entries)


def _link(name: str, ranks: int, entries: Catalogue) -> Interconnect:
    speed = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit)", name)
    if speed and float(speed[1]) > 0:
        rate = float(speed[1]) / (8 if speed[2] == "gbit" else 8000)
        return Interconnect(
            rate, entries.link["ethernet-10g"].efficiency, entries.link["ethernet-10g"].hop, "the user's speed"
        )
    link = entries.link[_known(name, entries.link, "--link", " or a speed such as 10gbit")]
    if link.ranks is not None and link.ranks != ranks:
        raise InputError(f"--link {name} was measured with {link.ranks} ranks, and there are {ranks}; choose another")
    return link


def _known(name: str, names: Any, option: str, more: str = "") -> str:
    """The name, in lower case without spaces. Raises `InputError` with the nearest ones."""
    plain = name.lower().replace(" ", "")
    if plain in names:
        return plain
    near = get_close_matches(plain, names, n=3, cutoff=0.4) or sorted(names)[:3]
    raise InputError(f"{option} {name!r} is not known; nearest: {', '.join(near)}{more}; weft plan --list shows all")


@dataclass(frozen=True)
class Products:
    """A stage's matrix products on one rank, by their inputs and outputs: up to the last projection, and that one.

    `moved`: numbers of a row that are read and written beside them.
    """

    first: tuple[int, int] = (0, 0)
    last: tuple[int, int] = (0, 0)
    moved: float = 0.0


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model: products by part of a layer (`layer`) and of the output head. `scored`: the part that
    looks at earlier rows; `queries`, `keys`: numbers of its query heads and of its key/value heads in a row. `windows`,
    `kept`: see `ComputeCosts`; `aside`: see `Costs`."""

    hidden: int
    layer: tuple[tuple[str, Products], ...]
    head: tuple[str, Products]
    before: tuple[str, ...]
    scored: str
    queries: int
    keys: int
    windows: tuple[tuple[int | None, float], ...] = ()
    aside: tuple[tuple[str, int], ...] = ()
    kept: float = 1.0


@dataclass(frozen=True)
class Keeping:
    """What weights are kept in, and bytes of a number of a matrix, of the head, and of keys and values (which take as
    long to attend to in any format: they are made floats)."""

    weights: str
    matrix: float
    head: float
    key: float


def costs_of(
    group: Hardware, shards: Sequence[Shard], wires: Sequence[str], keeping: Keeping | None = None, tp: int = 0
) -> Costs:  # fmt: skip
    """What steps cost on this hardware. `keeping`: where that isn't what the devices compute in; `tp`: ranks that a sum
    is over, where it isn't over all. Raises KeyError for a wire that is not known."""
    dtype, hidden = _DTYPES[group.devices[0].itemsize], shards[0].hidden
    ranks = tuple(_rank(group, device, shard, keeping) for device, shard in zip(group.devices, shards, strict=True))
    same = len({(d, s) for d, s in zip(group.devices, shards, strict=True)}) == 1
    device = group.devices[0]
    part = group.source.assumption(device, "share") / max(1, device.cores)
    elements = {name: row_bytes(name, dtype, hidden) / hidden for name in wires}
    ways = {name: _wire(group.link, tp or group.world, element) for name, element in elements.items()}
    contention = Contention(part=part, wake=group.source.assumption(device, "wake"))
    aside = dict(shards[0].aside)
    return Costs(
        ranks[:1] if same else ranks, ways, contention, hidden, LIKELIEST_BYTES, group.world, aside=aside
    )  # fmt: skip


def _rank(group: Hardware, device: Device, shard: Shard, keeping: Keeping | None) -> ComputeCosts:
    size = device.itemsize
    kept = keeping or Keeping(_DTYPES[size], size, size, size)
    few = {name: group.source.assumption(device, name) for name in ("int8", "int4")}
    faster, head_faster = few.get(kept.weights, 1.0), few["int8"] if kept.weights in few else 1.0
    roof = _Roof(
        device.tflops * 1e12 * group.source.assumption(device, "efficiency"),
        device.bandwidth * 1e9 * group.source.assumption(device, "memory_efficiency"),
        group.source.assumption(device, "step"), device.itemsize,
    )  # fmt: skip
    norm = 4 * shard.hidden  # numbers read and written: input, residual, both again
    pair = 4 * shard.queries / roof.flops
    (name, head), nothing = shard.head, Table((1.0,), (0.0,))
    body = dict.fromkeys(shard.before, roof.moved(2 * shard.hidden))
    body[name] = roof.product(*head.first, norm, 1.0, kept.head, head_faster)
    tail = dict.fromkeys(body, nothing)
    for part, products in shard.layer:
        body[part] = roof.product(*products.first, norm + products.moved, 0.7, kept.matrix, faster)
        tail[part] = roof.product(*products.last, 0, 0.3, kept.matrix, faster)
    return ComputeCosts(
        body=body, tail=tail, enter=roof.moved(norm, 0.0), present=Table.line(pair / 2, 0.0), past=pair,
        one=2 * shard.keys * roof.itemsize / roof.bandwidth, begin=nothing, windows=shard.windows, scored=shard.scored,
        kept=shard.kept,
    )  # fmt: skip


@dataclass(frozen=True)
class _Roof:
    """A device's roofline: operations and bytes a second that are reached, seconds of a stage beside them."""

    flops: float
    bandwidth: float
    step: float
    itemsize: int

    def product(self, inputs: int, outputs: int, moved: float, part: float, size: float, faster: float) -> Table:
        """A product with a weight of these sides and of `size` bytes a number, and `moved` numbers of a row beside it.
        `part`: of the step's seconds; `faster`: than with weights that are what is computed in.

        A few rows take as long as reading the weight, many as long as their operations.
        """
        weight = inputs * outputs * size / self.bandwidth
        a_row = 2 * inputs * outputs / (self.flops * faster)
        beside = moved * self.itemsize / self.bandwidth
        if not inputs * outputs:
            return Table.line(self.step * part, 0.0)
        knee = weight / a_row
        fixed = self.step * part
        return Table(
            (0.0, knee, max(HIGHEST, 2 * knee)),
            (fixed + weight, fixed + weight + beside * knee, fixed + (a_row + beside) * max(HIGHEST, 2 * knee)),
        )

    def moved(self, numbers: int, part: float = 0.5) -> Table:
        """Only memory is read and written."""
        return Table.line(self.step * part, numbers * self.itemsize / self.bandwidth)


def _wire(link: Interconnect, world: int, element: float) -> WireCosts:
    """`world`: ranks that a sum is over; rows go on to the next section in one message."""
    send = Table.line(link.hop, 1 / link.reached)
    if world == 1:
        return WireCosts({"exchange": Table.line(0.0, 0.0)}, SMALL_SUM, Table.line(0.0, 0.0), element, send=send)
    if link.bytes:
        a_sum, a_hop = (
            Table(tuple(link.bytes), tuple(us * 1e-6 for us in column)) for column in (link.sum_us, link.hop_us)
        )
        return WireCosts({"two-shot": a_sum}, 0.0, a_hop, element, link.fused, send=send)
    a_byte = 1 / link.reached
    each = (world - 1) / world  # of the partial, in each of two hops; two ranks swap all of it in one
    sums = {"exchange": Table.line(link.hop, a_byte)} if world <= 2 else {
        "one-shot": Table.line(link.hop, (world - 1) * a_byte),
        "two-shot": Table.line(2 * link.hop, 2 * each * a_byte),
    }  # fmt: skip
    return WireCosts(sums, SMALL_SUM, Table.line(link.hop, each * a_byte), element, link.fused, send=send)
