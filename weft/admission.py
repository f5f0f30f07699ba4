"""What can run here: prompts and wishes against one model, weights and answers against this machine's memory.

Everything is checked before anything is changed. Knows lengths, ids and bytes; knows nothing of batches or workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from weft.batching.params import SamplingParams, shown
from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError
from weft.execute.protocol import Loaded
from weft.model.shares import shard_bytes, shares_of
from weft.text import Tokenizer, generation_defaults

MEMORY_PART = 0.9  # of what is free after loading may become key/value memory


def end_ids(directory: Path, model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[frozenset[int], list[str]]:
    """Tokens that end a completion: generation_config.json's, else config.json's, and the tokenizer's.

    Ids that don't exist are left out; a line for whoever should know.
    """
    given = generation_defaults(directory).get("eos_token_id", model.fields.get("eos_token_id"))
    listed = [*(given if isinstance(given, list) else [given]), *(tokenizer.end_ids if tokenizer else ())]
    known = range(model.vocabulary)
    there = {repr(token): token for token in listed if type(token) is int and token in known}
    missing = dict.fromkeys(repr(token) for token in listed if token is not None and repr(token) not in there)
    where = "(of generation_config.json, config.json or the tokenizer)"
    lines = [f"end token {', '.join(missing)} {where} is not in the vocabulary, 0 to {len(known) - 1}; left out"]
    return frozenset(there.values()), lines if missing else []


def limit_of(
    prompt: Sequence[int], params: SamplingParams, vocabulary: int, length: int, memory: int, ends: frozenset[int]
) -> int:  # fmt: skip
    """How many tokens may follow a prompt. `length`: of the context; `memory`: tokens that fit into key/value memory.

    Raises `InputError` for ids that don't exist, and for prompts and wishes that leave nothing to do.
    """
    known, own = range(vocabulary), (*(params.stop_token_ids or ()), *(params.logit_bias or ()))
    if not prompt:
        raise InputError("the prompt is empty; give at least one token")
    if len(prompt) >= length:  # first: what is far too long is not looked through
        raise InputError(
            f"the prompt has {len(prompt)} tokens and the context holds {length}, the answer included; shorten it"
        )
    if (outside := next((token for token in (*prompt, *own) if token not in known), None)) is not None:
        raise InputError(f"token id {shown(outside)} is not in the vocabulary, 0 to {vocabulary - 1}")
    if params.min_tokens and len({*ends, *(params.stop_token_ids or ())}) >= vocabulary:
        raise InputError("every token ends the answer, so min_tokens leaves none to choose; leave it out")
    most = params.max_tokens if params.max_tokens is not None else max(1, memory - len(prompt))
    return min(most, length - len(prompt))


def demand_room(tokens: int, memory: int, loaded: Sequence[Loaded]) -> None:
    """Raises `InputError` if a prompt with its answer doesn't fit into key/value memory."""
    if tokens > memory:
        a_token = sum(rank.kv_bytes_per_token for rank in loaded)
        needed, there = (count * a_token / 2**30 for count in (tokens, memory))
        raise InputError(
            f"{tokens} tokens need {needed:.2f} GiB of key/value memory and {there:.2f} GiB are free; "
            "shorten the prompt or max_tokens"
        )


def memory_tokens(loaded: Sequence[Loaded]) -> int:
    """Tokens whose keys and values fit into what is free now, over all ranks of this machine."""
    a_token = max(1, sum(rank.kv_bytes_per_token for rank in loaded))
    return int(MEMORY_PART * psutil.virtual_memory().available / a_token)


def demand_memory(model: ModelConfig, config: EngineConfig) -> None:
    """Raises `InputError` before anything is started if the weights of all ranks of this machine can't fit."""
    size = {"float32": 4, "bfloat16": 2}[config.dtype]
    needed = sum(shard_bytes(model, share, size) for share in shares_of(model, config.shares))
    free = psutil.virtual_memory().available
    if config.device == "cpu" and needed > free:
        raise InputError(
            f"the weights need {needed / 2**30:.1f} GiB in {config.dtype} over {config.ranks} ranks, and "
            f"{free / 2**30:.1f} GiB are free; use a smaller model, dtype bfloat16 or a machine with more memory"
        )
