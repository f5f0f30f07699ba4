"""What a model is and what weft would do with it, from its files alone: for `weft doctor MODEL`.

Knows files, families and this machine's memory; starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from weft.admission import end_ids, settled, weights_needed
from weft.config import EngineConfig, ModelConfig, laid_out
from weft.errors import InputError
from weft.execute.process import free_memory
from weft.finding import Finding
from weft.formats.checkpoint import Checkpoint
from weft.formats.fingerprint import weight_files
from weft.formats.gguf.files import GgufFiles, is_gguf
from weft.formats.schemes import scheme_of
from weft.model.blueprint import Blueprint
from weft.model.description import model_config
from weft.model.families import blueprint_of
from weft.model.opening import open_model
from weft.model.shares import kept_bytes, remembered, shares_of
from weft.text import Tokenizer, tokenizer_of

KEPT = {  # what auto comes to
    "auto:int8": "8 bits kept in int8, 4 in int4 or int8, if faster",
    "auto:int4": "kept in int8 and int4, as there is little room",
}
SOME = 3  # that are named where many are meant


def survey(
    path: Path, ranks: int, dtype: str, weights: str = "auto", kv: str = "auto"
) -> tuple[list[Finding], bool]:  # fmt: skip
    """Of a model in a directory or a .gguf file, split over so many ranks of this machine; and whether it can be run.

    Raises `InputError` for files that say nothing, and for a family that isn't known.
    """
    config = model_config(path)
    blueprint = blueprint_of(config)
    asked = EngineConfig(laid_out(config.layers, ranks, 1, None, None), dtype=dtype, weights=weights, kv=kv)
    chosen = settled(path, config, asked)
    with closing(open_model(path, config)) as checkpoint:
        tensors = _tensors(checkpoint, blueprint)
        found = [*_files(path, config), *_stored(checkpoint, blueprint, config, chosen), tensors]
    tokenizer, why_not = _tokenizer(path)
    found += _memory(blueprint, config, chosen)
    return [*found, *_texts(path, config, tokenizer, why_not)], tensors.ok and not why_not


def _tokenizer(path: Path) -> tuple[Tokenizer | None, str]:
    """A model's, if it has one; or what is wrong with it: all else is worth knowing all the same."""
    try:
        return tokenizer_of(path), ""
    except InputError as error:
        return None, f"this model can't be run: {error}"


def _files(path: Path, config: ModelConfig) -> Iterator[Finding]:
    files = weight_files(path)
    size = sum(file.stat().st_size for file in files)
    kind = f"GGUF, architecture {_architecture(path)}" if is_gguf(path) else "Hugging Face's, safetensors"
    count = "" if len(files) == 1 else f" in {len(files)} files"
    yield Finding("model", True, f"{path.name}, {size / 1e6:,.0f} MB{count}", kind)
    shape = f"{config.layers} layers of {config.hidden}, {config.heads} heads over {config.kv_heads}"
    yield Finding("family", True, f"{config.model_type}: {shape}, vocabulary {config.vocabulary:,}",
                  f"context of {config.max_length:,} tokens")  # fmt: skip


def _architecture(path: Path) -> str:
    return str(GgufFiles(path).header.get("general.architecture", str))


def _stored(
    checkpoint: Checkpoint, blueprint: Blueprint, config: ModelConfig, chosen: EngineConfig
) -> Iterator[Finding]:  # fmt: skip
    kinds, scheme = checkpoint.kinds(), scheme_of(config.fields)
    told = ", ".join(f"{count} {kind}" for kind, (count, _) in kinds.items())
    bits = 8 * sum(size for _, size in kinds.values()) / max(1, blueprint.numbers)
    what = f"{scheme.described}: {told}" if scheme else told
    kept = KEPT.get(chosen.weights, f"kept in {chosen.weights}")
    yield Finding("stored", True, f"{what}; {bits:.1f} bits a number", f"computed in {chosen.dtype}; {kept}")
    for remark in scheme.remarks if scheme else ():
        yield Finding("left out", True, "a part of the scheme", remark)


def _tensors(checkpoint: Checkpoint, blueprint: Blueprint) -> Finding:
    """Whether all are there, as the configuration calls for them."""
    tied = f"{blueprint.head.name}.weight" if blueprint.tied else ""
    missing = [name for name in blueprint.tensors if name not in checkpoint and name != tied]
    there = {name: shape for name, shape in blueprint.tensors.items() if name in checkpoint}
    wrong = [name for name, shape in there.items() if checkpoint.shape(name) != shape]
    wrong += checkpoint.unexpected(blueprint.tensors)
    if missing or wrong:
        told = [f"{len(names)} {how}: {', '.join(names[:SOME])}" for names, how in
                ((missing, "missing"), (wrong, "not as the configuration says")) if names]  # fmt: skip
        return Finding("tensors", False, "; ".join(told), "this model can't be run; download it again")
    return Finding("tensors", True, f"all {len(there)}", "named and shaped as the configuration says")


def _memory(blueprint: Blueprint, model: ModelConfig, chosen: EngineConfig) -> Iterator[Finding]:
    """Of the largest rank, and of all on this machine."""
    ranks, shares = chosen.ranks, shares_of(blueprint, chosen.layout)
    weights = weights_needed(model, chosen)
    width = blueprint.axis("kv_heads").width
    tokens = [int(kept_bytes(chosen.kv, chosen.dtype, width) * remembered(blueprint, share)) for share in shares]
    free = free_memory()
    fits = sum(weights) < free
    each = "a rank" if ranks > 1 else "in all"
    meaning = f"{sum(weights) / 2**30:.2f} GiB on this machine, of {free / 2**30:.1f} that are free"
    yield Finding(f"weights, --tp {ranks}", fits, f"{max(weights) / 2**30:.2f} GiB {each}",
                  meaning if fits else f"{meaning}: more machines, or fewer bits: --weights int8 or int4")  # fmt: skip
    many = int(max(0, free - sum(weights)) / max(1, sum(tokens)))
    yield Finding("keys and values", fits, f"{max(tokens) / 1024:.0f} KiB a token and rank",
                  f"room for {many:,} tokens beside the weights")  # fmt: skip


def _texts(path: Path, config: ModelConfig, tokenizer: Tokenizer | None, why_not: str) -> Iterator[Finding]:
    if tokenizer is None:
        yield Finding("tokenizer", False, "none", why_not or "prompts as token ids only")
    else:
        yield Finding("tokenizer", True, tokenizer.described, "texts to tokens and back")
        template = tokenizer.has_template
        use = "weft chat and /v1/chat/completions" if template else "weft generate and /v1/completions only"
        yield Finding("chat template", template, "yes" if template else "none", use)
    ends, lines = end_ids(path, config, tokenizer)
    names = [repr(tokenizer.decode([end]))[1:-1] if tokenizer else str(end) for end in sorted(ends)]
    yield Finding("end tokens", bool(ends), ", ".join(names) or "none",
                  "; ".join(lines) or ("end an answer" if ends else "answers end at --max-tokens"))  # fmt: skip
