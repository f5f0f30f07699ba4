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
    return not (choice.banned or choice.prompt or choice.output or choice.allowed)


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
    """Temperature, then min-p, top-k and top-p on the sorted probabilities, then one uniform number."""
    ordered, tokens = torch.sort(logits_V / choice.temperature, descending=True, stable=True)
    probabilities = torch.softmax(ordered.double(), dim=0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if choice.min_p > 0:
        keep &= probabilities >= choice.min_p * probabilities[0]
    if choice.top_k > 0:
        keep[choice.top_k :] = False
    if choice.top_p < 1:
        # After top-k, as elsewhere: its mass is counted within what is left.
        left = probabilities * keep
        before = left.cumsum(0) - left
        keep &= before < choice.top_p * left.sum()
    keep[0] = True  # also where a top_p next to nothing leaves none
    heights = (probabilities * keep).cumsum(0)
    # A hash, not a generator's state: nothing has to be remembered between tokens.
    uniform = random.Random(f"{choice.seed}/{choice.index}").random()
    place = int(torch.searchsorted(heights, uniform * heights[-1], right=True))
    return int(tokens[min(place, len(tokens) - 1)])
