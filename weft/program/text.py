"""The form of programs that people read, and write.

    chunks    a 0:512  b 512:1024  all 0:1024

    compute  embed         all
    compute  L0.attention  a
    reduce   L0.attention  a
    …
    78x
    compute  L1.attention  a  after reduce L0.mlp a
    reduce   L1.attention  a
    compute  L1.attention  b  after reduce L0.mlp b
    …
    1x
    compute  head          all  after reduce L79.mlp a, reduce L79.mlp b
    gather   head          all

What stands below `78x` is its first round; each further round is one layer on (`39x by 2 layers`: two). Rows may stand
in place of a chunk's letters. After them a step may say `wanted` (the wanted ones of its rows only), `on` a lane, `as`
a wire, `by` an algorithm, `for` which ranks (`0-3` or `0,2`) and, of a send, `to` which, and `after` which steps. A
step is named by its kind, stage and chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from weft.program.batch import Rows
from weft.program.stages import Kind, stage_name
from weft.program.steps import Block, Form, Program, ProgramError, Step

ALL = "all"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPTIONS = {"on": "on", "as": "wire", "by": "algorithm", "for": "ranks", "to": "to"}
SAID = ", ".join(["wanted", *(f"{name} …" for name in OPTIONS), "after …"])
MOST_RANKS = 4096  # that a step can name
MOST_STEPS = 1_000_000  # of all rounds: some hundred layers have some thousand

_Name = tuple[Kind, str, int | None, int]  # kind, part, layer, chunk


def write(program: Program) -> str:
    """The text of a program."""
    letters = _letters(program.rows) if program.rows else []
    chunks = "  ".join(f"{letter} {rows}" for letter, rows in zip(letters, program.rows, strict=True))
    return "".join(f"{line}\n" for line in (f"chunks  {chunks}", "", *_lines(program.form.blocks, letters)))


def write_expanded(program: Program) -> str:
    """The same with every round's steps written out, one line each, and rows for letters."""
    steps = tuple(issued.step._replace(layer=issued.layer) for issued in program)
    return "".join(f"{line}\n" for line in _lines((Block(steps),), [str(rows) for rows in program.rows]))


def _letters(chunks: Sequence[Rows]) -> list[str]:
    whole = Rows(min(rows.start for rows in chunks), max(rows.stop for rows in chunks))
    names, number = [], 0
    for rows in chunks:
        if rows == whole:
            names.append(ALL)
        else:
            names.append(_letter(number))
            number += 1
    return names


def _letter(number: int) -> str:
    """a to z, a1 to z1, a2, …"""
    times, place = divmod(number, len(LETTERS))
    return LETTERS[place] + (str(times) if times else "")


def _lines(blocks: Sequence[Block], chunks: Sequence[str]) -> Iterator[str]:
    steps = [step for block in blocks for step in block.steps]
    widths = [
        max(len(text) for text in column)
        for column in zip(*(_words(step, step.layer, chunks) for step in steps), strict=True)
    ]
    before: list[tuple[Step, int | None]] = []  # all rounds' steps, with their layers
    for number, block in enumerate(blocks):
        if number or block.rounds > 1:
            yield f"{block.rounds}x" + (f" by {block.layers} layers" if block.layers != 1 else "")
        for step in block.steps:
            words = zip(_words(step, step.layer, chunks), widths, strict=True)
            names = [" ".join(_words(*before[len(before) - distance], chunks)) for distance in step.after]
            line = [*(f"{word:<{width}}" for word, width in words), *_options(step)]
            yield "  ".join([*line, *(["after " + ", ".join(names)] if names else [])]).rstrip()
            before.append((step, step.layer))
        before += [
            (step, step.later(block.layers * later).layer) for later in range(1, block.rounds) for step in block.steps
        ]


def _words(step: Step, layer: int | None, chunks: Sequence[str]) -> tuple[str, str, str]:
    return str(step.kind), stage_name(step.part, layer), chunks[step.chunk]


def _options(step: Step) -> Iterator[str]:
    if step.wanted:
        yield "wanted"
    for word, field in OPTIONS.items():
        if value := getattr(step, field):
            yield f"{word} {value if isinstance(value, str) else _ranges(value)}"


def _ranges(ranks: Sequence[int]) -> str:
    """`0-3` for 0, 1, 2, 3; `0,2` for those two."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _ranks(text: str) -> tuple[int, ...]:
    """What `_ranges` wrote."""
    if not _RANKS.fullmatch(text):
        raise ProgramError(f"{text!r} are no ranks; some look like '0-3' or '0,2'")
    pairs = [(int(first), int(last or first)) for first, _, last in (run.partition("-") for run in text.split(","))]
    if any(last - first >= MOST_RANKS for first, last in pairs):
        raise ProgramError(f"{text!r} are more than {MOST_RANKS} ranks")
    ranks = [rank for first, last in pairs for rank in range(first, last + 1)]
    if any(last < first for first, last in pairs) or ranks != sorted(set(ranks)):
        raise ProgramError(f"the ranks {text!r} don't rise; write each once, as in '0-3' or '0,2'")
    return tuple(ranks)


def parse(text: str) -> Program:
    """Reads a program; blank lines and what follows a `#` are ignored.

    Raises `ProgramError` with the line number for anything that is no program's line, that has a name twice, or that
    waits for a step which does not stand before it, or not as far before it in every round.
    """
    reading = _Reading()
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if line:
            try:
                reading.line(line)
            except ProgramError as error:
                raise ProgramError(f"line {number}: {error}") from None
    return reading.program()


_ROWS = re.compile(r"(\d{1,9}):(\d{1,9})")
_STAGE = re.compile(r"(?:L(\d{1,9})\.)?([^\W\d]\w*)")
_LETTER = re.compile(r"[^\W\d]\w*")
_RANKS = re.compile(r"\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?)*")
_ROUNDS = re.compile(r"(\d{1,9})x(?:\s+by\s+(\d{1,9})\s+layers?)?")


class _Reading:
    """What was read so far. `chunks`: numbers by rows; `places`: of all steps of all rounds, by name."""

    def __init__(self) -> None:
        self.letters: dict[str, Rows] = {}
        self.chunks: dict[Rows, int] = {}
        self.blocks: list[Block] = []
        self.steps: list[Step] = []
        self.repeated = 1, 1  # rounds and layers of the block that is read
        self.names: list[_Name] = []
        self.places: dict[_Name, int] = {}

    def line(self, line: str) -> None:
        if line.startswith("chunks "):
            self._chunks(line.split()[1:])
        elif match := _ROUNDS.fullmatch(line):
            self._block()
            self.repeated = int(match[1]), int(match[2] or 1)
            if 0 in self.repeated:
                raise ProgramError(f"{line!r} repeats nothing; a block is there once at least, 1x by 1 layer")
        else:
            self._step(line)

    def _chunks(self, words: list[str]) -> None:
        if len(words) % 2:
            raise ProgramError("chunks are a letter and rows each, such as 'chunks a 0:512 b 512:1024'")
        for letter, rows in zip(words[::2], words[1::2], strict=True):
            if not _LETTER.fullmatch(letter):
                raise ProgramError(f"{letter!r} is no name for a chunk; one begins with a letter")
            self.letters[letter] = self._rows(rows)
            self._chunk(letter)

    def _rows(self, text: str) -> Rows:
        match = _ROWS.fullmatch(text)
        if match is None:
            raise ProgramError(f"{text!r} are no rows; some look like '0:512'")
        rows = Rows(int(match[1]), int(match[2]))
        if not rows.length > 0:
            raise ProgramError(f"the rows {rows} are empty")
        return rows

    def _chunk(self, text: str) -> int:
        if text not in self.letters and not _ROWS.fullmatch(text):
            raise ProgramError(f"{text!r} is no chunk; name its rows, or its letter in a line 'chunks {text} 0:512'")
        return self.chunks.setdefault(self.letters.get(text) or self._rows(text), len(self.chunks))

    def _step(self, line: str) -> None:
        text, _, after = line.partition(" after ")
        words = text.split()
        if len(words) < 3 or line.endswith(" after"):
            raise ProgramError(f"{line!r} is not a step; one looks like 'reduce L3.attention 0:512'")
        name = self._name(words[:3])
        if name in self.places:
            raise ProgramError(f"the program already has the step {' '.join(words[:3])!r}")
        edges = tuple(self._edge(each.split()) for each in after.split(",")) if after else ()
        self.steps.append(Step(*name, after=edges, **self._options(words[3:])))
        self._named(name)

    def _named(self, name: _Name) -> None:
        self.places[name] = len(self.names)
        self.names.append(name)

    def _name(self, words: list[str]) -> _Name:
        kind, stage, chunk = words
        match = _STAGE.fullmatch(stage)
        if kind not in Kind.__members__.values():
            raise ProgramError(f"unknown kind {kind!r}; known are {', '.join(Kind)}")
        if match is None:
            raise ProgramError(f"{stage!r} is not a stage; one looks like 'L3.attention'")
        return Kind(kind), match[2], int(match[1]) if match[1] else None, self._chunk(chunk)

    def _edge(self, words: list[str]) -> int:
        if len(words) != 3:
            raise ProgramError(f"{' '.join(words)!r} is not a step's name; one looks like 'reduce L3.attention 0:512'")
        place = self.places.get(self._name(words))
        if place is None:
            raise ProgramError(f"waits for {' '.join(words)!r}, which does not stand before it")
        return len(self.names) - place

    def _options(self, words: list[str]) -> dict[str, Any]:
        """What a step says beyond its name."""
        said: dict[str, Any] = {}
        while words:
            word, *words = words
            if word == "wanted":
                said[word] = True
            elif word in OPTIONS and words:
                value, *words = words
                if OPTIONS[word] in said:
                    raise ProgramError(f"{word!r} is said twice")
                said[OPTIONS[word]] = _ranks(value) if OPTIONS[word] in ("ranks", "to") else value
            else:
                raise ProgramError(f"{word!r} is nothing that a step says; after its chunk may stand: {SAID}")
        return said

    def _block(self) -> None:
        """Ends the block that is read: the names of its further rounds are known from here on."""
        rounds, layers = self.repeated
        if not self.steps:
            return
        if len(self.names) + (rounds - 1) * len(self.steps) > MOST_STEPS:
            raise ProgramError(
                f"with {rounds} rounds of {len(self.steps)} steps the program has over {MOST_STEPS} steps"
            )
        block = Block(tuple(self.steps), rounds, layers)
        begin = len(self.names) - len(self.steps)
        for number in range(1, rounds):
            for step in block.steps:
                later = step.later(layers * number)
                self._named((later.kind, later.part, later.layer, later.chunk))
        self._demand_alike(block, begin)
        self.blocks.append(block)
        self.steps = []

    def _demand_alike(self, block: Block, begin: int) -> None:
        """What a step waits for stands as far before it in every round."""
        length = len(block.steps)
        for number in range(1, min(block.rounds, block.reach // length + 2)):
            for place, step in enumerate(block.steps):
                for distance in step.after:
                    at = begin + place - distance
                    kind, part, layer, chunk = self.names[at]
                    later = layer if layer is None else layer + block.layers * number
                    if self.names[at + number * length] != (kind, part, later, chunk):
                        waited = f"{kind} {stage_name(part, layer)}"
                        raise ProgramError(
                            f"what {step.kind} {stage_name(step.part, step.layer)} waits for, {waited}, stands "
                            f"elsewhere in round {number + 1}; write the rounds before that as a block of their own"
                        )

    def program(self) -> Program:
        self._block()
        offsets = tuple(sorted({offset for rows in self.chunks for offset in rows}))
        number = {offset: place for place, offset in enumerate(offsets)}
        chunks = tuple((number[rows.start], number[rows.stop]) for rows in self.chunks)
        return Program(Form(tuple(self.blocks), chunks), offsets)
