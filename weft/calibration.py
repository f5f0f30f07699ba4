"""What a calibration is of: the key under which its result is kept, and what is measured. Knows models and groups."""

from __future__ import annotations

from importlib.metadata import version

from weft.config import EngineConfig, ModelConfig, processor_name
from weft.model.families import flags_of
from weft.model.shares import shares_of
from weft.plan.readings import Subject
from weft.program.strategy import GRANULE


def key_of(model: ModelConfig, config: EngineConfig, link: str) -> dict[str, str]:
    """Everything that costs depend on."""
    shape = (model.layers, model.hidden, model.intermediate, model.heads, model.kv_heads, model.head_dim,
             model.vocabulary)  # fmt: skip
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''} a rank"
    return {
        "weft": version("weft"), "model": f"{model.model_type} {'x'.join(map(str, shape))} {config.dtype}",
        "ranks": ",".join(f"{share:g}" for share in config.shares), "link": link, "wire": config.wire,
        "device": f"{processor_name()}, {threads}" + (", pinned" if config.cores else ""),
        "kernels": "reproducible" if config.reproducible else "fastest",
    }  # fmt: skip


def granule_of(config: EngineConfig) -> int:
    """Positions on whose multiples a sequence may be cut; see `strategy.place`."""
    return GRANULE if config.reproducible else 1


def subject_of(model: ModelConfig, config: EngineConfig, wires: tuple[str, ...]) -> Subject:
    """What is measured for these wires."""
    # Here, because it is all that needs torch in what every command imports, and takes a second and a half.
    from weft.parallel.allreduce import ONE_SHOT_BYTES
    from weft.parallel.codec import element_bytes

    windows = set(flags_of(model).windows)
    widths = [len(share.vocabulary) for share in shares_of(model, config.shares)]
    return Subject(
        layers=model.layers, width=model.hidden, logits=4.0 * max(widths), world=config.ranks,
        length=config.max_length, slots=config.max_sequences, limit=ONE_SHOT_BYTES,
        elements={wire: element_bytes(wire, config.dtype) for wire in wires},
        window=windows.pop() if len(windows) == 1 else None, granule=granule_of(config),
    )  # fmt: skip
