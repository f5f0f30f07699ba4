"""Chooses the next token from logits, or scores the one that is given, where each rank has its slice of a vocabulary.

A choice is a talk of the ranks: each says a few numbers of its slice, hears those of all others, and decides as they
do; a row of logits never travels. So every rank knows what was chosen, and one rank alone is the same talk without
others.

    greedy                  one round: each slice's likeliest token
    temperature             two more: each slice's mass, then the token, from the slice that has it
    top-p, top-k up to 32   one more where what they leave is among the 32 likeliest tokens, 520 bytes a row
    top-p else              one more than temperature, and two for each draw that is refused
    top-k else              two more for up to 64, else five: histograms of a probability's bytes, 8 KiB a row
    penalties, grammars     one more; each slice has its own part of them
    log-probabilities       two more

Stateless: a choice depends on the logits, the request's wishes, its tokens so far, and (seed, index); so it is the
same after a restart and beside any other request. A row that can't be chosen from says why, and concerns no other.
Knows nothing of sequences or text.

Shapes: V vocabulary, W a slice of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from weft.execute.draws import Ask, Slice, Told, draw
from weft.execute.protocol import Choice, Chosen

Exchange = Callable[[Tensor], Sequence[Tensor]]  # float64 numbers of this rank -> those of all
Talk = Generator[Ask, Told, Chosen]


def likeliest(logits: Tensor, first: int) -> Tensor:
    """Of each row of a slice [rows, W] its largest logit and that one's token, [rows, 2] in float64."""
    if not logits.shape[1]:  # more ranks than a vocabulary is divided into
        return torch.tensor([[-math.inf, 0.0]]).double().repeat(logits.shape[0], 1)
    # On a CPU torch's own looks for one index at a time; numpy's, twelve times as fast, for a vector of them.
    places = torch.from_numpy(logits.numpy().argmax(axis=1)) if logits.device.type == "cpu" else logits.argmax(dim=1)
    return torch.stack([logits.gather(1, places[:, None])[:, 0].double(), places.double() + first], dim=1)


def sample(
    logits: Tensor, choices: Sequence[Choice], part: Slice | None = None, told: Sequence[Tensor] | None = None,
    exchange: Exchange = lambda numbers: [numbers],
) -> list[Chosen]:  # fmt: skip
    """One token for each row of `logits` [rows, W] (float32), the same on every rank.

    `told`: `likeliest` of every rank, in rank order. Without `part` this rank has all of the vocabulary.
    """
    part = part or Slice(0, 0, logits.shape[1], logits.shape[1])
    told = told if told is not None else [likeliest(logits, part.first)]
    talks: dict[int, Talk] = {}
    chosen = [Chosen(0)] * len(choices)
    for row, (choice, *said) in enumerate(zip(choices, *(each.tolist() for each in told), strict=True)):
        best = max(said, key=lambda each: (math.isnan(each[0]), each[0]))  # of equal ones the first
        if not math.isfinite(best[0]):
            chosen[row] = _REFUSED
        elif choice == _GREEDY:
            chosen[row] = Chosen(int(best[1]))
        else:
            talks[row] = _talk(logits[row], choice, part, int(best[1]), best[0])
    _converse(talks, chosen, exchange)
    return chosen


_GREEDY = Choice()
_REFUSED = Chosen(0, error="the model computed numbers that are none (not finite) for this request")


def _converse(talks: dict[int, Talk], chosen: list[Chosen], exchange: Exchange) -> None:
    """Goes on with all talks, round by round, until each has chosen. A round's numbers travel together."""
    asks = _go_on(talks, dict.fromkeys(talks), chosen)
    while asks:
        said = torch.tensor([number for ask in asks.values() for number in _say(ask)], dtype=torch.float64)
        heard = [numbers.tolist() for numbers in exchange(said)]
        told: dict[int, Told | None] = {}
        at = 0
        for row, ask in asks.items():
            end = at + 1 + ask.length
            if all(numbers[at] for numbers in heard):
                told[row] = [numbers[at + 1 : end] for numbers in heard]
            else:
                chosen[row] = Chosen(0, error="its next token could not be chosen (a rank failed at its part of it)")
            at = end
        asks = _go_on(talks, told, chosen)


def _say(ask: Ask) -> Sequence[float]:
    """This rank's numbers, with 1 before them, or 0 where they could not be had: all hear that, and give up."""
    try:
        return (1.0, *ask.numbers())
    except Exception:  # whatever it is, it is this row's alone
        return (0.0,) * (1 + ask.length)


def _go_on(talks: dict[int, Talk], told: dict[int, Told | None], chosen: list[Chosen]) -> dict[int, Ask]:
    """What the talks want to know next; those that have chosen are over."""
    asks: dict[int, Ask] = {}
    for row, numbers in told.items():
        try:
            asks[row] = talks[row].send(numbers)  # type: ignore[arg-type]  # None begins a talk
        except StopIteration as over:
            chosen[row] = over.value
        except Exception as error:  # whatever it is, it is this row's alone; and as all decide alike, all ranks have it
            chosen[row] = Chosen(0, error=f"its next token could not be chosen ({type(error).__name__}: {error})")
    return asks


def _talk(raw_W: Tensor, choice: Choice, part: Slice, token: int, highest: float) -> Talk:
    """One row's choice. `token`, `highest`: the likeliest one of all slices, before anything is changed."""
    logits, top = raw_W, highest
    if not (choice.given is not None or _untouched(choice)):
        logits, token, top = yield from _penalised(raw_W, choice, part)
    if choice.given is not None:
        token = choice.given
    elif choice.temperature > 0:
        token = yield from draw(logits, choice, part, top)
    if choice.logprobs is None:
        return Chosen(token)
    return (yield from _scored(raw_W, choice.logprobs, part, token, highest))


def _untouched(choice: Choice) -> bool:
    return not (choice.banned or choice.prompt or choice.output or choice.allowed or choice.bias)


def _penalised(raw_W: Tensor, choice: Choice, part: Slice) -> Generator[Ask, Told, tuple[Tensor, int, float]]:
    """Changed logits, with the likeliest token and its logit."""
    free = _Changed(raw_W, choice, part)
    told = yield Ask(4, lambda: [*free.best, *free.best_banned])
    banned = not any(said[0] > -math.inf for said in told)  # a grammar that is over allows nothing but the end
    top, token = max((said[2:] if banned else said[:2] for said in told), key=lambda each: each[0])
    if top == -math.inf:
        raise ValueError("no token is allowed")
    return free.with_banned if banned else free.logits, int(token), top


class _Changed:
    """A slice's logits under a choice's penalties, bias and grammar; computed where they are asked for first."""

    def __init__(self, raw_W: Tensor, choice: Choice, part: Slice) -> None:
        self._raw, self._choice, self._part = raw_W, choice, part

    @cached_property
    def with_banned(self) -> Tensor:
        """[W], with the banned tokens."""
        choice, part, logits = self._choice, self._part, self._raw.clone()
        output = torch.bincount(torch.tensor(part.here(choice.output), dtype=torch.long), minlength=part.width)
        if choice.repetition != 1.0:
            seen = torch.tensor(sorted({*part.here(choice.prompt), *part.here(choice.output)}), dtype=torch.long)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / choice.repetition, values * choice.repetition)
        logits -= choice.frequency * output + choice.presence * (output > 0)
        for token, bias in choice.bias.items():
            for place in part.here([token]):
                logits[place] += bias
        if choice.allowed:
            bits = np.unpackbits(np.frombuffer(choice.allowed, dtype=np.uint8), bitorder="little", count=part.size)
            logits[torch.from_numpy(bits[part.first : part.first + part.width]) == 0] = -torch.inf
        return logits

    @cached_property
    def logits(self) -> Tensor:
        """[W], without them."""
        if not self._choice.banned:
            return self.with_banned
        logits = self.with_banned.clone()
        logits[self._part.here(self._choice.banned)] = -torch.inf
        return logits

    @property
    def best(self) -> list[float]:
        """The largest logit and its token."""
        return likeliest(self.logits[None], self._part.first)[0].tolist()

    @property
    def best_banned(self) -> list[float]:
        """The same with the banned tokens."""
        return likeliest(self.with_banned[None], self._part.first)[0].tolist()


def _scored(raw_W: Tensor, count: int, part: Slice, token: int, highest: float) -> Generator[Ask, Told, Chosen]:
    """A token with its log-probability and rank, and the likeliest ones, of the model's own distribution."""
    count = min(count, part.size)

    def numbers() -> list[float]:
        mass = float(torch.exp(raw_W - highest).sum(dtype=torch.float64))
        own = [float(raw_W[place]) for place in part.here([token])] or [-math.inf]
        top = raw_W.topk(min(count, part.width))
        tokens = [float(place + part.first) for place in top.indices.tolist()]
        missing = [-1.0] * (count - len(tokens))
        return [mass, *own, *top.values.tolist(), *missing, *tokens, *missing]

    told = yield Ask(2 + 2 * count, numbers)
    whole = highest + math.log(sum(said[0] for said in told))
    logit = max(said[1] for said in told)
    pairs = [pair for said in told for pair in zip(said[2 : 2 + count], said[2 + count :], strict=True)]
    pairs = sorted((pair for pair in pairs if pair[1] >= 0), key=lambda pair: (-pair[0], pair[1]))
    told = yield Ask(1, lambda: [float((raw_W > logit).sum())])
    rank = 1 + sum(int(said[0]) for said in told)
    return Chosen(token, logit - whole, rank, [(int(each), value - whole) for value, each in pairs[:count]])
