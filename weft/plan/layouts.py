"""Which layouts so many ranks may have, what each is predicted to give, and which one is best for what is wanted.

Knows planners and seconds; knows nothing of memory, or of how costs were found. No torch.

One prompt alone shows the time to the first token. Under a load of many requests, prompts and tokens of answers share
the ranks: a batch has a token of each sequence that runs, and now and then a prompt beside them. In a pipeline as many
batches as there are sections are under way, and the busiest section, or a round with its way back, is what they wait
for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from weft.errors import InputError
from weft.layout import Layout, even_layers
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment, one_prompt
from weft.units import digits, duration

LATENCY, THROUGHPUT = "latency", "throughput"
AIMS = (LATENCY, THROUGHPUT)
ROWS = 2048  # of prompts, from which on more of them in a batch save nothing


@dataclass(frozen=True)
class Workload:
    """What a layout is judged by: tokens of a prompt and of its answer, and requests that run at a time."""

    prompt: int = 1024
    answer: int = 128
    requests: int = 8

    def within(self, length: int) -> Workload:
        """As far as a context of so many tokens goes."""
        prompt = min(self.prompt, max(1, length - 2))
        return replace(self, prompt=prompt, answer=max(1, min(self.answer, length - prompt - 1)))


@dataclass(frozen=True)
class Aim:
    """What a layout is chosen for: the shortest request, or most of them. `replicas`: several groups may be chosen."""

    what: str = LATENCY
    load: Workload = Workload()
    replicas: bool = False

    @classmethod
    def parse(cls, text: str) -> Aim:
        """Reads `latency`, `throughput`, and the tokens of a prompt and an answer behind a colon, as in
        latency:2048,64. Raises `InputError`."""
        what, colon, tokens = text.strip().partition(":")
        match = re.fullmatch(r"(\d{1,7}),(\d{1,7})", tokens)
        if what not in AIMS or (colon and match is None) or (match and 0 in map(int, match.groups())):
            raise InputError(
                f"--optimise {text!r} is not known; give {' or '.join(AIMS)}, with the tokens of a prompt and of its "
                "answer if you like, as in latency:2048,64"
            )
        return cls(what, Workload(int(match[1]), int(match[2])) if match else Workload())

    def describe(self, rating: Rating) -> str:
        """What counts of a rating."""
        if self.what == LATENCY:
            return duration(rating.request(self.load))
        return f"{digits(rating.requests)} requests/s"


@dataclass(frozen=True)
class Rating:
    """Seconds to the first token of a lone prompt (`bound`: what no schedule goes below) and between the tokens of a
    lone answer, and requests a second under a load, of all replicas."""

    first_token: float
    bound: float
    token: float
    requests: float

    def request(self, load: Workload) -> float:
        """Seconds of a lone request."""
        return self.first_token + (load.answer - 1) * self.token

    def cost(self, aim: str, load: Workload) -> float:
        """The lower, the better for this aim."""
        return self.request(load) if aim == LATENCY else 1 / self.requests


def divisions(world: int, layers: int, heads: int) -> Iterator[tuple[int, int, int]]:
    """Ranks of a section, sections, and replicas that use all of so many ranks; or, where sections are ranks of
    different machines, leave none idle."""
    for tp in range(1, min(world, heads) + 1):
        for pp in range(1, min(world // tp, layers) + 1):
            if world % (tp * pp) == 0:
                yield tp, pp, world // (tp * pp)


def even_layout(layers: int, tp: int, pp: int, shares: Sequence[float] = ()) -> Layout:
    """Sections of as many layers each, of so many ranks. `shares`: of all ranks; equal ones without."""
    given = tuple(shares) or (1.0,) * (tp * pp)
    return Layout(even_layers(layers, pp), tuple(given[first : first + tp] for first in range(0, tp * pp, tp)))


def rate(planner: Planner, load: Workload, replicas: int = 1) -> Rating:
    """What a planner's layout is predicted to give. There must be costs."""
    prompt = planner.expect(one_prompt(load.prompt))
    alone = _round_of(planner, load, 1)
    several = -(-load.requests // replicas)  # of one that has most of them
    requests = _requests(planner, load, several) * load.requests / several
    return Rating(prompt.seconds, prompt.bound, alone, requests)


def _requests(planner: Planner, load: Workload, sequences: int) -> float:
    """Requests a second of so many at a time. In as many rounds as an answer has tokens, each gets its prompt once:
    that many rounds have prompts in them, several where answers are short, and the others have none."""
    flights = min(_sections(planner), sequences)
    each = -(-sequences // flights)
    together = max(1, min(each // load.answer, ROWS // load.prompt))
    rounds = each / together
    first, others = tuple(Segment(slot, 0, load.prompt) for slot in range(together)), _decoding(load, each - together)
    mixed = _round(planner, Batch((*first, *(replace(s, sequence=together + s.sequence) for s in others))), flights)
    plain = _round_of(planner, load, sequences) if load.answer > rounds else 0.0
    return sequences / (rounds * mixed + max(0.0, load.answer - rounds) * plain)


def layouts_of(world: int, layers: int, heads: int) -> list[Layout]:
    """All in which so many ranks share one model, each with equal parts."""
    splits = ((tp, pp) for tp, pp, replicas in divisions(world, layers, heads) if replicas == 1)
    return [even_layout(layers, tp, pp) for tp, pp in splits]


def _round_of(planner: Planner, load: Workload, sequences: int) -> float:
    """Seconds in which all of so many sequences get a token."""
    flights = min(_sections(planner), sequences)
    return _round(planner, Batch(_decoding(load, -(-sequences // flights))), flights)


def _round(planner: Planner, batch: Batch, flights: int) -> float:
    """Seconds in which so many batches like this one come back."""
    expected = planner.expect(batch)
    if _sections(planner) == 1:
        return expected.seconds
    assert planner.costs is not None, "a layout is judged by costs"
    way_back = planner.costs.wires[planner.wires[-1]].send.at(0.0)
    return max(expected.seconds + way_back, flights * expected.lanes.compute)


def _decoding(load: Workload, sequences: int) -> tuple[Segment, ...]:
    """Of so many sequences, half of whose answers are there."""
    start = load.prompt + load.answer // 2
    return tuple(Segment(slot, start, 1) for slot in range(sequences))


def _sections(planner: Planner) -> int:
    return len(planner.layout.sections) if planner.layout is not None else 1
