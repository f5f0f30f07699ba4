"""Measures what wires and formats do to a model's answers: the same text exact and otherwise, position by position.

Every window of the text is a prompt whose rows are scored, all of them, or with a large vocabulary the last ones, as
many as LOGITS_BYTES hold; only a wire differs, or what weights or keys and values are kept in, so what differs is
theirs. Exact are exact sums, and weights, keys and values in what is computed in. Knows engines and texts; knows
nothing of how figures are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weft.config import ModelConfig
from weft.engine import Engine
from weft.errors import InputError
from weft.execute.results import RunOptions
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.shares import STORED_BITS, kept_bytes
from weft.opening import open_engine
from weft.parallel.sizes import row_bytes
from weft.program.batch import Batch, Segment
from weft.quality import Assessment, Quality, keep
from weft.text import Tokenizer, has_tokenizer

TEXT = Path(__file__).with_name("northanger-abbey.txt")  # chapters 1 to 10, 1803: in the public domain
WINDOW = 512  # tokens
LOGITS_BYTES = 128 << 20  # of one window's
MOST = 1e30


class _Answers:
    """Of one window: log-probabilities of every next token [T, V]."""

    def __init__(self, logits: bytes, vocabulary: int, tokens: Sequence[int], scored: int) -> None:
        flat = torch.from_numpy(np.frombuffer(logits, np.float32).copy()).view(-1, vocabulary)
        self.log = flat.log_softmax(1)
        following = torch.tensor(tokens[len(tokens) - scored + 1 :])
        self.losses = -self.log[:-1].gather(1, following[:, None]).squeeze(1)


class _Inexact:
    """What the answers of a wire, or of a format, come to against exact ones."""

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
        losses, divergences = torch.cat(self.losses), torch.cat(self.divergences)
        # Positions of one window depend on each other: windows don't.
        more = torch.stack([each.double().mean() for each in self.losses])
        more -= torch.stack([each.double().mean() for each in self.exact])
        unsure = more.std() / len(more) ** 0.5 if len(more) > 1 else more.abs().sum()
        unsure = unsure.nan_to_num(0.0, 0.0)  # that is sure enough
        figures = (
            losses.double().mean().exp(), more.mean().expm1(), unsure, divergences.clamp_min(0).double().mean(),
            divergences.clamp_min(0).quantile(0.99), torch.cat(self.same).double().mean(),
        )  # fmt: skip
        return Quality(self.name, bytes_, *map(_written, figures))


def _written(figure: Tensor) -> float:
    """A number that a file can hold: of answers that are none, one beyond every limit."""
    return float(figure.nan_to_num(MOST, MOST, -MOST).clamp(-MOST, MOST))


def measure(
    path: Path, wires: Sequence[str], ranks: int, tokens: int, text: Path = TEXT, threads: int | None = None,
    watch: Callable[[float], None] = lambda share: None, weights: Sequence[str] = (), kv: Sequence[str] = (),
) -> Assessment:  # fmt: skip
    """Perplexity, divergence and agreement of each wire, and of `weights` and `kv` in each format, on the first
    `tokens` of a text, in whole windows; kept for `auto:`, where there are enough of them.

    Raises `InputError` for a text that is too short, or a model without a tokenizer.
    """
    model = model_config(path)
    windows = _windows(path, model, text, tokens)
    of_wires = [_Inexact(wire) for wire in dict.fromkeys(["exact", *wires])]
    formats = [("weights", each) for each in weights] + [("kv", each) for each in kv]
    steps, done = len(windows) * (len(of_wires) + 2 * len(formats)), 0

    def answers(engine: Engine, window: list[int], wire: str = "exact") -> _Answers:
        nonlocal done
        found, done = _answers(engine, model, window, wire), done + 1
        watch(done / steps)
        return found

    def opened(**how: str) -> Engine:
        return open_engine(path, ranks=ranks, threads=threads, overlap="serial", prefixes=False, **how)  # type: ignore[arg-type]

    with closing(opened(weights="float32")) as engine:
        dtype = engine.config.dtype
        for window in windows:
            exact = answers(engine, window)
            of_wires[0].add(exact, exact)
            for wire in of_wires[1:]:
                wire.add(answers(engine, window, wire.name), exact)
        found = [wire.quality(row_bytes(wire.name, dtype, model.hidden) / model.hidden) for wire in of_wires]
        for kind, format_ in formats:
            other = _Inexact(f"{kind} {format_}")
            with closing(opened(**{"weights": "float32", kind: format_})) as second:
                for window in windows:
                    other.add(answers(second, window), answers(engine, window))
            width = blueprint_of(model).axis("kv_heads").width
            bytes_ = STORED_BITS[format_] / 8 if kind == "weights" else kept_bytes(format_, dtype, width)
            found.append(other.quality(bytes_))
    scored = sum(len(losses) for losses in of_wires[0].losses)
    measured = Assessment(ranks, dtype, text.stem, scored, str(date.today()), found)
    keep(path, measured)
    return measured


def _windows(path: Path, model: ModelConfig, text: Path, tokens: int) -> list[list[int]]:
    if not has_tokenizer(path):
        raise InputError(f"weft bench quality needs a tokenizer, and {path} has none")
    length = min(WINDOW, model.max_length)
    if tokens < length:
        raise InputError(f"--tokens {tokens} is less than a window, which has {length}; give more")
    try:
        ids = Tokenizer(path).encode(text.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {text} can't be read ({error})") from None
    if len(ids) < length:
        raise InputError(
            f"--text {text} has {len(ids)} of this model's tokens, and a window {length}; give a longer one"
        )
    return [ids[stop - length : stop] for stop in range(length, min(len(ids), tokens) + 1, length)]


def _answers(engine: Engine, model: ModelConfig, window: list[int], wire: str) -> _Answers:
    scored = min(len(window), max(2, LOGITS_BYTES // (4 * model.vocabulary)))
    batch = Batch((Segment(0, 0, len(window), wanted=scored),))
    plan = engine.planner.like("serial", wire).plan(batch)
    result = engine.probe(batch, window, plan, RunOptions(logits=True))
    return _Answers(result.logits, model.vocabulary, window, scored)
