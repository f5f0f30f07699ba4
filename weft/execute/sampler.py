"""Chooses the next token from logits, or scores the one that is given.

Stateless: a choice depends on the logits, the request's wishes, its tokens so far, and (seed, index); so it is the
same after a restart and beside any other request. A row that can't be chosen from says why, and concerns no other.
Knows nothing of sequences or text.

Shapes: V vocabulary.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from weft.execute.protocol import Choice, Chosen


def sample(logits: Tensor, choices: list[Choice]) -> list[Chosen]:
    """One token for each row of `logits` [rows, V] (float32)."""
    tokens = logits.argmax(dim=1)
    fine = logits.gather(1, tokens[:, None]).isfinite()[:, 0].tolist()
    rows = zip(logits, choices, fine, tokens.tolist(), strict=True)
    return [_chosen(row, choice, token) if usable else _REFUSED for row, choice, usable, token in rows]


_GREEDY = Choice()
_REFUSED = Chosen(0, error="the model computed numbers that are none (not finite) for this request")


def _chosen(row_V: Tensor, choice: Choice, likeliest: int) -> Chosen:
    if choice == _GREEDY:
        return Chosen(likeliest)
    try:
        return _one(row_V, choice)
    except Exception as error:  # whatever it is, it is this row's alone
        return Chosen(0, error=f"its next token could not be chosen ({type(error).__name__}: {error})")


def _untouched(choice: Choice) -> bool:
    return not (choice.banned or choice.prompt or choice.output or choice.allowed or choice.bias)


def _one(raw_V: Tensor, choice: Choice) -> Chosen:
    logits = raw_V if _untouched(choice) else _penalised(raw_V.clone(), choice)
    if choice.given is not None:
        token = choice.given
    else:
        token = int(logits.argmax()) if choice.temperature == 0 else _draw(logits, choice)
    if choice.logprobs is None:
        return Chosen(token)
    logprobs = torch.log_softmax(raw_V, dim=0)
    top = logprobs.topk(min(choice.logprobs, logprobs.shape[0]))
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    rank = int((logprobs > logprobs[token]).sum()) + 1
    return Chosen(token, float(logprobs[token]), rank, pairs)


def _penalised(logits_V: Tensor, choice: Choice) -> Tensor:
    size = logits_V.shape[0]
    output = torch.bincount(torch.tensor(choice.output, dtype=torch.long), minlength=size)
    if choice.repetition != 1.0:
        seen = torch.tensor(sorted({*choice.prompt, *choice.output}), dtype=torch.long)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / choice.repetition, values * choice.repetition)
    logits_V -= choice.frequency * output + choice.presence * (output > 0)
    for token, bias in choice.bias.items():
        logits_V[token] += bias
    if choice.allowed:
        bits = np.unpackbits(np.frombuffer(choice.allowed, dtype=np.uint8), bitorder="little", count=size)
        logits_V[torch.from_numpy(bits) == 0] = -torch.inf
    unbanned = logits_V[choice.banned]
    logits_V[choice.banned] = -torch.inf
    if choice.banned and logits_V.max() == -torch.inf:  # a grammar that is over allows nothing but the end
        logits_V[choice.banned] = unbanned
    if logits_V.max() == -torch.inf:
        raise ValueError("no token is allowed")
    return logits_V


def _draw(logits_V: Tensor, choice: Choice) -> int:
    """Temperature, then min-p, top-k and top-p, then as many uniform numbers as it takes.

    Nothing is sorted. A token is drawn from all that min-p and top-k leave; if the likelier ones have the wanted mass
    without it, it is not one of top-p's, nor is any that is less likely, and the next draw is from those before it.
    What is accepted is distributed as a draw from top-p's tokens alone: each draw is from more tokens than those,
    never from fewer. Of equally likely tokens the one with the lower id comes first.
    """
    kept_V = torch.softmax((logits_V - logits_V.max()) / choice.temperature, dim=0)
    if choice.min_p > 0:
        kept_V = torch.where(kept_V >= choice.min_p * kept_V.max(), kept_V, 0)
    if 0 < choice.top_k < kept_V.shape[0]:
        kept_V = _largest(kept_V, choice.top_k)
    kept_V = pad(kept_V, (0, -kept_V.shape[0] % BLOCK))
    # A hash, not a generator's state: nothing has to be remembered between tokens.
    uniform = random.Random(f"{choice.seed}/{choice.index}").random
    wanted = choice.top_p * _mass(kept_V)
    while True:
        token = _drawn(kept_V, uniform())
        if choice.top_p == 1:
            return token
        before_V = _before(kept_V, token)
        mass = _mass(before_V)
        if mass < wanted or mass == 0:  # the likeliest one: also where a top_p next to nothing leaves none
            return token
        kept_V = before_V


BLOCK = 512  # tokens whose probabilities are summed by themselves: in the same order however many threads there are


def _mass(kept_V: Tensor) -> float:
    return float(kept_V.view(-1, BLOCK).sum(dim=1).double().sum())


def _drawn(kept_V: Tensor, uniform: float) -> int:
    """The token at this part, 0 to 1, of all the mass."""
    heights = kept_V.view(-1, BLOCK).sum(dim=1).double().cumsum(0)
    place = uniform * float(heights[-1])
    block = min(int(torch.searchsorted(heights, place, right=True)), len(heights) - 1)
    within = kept_V[block * BLOCK : (block + 1) * BLOCK].double().cumsum(0)
    place -= float(heights[block - 1]) if block else 0.0
    token = block * BLOCK + min(int(torch.searchsorted(within, place, right=True)), BLOCK - 1)
    if kept_V[token] > 0:
        return token
    return int(kept_V[: token + 1].nonzero()[-1])  # rounding led beyond the block's last one


def _before(kept_V: Tensor, token: int) -> Tensor:
    """What is likelier than a token, or as likely with a lower id; 0 for the rest."""
    likelier = kept_V > kept_V[token]
    likelier[:token] |= kept_V[:token] == kept_V[token]
    return torch.where(likelier, kept_V, 0)


def _largest(kept_V: Tensor, count: int) -> Tensor:
    """The `count` likeliest; 0 for the rest."""
    size = kept_V.shape[0]
    least = kept_V.topk(count).values[-1] if count <= FEW else kept_V.kthvalue(size - count + 1).values
    above = kept_V > least
    equal = (kept_V == least).nonzero()[:, 0]
    above[equal[: count - int(above.sum())]] = True
    return torch.where(above, kept_V, 0)


FEW = 1024  # up to which `topk` is faster than a selection of one value
