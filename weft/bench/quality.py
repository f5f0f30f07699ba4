"""Measures what each wire does to a model's answers: the same text on exact and on others, position by position.

Every window of the text is a prompt whose rows are all scored; only wires differ, so what differs is theirs. Knows
engines and texts; knows nothing of how figures are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from math import exp
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weft.config import ModelConfig
from weft.engine import Engine
from weft.errors import InputError
from weft.execute.results import RunOptions
from weft.opening import open_engine
from weft.parallel.sizes import row_bytes
from weft.program.batch import Batch, Segment
from weft.quality import Measured, Quality, keep

TEXT = Path(__file__).with_name("northanger-abbey.txt")  # chapters 1 to 10, 1803: in the public domain
WINDOW = 512  # tokens
LOGITS_BYTES = 128 << 20  # of one window's


class _Answers:
    """Of one window: log-probabilities of every next token [T, V]."""

    def __init__(self, logits: bytes, vocabulary: int, tokens: Sequence[int], scored: int) -> None:
        flat = torch.from_numpy(np.frombuffer(logits, np.float32).copy()).view(-1, vocabulary)
        self.log = flat.log_softmax(1)
        following = torch.tensor(tokens[len(tokens) - scored + 1 :])
        self.losses = -self.log[:-1].gather(1, following[:, None]).squeeze(1)


class _Wire:
    """What one wire's answers come to, against exact's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.losses, self.exact = list[Tensor](), list[Tensor]()
        self.divergences, self.same = list[Tensor](), list[Tensor]()

    def add(self, answers: _Answers, exact: _Answers) -> None:
        """One more window."""
        self.losses.append(answers.losses)
        self.exact.append(exact.losses)
        self.divergences.append((exact.log.exp() * (exact.log - answers.log)).sum(1))
        self.same.append(answers.log.argmax(1) == exact.log.argmax(1))

    def quality(self, bytes_: float) -> Quality:
        losses, exact, divergences = map(torch.cat, (self.losses, self.exact, self.divergences))
        more = (losses - exact).double()
        return Quality(
            self.name, bytes_, exp(losses.double().mean()), exp(more.mean()) - 1,
            float(more.std() / len(more) ** 0.5), float(divergences.clamp_min(0).mean()),
            float(divergences.clamp_min(0).quantile(0.99)), float(torch.cat(self.same).double().mean()),
        )  # fmt: skip


def measure(
    directory: Path, wires: Sequence[str], ranks: int, tokens: int, text: Path = TEXT, threads: int | None = None,
    watch: Callable[[float], None] = lambda share: None,
) -> Measured:  # fmt: skip
    """Perplexity, divergence and agreement of each wire on the first `tokens` of a text, and kept for `auto:`.

    Raises `InputError` for a text that is too short, or a model without a tokenizer.
    """
    model = ModelConfig.from_directory(directory)
    with closing(open_engine(directory, ranks=ranks, threads=threads, overlap="serial", prefixes=False)) as engine:
        windows = _windows(engine, model, text, tokens)
        found = [_Wire(wire) for wire in dict.fromkeys(["exact", *wires])]
        for number, window in enumerate(windows):
            exact: _Answers | None = None
            for place, wire in enumerate(found):
                answers = _answers(engine, model, window, wire.name)
                exact = exact or answers
                wire.add(answers, exact)
                watch((number + (place + 1) / len(found)) / len(windows))
        a_number = {wire.name: row_bytes(wire.name, engine.config.dtype, model.hidden) / model.hidden for wire in found}
    scored = sum(len(losses) for losses in found[0].losses)
    measured = Measured(
        ranks, text.stem, scored, str(date.today()), [wire.quality(a_number[wire.name]) for wire in found]
    )
    keep(directory, measured)
    return measured


def _windows(engine: Engine, model: ModelConfig, text: Path, tokens: int) -> list[list[int]]:
    if engine.tokenizer is None:
        raise InputError("weft bench quality needs a tokenizer, and this model has no tokenizer.json")
    try:
        ids = engine.tokenizer.encode(text.read_text("utf-8"))[:tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {text} can't be read ({error})") from None
    length = min(WINDOW, engine.config.max_length, model.max_length)
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    whole = [window for window in windows if len(window) == length]
    if not whole:
        raise InputError(f"{text} has {len(ids)} of this model's tokens, and a window is {length}: give a longer one")
    return whole


def _answers(engine: Engine, model: ModelConfig, window: list[int], wire: str) -> _Answers:
    scored = min(len(window), max(2, LOGITS_BYTES // (4 * model.vocabulary)))
    batch = Batch((Segment(0, 0, len(window), wanted=scored),))
    plan = engine.planner.like("serial", wire).plan(batch)
    result = engine.probe(batch, window, plan, RunOptions(logits=True))
    return _Answers(result.logits, model.vocabulary, window, scored)
