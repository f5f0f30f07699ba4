"""How a checkpoint in Hugging Face's format is quantised, from the `quantization_config` of its config.json. No torch.

Knows what people publish and what of it can be read; how tensors are unpacked is quantised.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import InputError

COMPRESSED, GPTQ, AWQ, FP8, MXFP4 = "compressed-tensors", "gptq", "awq", "fp8", "mxfp4"
METHODS = (COMPRESSED, GPTQ, AWQ, FP8, MXFP4)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
MOST_GROUPS = 1000
ACTIVATIONS = "it was made for quantised activations; weft computes them whole"


@dataclass(frozen=True)
class Scheme:
    """`bits` of a packed number; `sizes`: of the groups along a row that share a scale, where the tensors leave it
    open; `block`: rows and columns that share one; `zero_less`: zeros are stored less one; `remarks`: what else the
    checkpoint was made for, that is left out."""

    method: str
    bits: int = 8
    sizes: tuple[int, ...] = ()
    block: tuple[int, int] | None = None
    zero_less: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """For people."""
        return self.method if self.method in (FP8, MXFP4) else f"{self.method}, {self.bits} bits"


def scheme_of(fields: Mapping[str, Any]) -> Scheme | None:
    """Of a configuration's fields; None if it isn't quantised. Raises `InputError` for what can't be read."""
    given = fields.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"the configuration's quantization_config is {given!r:.60}, not an object; download it again")
    method = given.get("quant_method") or (COMPRESSED if "config_groups" in given else None)
    readers: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
        COMPRESSED: _compressed, GPTQ: _gptq, AWQ: _awq, FP8: _fp8, MXFP4: lambda _: Scheme(MXFP4, bits=4),
    }  # fmt: skip
    if not isinstance(method, str) or method not in readers:
        raise InputError(f"the checkpoint is quantised as {method!r}, which can't be read; {', '.join(METHODS)} can")
    return readers[method](given)


def _whole(given: Mapping[str, Any], name: str, allowed: tuple[int, ...] = ()) -> int:
    """A number of the configuration; any above 0, if none are listed."""
    value = given.get(name)
    if type(value) is not int or (value not in allowed if allowed else value < 1):
        can = f"one of {', '.join(map(str, allowed))}" if allowed else "a whole number above 0"
        raise InputError(f"the checkpoint's quantization_config says {name} {value!r:.60}; what can be read is {can}")
    return value


def _demand(given: Mapping[str, Any], name: str, default: Any, *allowed: Any) -> Any:
    value = given.get(name, default)
    if value not in allowed:
        known = ", ".join(map(str, allowed))
        raise InputError(f"the checkpoint's quantization_config says {name} {value!r:.60}; what can be read is {known}")
    return value


def _compressed(given: Mapping[str, Any]) -> Scheme:
    _demand(given, "format", "dense", *FORMATS)
    for name in ("sparsity_config", "transform_config"):
        inner = given.get(name)
        if inner and not (isinstance(inner, Mapping) and inner.get("format") == "dense"):
            raise InputError(f"the checkpoint's quantization_config has a {name}, which can't be read; use another one")
    groups = given.get("config_groups") or {}
    if not isinstance(groups, Mapping) or len(groups) > MOST_GROUPS:
        raise InputError("the checkpoint's quantization_config has config_groups that are none; download it again")
    bits, sizes, blocks, remarks = [8], list[int](), list[tuple[int, int]](), list[str]()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        kind = _demand(weights, "type", "int", "int", "float")
        bits.append(_whole(weights, "num_bits", (4, 8) if kind == "int" else (8,)))
        _demand(weights, "strategy", None, None, "tensor", "channel", "group", "block")
        if weights.get("group_size") not in (None, -1):
            sizes.append(_whole(weights, "group_size"))
        if weights.get("block_structure"):
            blocks.append(_block(weights["block_structure"], "block_structure"))
        if group.get("input_activations"):
            remarks.append(ACTIVATIONS)
    if given.get("kv_cache_scheme"):
        remarks.append("it was made for quantised keys and values; weft keeps them whole")
    return Scheme(COMPRESSED, min(bits), tuple(dict.fromkeys(sizes)), next(iter(blocks), None),
                  remarks=tuple(dict.fromkeys(remarks)))  # fmt: skip


def _gptq(given: Mapping[str, Any]) -> Scheme:
    forms = ("gptq", "gptq_v2")
    other = _demand(given, "format", "gptq", *forms)  # what GPTQModel calls it
    form = _demand(given, "checkpoint_format", other, *forms)
    if given.get("dynamic") or (given.get("format") and form != other):
        raise InputError("the checkpoint's quantization_config differs by layer, or says two formats; use another one")
    sizes = () if given.get("group_size") == -1 else (_whole(given, "group_size"),)
    return Scheme(GPTQ, _whole(given, "bits", (2, 4, 8)), sizes, zero_less=form == "gptq")


def _awq(given: Mapping[str, Any]) -> Scheme:
    version = str(given.get("version", "gemm")).lower()
    if version != "gemm":
        raise InputError(f"the checkpoint is quantised by awq in the layout {version!r:.60}; what can be read is gemm")
    size = given.get("group_size", given.get("q_group_size"))
    sizes = () if size == -1 else (_whole({"group_size": size}, "group_size"),)
    bits = {"bits": given.get("bits", given.get("w_bit"))}
    return Scheme(AWQ, _whole(bits, "bits", (4,)), sizes)


def _fp8(given: Mapping[str, Any]) -> Scheme:
    _demand(given, "fmt", "e4m3", "e4m3", "float8_e4m3fn")
    block = given.get("weight_block_size")
    return Scheme(FP8, block=_block(block, "weight_block_size") if block else None, remarks=(ACTIVATIONS,))


def _block(given: Any, name: str) -> tuple[int, int]:
    if not (isinstance(given, list | tuple) and len(given) == 2 and all(type(n) is int and n > 0 for n in given)):
        raise InputError(f"the checkpoint's quantization_config says {name} {given!r:.60}; give rows and columns")
    return given[0], given[1]
