"""What can run: prompts and wishes against one model, weights and answers against the memory of each machine.

Everything is checked before anything is changed. Knows lengths, ids and bytes; knows nothing of batches or workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from weft.batching.params import SamplingParams, shown
from weft.config import EngineConfig, ModelConfig
from weft.errors import InputError, NoRoom
from weft.execute.process import free_memory
from weft.execute.protocol import Hello, Loaded
from weft.formats.fingerprint import weight_files
from weft.model.description import generation_defaults
from weft.model.families import blueprint_of
from weft.model.shares import FEW_BITS, Share, kept_bytes, remembered, shard_bytes, shares_of
from weft.text import Tokenizer

FEW = 12  # bits of a number, up to which a checkpoint is one of few bits
NAMED = 4  # matrices, where more are meant
ROOM = 0.7  # of what is free, that weights may take where they could be smaller
MEMORY_PART = 0.9  # of what is free after loading may become key/value memory


def end_ids(path: Path, model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[frozenset[int], list[str]]:
    """Tokens that end a completion: generation_config.json's, else config.json's, and the tokenizer's.

    Ids that don't exist are left out; a line for whoever should know.
    """
    proposed, lines = generation_defaults(path)
    given = proposed.get("eos_token_id", model.fields.get("eos_token_id"))
    listed = [*(given if isinstance(given, list) else [given]), *(tokenizer.end_ids if tokenizer else ())]
    vocabulary = range(model.vocabulary)
    there = {repr(token): token for token in listed if type(token) is int and token in vocabulary}
    missing = dict.fromkeys(repr(token) for token in listed if token is not None and repr(token) not in there)
    where = "(of generation_config.json, config.json or the tokenizer)"
    if missing:
        lines.append(
            f"end token {', '.join(missing)} {where} is not in the vocabulary, 0 to {len(vocabulary) - 1}; left out"
        )
    return frozenset(there.values()), lines


def limit_of(
    prompt: Sequence[int], params: SamplingParams, vocabulary: int, length: int, memory: int, ends: frozenset[int]
) -> int:  # fmt: skip
    """How many tokens may follow a prompt. `length`: of the context; `memory`: tokens that fit into key/value memory.

    Raises `InputError` for ids that don't exist, and for prompts and wishes that leave nothing to do.
    """
    tokens, own = range(vocabulary), (*(params.stop_token_ids or ()), *(params.logit_bias or ()))
    if not prompt:
        raise InputError("the prompt is empty; give at least one token")
    if len(prompt) > length - (params.max_tokens != 0):  # first: what is far too long is not looked through
        included = ", the answer included" if params.max_tokens != 0 else ""
        raise InputError(f"the prompt has {len(prompt)} tokens and the context holds {length}{included}; shorten it")
    if min(prompt) < 0 or max(prompt) >= vocabulary or any(token not in tokens for token in own):
        outside = next(token for token in (*prompt, *own) if token not in tokens)
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


def kept_lines(loaded: Sequence[Loaded]) -> list[str]:
    """For whoever should know: what weights of few bits are kept in, and which matrices are not, though asked for."""
    kinds: Counter[str] = Counter()
    for rank in loaded:
        kinds.update(rank.kinds)
    if not any(kind in FEW_BITS for kind in kinds):
        return []
    told = ", ".join(f"{size / 1e6:,.0f} MB in {kind}" for kind, size in kinds.most_common())
    finer = list(dict.fromkeys(name for rank in loaded for name in rank.finer))
    lines = [f"weights: {told}"]
    if finer:
        more = f" and {len(finer) - NAMED} more" if len(finer) > NAMED else ""
        lines.append(f"kept in more bits, as they lose too much in fewer: {', '.join(finer[:NAMED])}{more}")
    return lines


def memory_tokens(
    hellos: Sequence[Hello], loaded: Sequence[Loaded], replicas: int = 1, later: Sequence[int] = (),
    here: Container[int] = (),
) -> int:  # fmt: skip
    """Tokens whose keys and values fit into what is free now, on the machine that has least room for its ranks. Of
    several `replicas`, which share the machine of the ranks that are `here`, each leaves as much to each of the others,
    and of each rank so many bytes for weights that are there `later`."""
    fitting = []
    for ranks in _by_machine(hellos).values():
        a_token = max(1, sum(loaded[rank].kv_bytes_per_token for rank in ranks))
        # Ranks get ready one after the other: who was last saw what all have taken.
        free = min(loaded[rank].free for rank in ranks)
        if replicas > 1 and ranks[0] in here:
            free = max(0, free - sum(later[rank] for rank in ranks)) // replicas
        fitting.append(int(MEMORY_PART * free / a_token))
    return min(fitting)


def settled(path: Path, model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello] = ()) -> EngineConfig:
    """With what `--weights auto` comes to. What a checkpoint has in few bits may be kept in 8 where there is room, else
    in 4. `hellos`: of all ranks; without them, they are all on this machine."""
    if config.weights != "auto":
        return config
    blueprint = blueprint_of(model)
    size = sum(file.stat().st_size for file in weight_files(path) if file.is_file())
    if 8 * size > FEW * blueprint.numbers:
        return replace(config, weights=config.dtype)
    roomy, narrow = (replace(config, weights=weights) for weights in ("auto:int8", "auto:int4"))
    if not hellos:
        return roomy if sum(weights_needed(model, roomy)) < ROOM * free_memory() else narrow
    return roomy if all(here < ROOM * free for _, here, free in _filled(model, roomy, hellos)) else narrow


def weights_needed(model: ModelConfig, config: EngineConfig) -> list[int]:
    """Bytes of each rank's weights."""
    blueprint = blueprint_of(model)
    return [_weights_of(model, config, share) for share in shares_of(blueprint, config.layout)]


def _weights_of(model: ModelConfig, config: EngineConfig, share: Share) -> int:
    """Checkpoints that quantise matrices leave the embedding and the head floats."""
    floats = config.weights.startswith("auto:") and model.fields.get("quantization_config")
    return shard_bytes(blueprint_of(model), share, config.weights, config.dtype if floats else "")


def _filled(
    model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello]
) -> Iterator[tuple[list[int], int, int]]:  # fmt: skip
    """Of each machine its ranks, bytes of their weights, and bytes that are free there."""
    needed = weights_needed(model, config)
    for ranks in _by_machine(hellos).values():
        yield ranks, sum(needed[rank] for rank in ranks), min(hellos[rank].free for rank in ranks)


def demand_memory(model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello]) -> None:
    """Raises `NoRoom` before anything is loaded if the weights of a machine's ranks can't fit into its memory."""
    machines = list(_filled(model, config, hellos))
    for ranks, here, free in machines:
        if config.device == "cpu" and here > free:
            count = f"{len(ranks)} of {config.ranks}" if len(machines) > 1 else config.ranks
            raise NoRoom(
                f"the weights need {here / 2**30:.1f} GiB in {config.weights.removeprefix('auto:')} for {count} ranks "
                f"on {hellos[ranks[0]].host}, and {free / 2**30:.1f} GiB are free there; use a smaller model, fewer "
                "bits (--weights int8 or int4), other --shares, or more machines or memory",
                ranks[0],
            )


def room_for_tokens(model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello]) -> int:
    """Tokens whose keys and values should fit beside the weights, on each machine, before anything is loaded."""
    blueprint, fitting = blueprint_of(model), list[int]()
    shares = shares_of(blueprint, config.layout)
    number = kept_bytes(config.kv, config.dtype, blueprint.axis("kv_heads").width)
    for ranks, here, free in _filled(model, config, hellos):
        a_token = number * sum(remembered(blueprint, shares[rank]) for rank in ranks)
        fitting.append(int(MEMORY_PART * max(0, free - here) / max(1.0, a_token)))
    return min(fitting)


def room_for_layers(model: ModelConfig, config: EngineConfig, hellos: Sequence[Hello]) -> list[int]:
    """Of each section, the layers whose weights fit on each of its machines beside what comes before and after them;
    ranks of one machine have equal parts of what is free there. One at least."""
    shares, machines = shares_of(blueprint_of(model), config.layout), _by_machine(hellos)

    def fit(rank: int) -> int:
        ends, one = (_weights_of(model, config, replace(shares[rank], layers=range(count))) for count in (0, 1))
        return int((hellos[rank].free / len(machines[hellos[rank].machine]) - ends) / max(1, one - ends))

    rooms = (min(map(fit, section.ranks)) for section in config.layout.sections)
    return [max(1, min(room, model.layers)) if config.device == "cpu" else model.layers for room in rooms]


def _by_machine(hellos: Sequence[Hello]) -> dict[str, list[int]]:
    """The ranks of each."""
    machines: dict[str, list[int]] = {}
    for rank, hello in enumerate(hellos):
        machines.setdefault(hello.machine, []).append(rank)
    return machines
