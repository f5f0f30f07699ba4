"""Strategies as users write them, and the cuts that they mean for a batch.

    auto                 what the planner finds best for each batch, from measured costs (plan/search.py)
    serial               no overlap
    iso, iso:3, iso:2/4  attention's rows in N even chunks, the other stages' in N or M
    iso@300,700/150      cuts at these offsets of the flattened batch; after the slash, those of the other stages
    requests, requests:3 cut between sequences only, into groups of about equal size
    tiles, tiles:8       the last projection of each stage in K tiles; alone, or of each chunk: iso:2+tiles:4
    rs                   each sum as a reduce-scatter and an all-gather, with the norm on 1/N of the rows between
                         them; alone, or of each chunk: iso:4+rs
    iso:3+ahead          earlier chunks go ahead: a chunk starts a stage when the one before it starts the next stage
    pipe, pipe:8         pieces that go through all layers of a section one behind the other, so that each section of a
    pipe@300,700         pipeline has one; alone, or each cut again: pipe:4+iso:2

Knows text and offsets; the programs themselves are made in build.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from weft.errors import InputError
from weft.program.batch import Batch, Rows

# Positions. With --reproducible, cuts inside a sequence fall on multiples of it, and attention runs in blocks of it.
GRANULE = 128
AUTO = "auto"
SYNTAX = (
    "auto, serial, iso[:N[/M]], iso@CUT,…[/CUT,…], requests[:N], tiles[:K], rs, pipe[:N], pipe@CUT,…, "
    "iso or requests with +tiles, +rs or +ahead, and pipe with all of these but rs"
)


@dataclass(frozen=True)
class Strategy:
    """A parsed strategy; `str()` gives back its canonical text.

    `cuts` and `other_cuts` hold offsets (tokens) when they were written out, else the counts of chunks decide.
    `requests`: chunks are groups of whole sequences. `tiles`: of each chunk's last projection. `scattered`: sums
    are reduce-scatter and all-gather. `ahead`: earlier chunks are a stage ahead of later ones. `pieces`, `piece_cuts`:
    what goes through a section's layers one behind the other; chunks then are those of each piece.
    """

    chunks: int = 1
    other_chunks: int = 1
    tiles: int = 1
    cuts: tuple[int, ...] | None = None
    other_cuts: tuple[int, ...] | None = None
    requests: bool = False
    scattered: bool = False
    ahead: bool = False
    pieces: int = 1
    piece_cuts: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Reads the forms above. Raises `InputError` that lists them."""
        first, plus, rest = text.strip().partition("+")
        match = _PIECES.fullmatch(first)
        if match is None:
            return cls._parse(text, text.strip())
        inside = cls._parse(text, rest) if plus else cls()
        if inside.scattered:
            raise InputError(f"--overlap {text!r}: pieces' sums can't be scattered; leave out rs, or pipe")
        try:
            if match[1] == "@":
                return replace(inside, piece_cuts=_offsets(match[2]))
            return replace(inside, pieces=_count(match[2], 4))
        except ValueError:
            raise _unknown(text) from None

    @classmethod
    def _parse(cls, text: str, inside: str) -> Strategy:
        """What is cut inside a piece, or the batch. `text`: all that was given."""
        if inside == "serial":
            return cls()
        cutting, plus, added = inside.partition("+")
        if not plus and not cutting.startswith(("iso", "requests")):
            cutting, added = "", cutting
        try:
            strategy = _cut(cutting) if cutting or plus else cls()
            if plus or not cutting:
                strategy = _added(strategy, added)
        except ValueError:
            raise _unknown(text) from None
        alike = (strategy.chunks, strategy.cuts) == (strategy.other_chunks, strategy.other_cuts)
        if (strategy.scattered or strategy.ahead) and not alike:
            raise InputError(
                f"--overlap {text!r}: {added} needs the same cuts in every stage; leave out what follows the /"
            )
        return strategy

    def __str__(self) -> str:
        added = ("rs" if self.scattered else "", "ahead" if self.ahead else "")
        parts = (self._piping(), self._cutting(), self._tiling(), *added)
        return "+".join(part for part in parts if part) or "serial"

    @property
    def piped(self) -> bool:
        """Pieces go through a section one behind the other."""
        return self.pieces > 1 or self.piece_cuts is not None

    def _piping(self) -> str:
        if self.piece_cuts is not None:
            return f"pipe@{','.join(map(str, self.piece_cuts))}"
        return f"pipe:{self.pieces}" if self.pieces > 1 else ""

    def _cutting(self) -> str:
        if self.cuts is not None and self.other_cuts is not None:
            first, second = (",".join(map(str, cuts)) for cuts in (self.cuts, self.other_cuts))
            return f"iso@{first}" + (f"/{second}" if second != first else "")
        if self.requests:
            return f"requests:{self.chunks}"
        if (self.chunks, self.other_chunks) == (1, 1):
            return ""
        return f"iso:{self.chunks}" + (f"/{self.other_chunks}" if self.other_chunks != self.chunks else "")

    def _tiling(self) -> str:
        return f"tiles:{self.tiles}" if self.tiles > 1 else ""


_PIECES = re.compile(r"pipe(?:([:@])([\d,]+))?")
_CUT = re.compile(r"(iso|requests)(?:([:@])([\d,]+)(?:/([\d,]+))?)?")
_ADDED = re.compile(r"rs|ahead|tiles(?::(\d+))?")


def _unknown(text: str) -> InputError:
    return InputError(f"--overlap {text!r} is not a strategy; allowed: {SYNTAX} (counts from 1 to 64)")


def _cut(text: str) -> Strategy:
    """The part before a plus sign, where rows are cut. Raises ValueError."""
    match = _CUT.fullmatch(text)
    if match is None:
        raise ValueError
    name, mark, first, second = match.groups()
    if name == "requests":
        if mark == "@" or second is not None:
            raise ValueError
        count = _count(first, 2)
        return Strategy(chunks=count, other_chunks=count, requests=True)
    if mark == "@":
        cuts = _offsets(first)
        return Strategy(cuts=cuts, other_cuts=_offsets(second) if second else cuts)
    count = _count(first, 2)
    return Strategy(chunks=count, other_chunks=_count(second, count))


def _added(strategy: Strategy, text: str) -> Strategy:
    """The part that says how a chunk's sums travel. Raises ValueError."""
    match = _ADDED.fullmatch(text)
    if match is None:
        raise ValueError
    if text.startswith("tiles"):
        return replace(strategy, tiles=_count(match[1], 4))
    if text == "ahead":
        if strategy == Strategy():
            raise ValueError
        return replace(strategy, ahead=True)
    return replace(strategy, scattered=True)


def _count(text: str | None, default: int) -> int:
    count = default if text is None else int(text)
    if not 1 <= count <= 64:
        raise ValueError
    return count


def _offsets(text: str) -> tuple[int, ...]:
    offsets = tuple(int(part) for part in text.split(","))
    if list(offsets) != sorted(set(offsets)) or offsets[0] < 1:
        raise ValueError
    return offsets


def canonical(overlap: str) -> str:
    """What the user wrote, in the form that it is compared and shown in. Raises `InputError`."""
    return AUTO if overlap.strip() == AUTO else str(Strategy.parse(overlap))


@dataclass(frozen=True)
class Cuts:
    """Where the flattened batch is cut: offsets for ordered stages (attention) and for the others, tiles of a tail.

    `scattered`: sums are reduce-scatter and all-gather. `ahead`: earlier chunks are a stage ahead of later ones.
    `pieces`: those of the offsets between which what lies goes through a section's layers by itself.
    """

    ordered: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    tiles: int = 1
    scattered: bool = False
    ahead: bool = False
    pieces: tuple[int, ...] = ()


def place(strategy: Strategy, batch: Batch, granule: int = 1) -> Cuts:
    """The cuts that `strategy` means for `batch`.

    `granule`: a cut inside a sequence falls on a multiple of it, counted in positions of that sequence. Even
    cuts are moved there; raises `InputError` for a written cut that is elsewhere. Written cuts beyond the end of
    the batch do not apply to it.
    """
    pieces = _pieces_of(strategy, batch, granule)
    attention, others = (
        tuple(sorted({*pieces, *cuts})) for cuts in _offsets_of(strategy, batch, granule, (0, *pieces, batch.tokens))
    )
    ahead = strategy.ahead and len(attention) > len(pieces)
    return Cuts(attention, others, strategy.tiles, strategy.scattered, ahead, pieces)


def _pieces_of(strategy: Strategy, batch: Batch, granule: int) -> tuple[int, ...]:
    if strategy.piece_cuts is not None:
        return _written(batch, strategy.piece_cuts, granule)
    return _even(batch, Rows(0, batch.tokens), strategy.pieces, granule)


def _offsets_of(
    strategy: Strategy, batch: Batch, granule: int, edges: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """For attention and for the other stages. `edges`: of the pieces; written cuts are the batch's."""
    if strategy.cuts is not None and strategy.other_cuts is not None:
        return _written(batch, strategy.cuts, granule), _written(batch, strategy.other_cuts, granule)
    if strategy.requests:
        between = _between_sequences(batch, strategy.chunks)
        return between, between
    pieces = [Rows(*pair) for pair in pairwise(edges)]
    attention, others = (
        tuple(offset for rows in pieces for offset in _even(batch, rows, chunks, granule))
        for chunks in (strategy.chunks, strategy.other_chunks)
    )
    return attention, others


def _even(batch: Batch, rows: Rows, chunks: int, granule: int) -> tuple[int, ...]:
    each = rows.length / chunks
    wanted = {on_granule(batch, round(rows.start + each * i), granule) for i in range(1, chunks)}
    return tuple(offset for offset in sorted(wanted) if rows.start < offset < rows.stop)


def on_granule(batch: Batch, offset: int, granule: int) -> int:
    """The nearest offset that is a sequence's boundary or a multiple of `granule` of its positions."""
    for segment, span in zip(batch.segments, batch.spans, strict=True):
        if span.start < offset < span.stop:
            position = round((segment.start + offset - span.start) / granule) * granule
            return span.start + min(max(position, segment.start), segment.end) - segment.start
    return offset


def _written(batch: Batch, cuts: tuple[int, ...], granule: int) -> tuple[int, ...]:
    """The written cuts that fall inside this batch (a decoding step is shorter than the prompt they are for)."""
    inside = tuple(offset for offset in cuts if offset < batch.tokens)
    for offset in inside:
        if (nearest := on_granule(batch, offset, granule)) != offset:
            raise InputError(
                f"the cut {offset} is not on the granule of {granule} positions that --reproducible needs; "
                f"the nearest is {nearest}"
            )
    return inside


def _between_sequences(batch: Batch, groups: int) -> tuple[int, ...]:
    """The sequences' boundaries that come nearest to even groups."""
    boundaries = [span.stop for span in batch.spans[:-1]]
    if not boundaries:
        return ()
    wanted = (batch.tokens * i / groups for i in range(1, groups))
    return tuple(sorted({min(boundaries, key=lambda b, w=w: abs(b - w)) for w in wanted}))  # type: ignore[misc]


def chunks(rows: Rows, cuts: Sequence[int]) -> tuple[Rows, ...]:
    """Rows between the cuts that lie in them."""
    edges = (rows.start, *(cut for cut in cuts if rows.start < cut < rows.stop), rows.stop)
    return tuple(Rows(a, b) for a, b in pairwise(edges))
