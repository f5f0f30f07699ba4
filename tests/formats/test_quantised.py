"""Quantised checkpoints in Hugging Face's format: the weights that the formats' own readers have, and their logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.formats.packers import awq, gptq
from tests.ranks import Ranks
from tests.tiny import SMALL
from weft.errors import InputError
from weft.formats.checkpoint import open_checkpoint
from weft.formats.schemes import scheme_of
from weft.model.description import model_config

CONFIG: dict[str, Any] = SMALL | {
    "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 2, "initializer_range": 0.15,
}  # fmt: skip
PROMPT = tuple(torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(4)).tolist())
Made = tuple[dict[str, Tensor], Tensor]  # what is stored of a matrix, and what it is


@cache
def tiny(family: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONFIG)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def compressed(kind: str, dtype: torch.dtype = torch.float32, **weights: Any) -> tuple[Callable[[Tensor], Made], Any]:
    """By compressed-tensors' own compressor, and its decompressor."""
    compressor: Any = {
        "pack-quantized": PackedQuantizationCompressor, "int-quantized": IntQuantizationCompressor,
        "float-quantized": FloatQuantizationCompressor,
    }[kind]  # fmt: skip
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def make(weight: Tensor) -> Made:
        weight = weight.to(dtype)
        rows, columns = weight.shape
        if args.strategy == "group":
            grouped = weight.view(rows, -1, args.group_size)
        elif args.strategy == "block":
            tall, wide = args.block_structure
            tiles = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))
            grouped = tiles.view(tiles.shape[0] // tall, tall, -1, wide).transpose(1, 2).flatten(2)
        else:
            grouped = weight[:, None] if args.strategy == "channel" else weight.reshape(1, -1)[None]
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        back = compressor.decompress(stored, scheme)["weight"]
        return {f".{name}": value for name, value in stored.items()}, back

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
              "ignore": ["lm_head"]}  # fmt: skip
    return make, config


def drawn(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, zeros and scales of about a weight's size, and what they come to."""
    rows, columns = weight.shape
    draw = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw)
    zeros = torch.randint(0, 1 << bits, (rows, columns // group), generator=draw)
    scales = (torch.rand(rows, columns // group, generator=draw) * 0.4 / (1 << bits)).half()
    long = [each.repeat_interleave(group, 1) for each in (zeros, scales)]
    return codes, zeros, scales, (codes - long[0]).float() * long[1].float()


def by_gptq(bits: int, group: int, **more: Any) -> tuple[Callable[[Tensor], Made], Any]:
    less = 0 if more.get("checkpoint_format") == "gptq_v2" else 1

    def make(weight: Tensor) -> Made:
        size = weight.shape[1] if group == -1 else group
        codes, zeros, scales, values = drawn(weight, bits, size)
        return gptq(codes, zeros, scales, bits, less), values

    return make, {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False} | more


def by_gptq_in_order_of_activation() -> tuple[Callable[[Tensor], Made], Any]:
    """Columns of a group stand anywhere."""

    def make(weight: Tensor) -> Made:
        codes, zeros, scales, _ = drawn(weight, 4, 32)
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order)) // 32
        values = (codes - zeros[:, index]).float() * scales[:, index].float()
        return gptq(codes, zeros, scales, 4) | {".g_idx": index.to(torch.int32)}, values

    return make, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}


def by_awq(group: int) -> tuple[Callable[[Tensor], Made], Any]:
    def make(weight: Tensor) -> Made:
        codes, zeros, scales, values = drawn(weight, 4, group)
        return awq(codes, zeros, scales), values

    return make, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def by_fp8(block: tuple[int, int] | None, scale: torch.dtype = torch.float32) -> tuple[Callable[[Tensor], Made], Any]:
    """Tile by tile; what it comes to is checked against transformers' own function below."""

    def make(weight: Tensor) -> Made:
        rows, columns = weight.shape
        tall, wide = block or (rows, columns)
        scales = torch.empty(-(-rows // tall), -(-columns // wide))
        stored, values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for at in range(scales.shape[0]):
            for to in range(scales.shape[1]):
                here = slice(at * tall, (at + 1) * tall), slice(to * wide, (to + 1) * wide)
                size = (weight[here].abs().max() / 448).log2().ceil().exp2() if scale != torch.float32 else None
                scales[at, to] = size if size is not None else weight[here].abs().max() / 448
                stored[here] = (weight[here] / scales[at, to]).to(torch.float8_e4m3fn)
                values[here] = stored[here].float() * scales[at, to]
        return {".weight": stored, ".weight_scale_inv": scales.to(scale) if block else scales.reshape(())}, values

    return make, {"quant_method": "fp8"} | ({"weight_block_size": list(block)} if block else {})


SCHEMES: dict[str, tuple[Callable[[Tensor], Made], Any]] = {
    "packed-4-group": compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "packed-4-zeros": compressed("pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False),
    "packed-4-row": compressed("pack-quantized", num_bits=4, strategy="channel"),
    "packed-8-row": compressed("pack-quantized", num_bits=8, strategy="channel", symmetric=False),
    "packed-8-half": compressed("pack-quantized", torch.bfloat16, num_bits=8, strategy="group", group_size=32),
    "int-row": compressed("int-quantized", num_bits=8, strategy="channel"),
    "int-row-zeros": compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "int-tensor": compressed("int-quantized", torch.float16, num_bits=8, strategy="tensor"),
    "float-row": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float-tensor": compressed("float-quantized", torch.bfloat16, num_bits=8, type="float", strategy="tensor"),
    "float-block": compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
    "gptq-4": by_gptq(4, 32), "gptq-8": by_gptq(8, 32), "gptq-2": by_gptq(2, 16), "gptq-4-rows": by_gptq(4, -1),
    "gptq-v2": by_gptq(4, 32, checkpoint_format="gptq_v2"), "gptq-act": by_gptq_in_order_of_activation(),
    "awq": by_awq(32), "awq-small": by_awq(16),
    "fp8-tiles": by_fp8((64, 64)), "fp8-odd-tiles": by_fp8((40, 56)),
    "fp8-powers": by_fp8((32, 32), torch.float8_e8m0fnu), "fp8-tensor": by_fp8(None),
}  # fmt: skip


def saved(directory: Path, name: str, family: str = "Llama") -> dict[str, Tensor]:
    """A checkpoint whose projections are quantised; what all its tensors are."""
    make, scheme = SCHEMES[name]
    stored, values = {}, {}
    for tensor, weight in tiny(family).state_dict().items():
        if any(part in tensor for part in ("_proj", "dense", "query_key_value")) and tensor.endswith(".weight"):
            parts, values[tensor] = make(weight)
            stored |= {tensor.removesuffix(".weight") + part: value.contiguous() for part, value in parts.items()}
        else:
            stored[tensor] = values[tensor] = weight.contiguous().clone()
    directory.mkdir()
    save_file(stored, directory / "model.safetensors")
    config = tiny(family).config.to_dict() | {"quantization_config": scheme, "architectures": [f"{family}ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config, default=str))
    return values


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name: str, tmp_path: Path) -> None:
    """Every tensor, whole and in parts that end within groups and packed words; and the logits, on ranks that do."""
    values = saved(tmp_path / name, name)
    checkpoint = open_checkpoint(tmp_path / name, model_config(tmp_path / name).fields)
    for tensor, expected in values.items():
        assert checkpoint.shape(tensor) == list(expected.shape) and checkpoint.stored(tensor) > 0
        found = checkpoint.read(tensor).numbers(torch.float32)
        assert torch.equal(found.to(expected.dtype), expected), tensor
        height, width = expected.shape if expected.dim() == 2 else (expected.shape[0], 0)
        for rows in (range(3, height - 2), range(height - 1, height), range(5, 5), range(0, 8)):
            part = checkpoint.read(tensor, rows=rows).numbers(torch.float32)
            assert torch.equal(part, found[rows.start : rows.stop]), (tensor, rows)
        for columns in (range(5, width - 3), range(32, 64), range(7, 8), range(9, 9)) if width else ():
            part = checkpoint.read(tensor, columns=columns).numbers(torch.float32)
            assert torch.equal(part, found[:, columns.start : columns.stop]), (tensor, columns)
    demand_logits(tmp_path / name, values)


@pytest.mark.parametrize("family", ["Phi3", "GPTNeoX"])
@pytest.mark.parametrize("name", ["packed-4-group", "int-row", "gptq-4", "gptq-act", "awq", "fp8-odd-tiles"])
def test_tensors_that_are_several_matrices(name: str, family: str, tmp_path: Path) -> None:
    """Ranks read their rows of each, which end anywhere."""
    values = saved(tmp_path / name, name, family)
    demand_logits(tmp_path / name, values, family)


def demand_logits(directory: Path, values: dict[str, Tensor], family: str = "Llama") -> None:
    model = type(tiny(family))(tiny(family).config).eval()
    model.load_state_dict({name: value.float() for name, value in values.items()})
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]
    for shares in ((1.0,), (2.0, 1.0, 1.0)):
        ranks = Ranks(directory, shares)
        try:
            found = ranks.logits([PROMPT], "serial" if len(shares) == 1 else "iso:2")[0]
        finally:
            ranks.close()
        # Half precision's values were rounded by the reader that they are held against.
        rounded = any(value.dtype != torch.float32 for value in values.values())
        assert float((found - expected).abs().max()) <= (3e-2 if rounded else 2e-4) * float(expected.abs().max())


def test_fp8_tiles_are_as_transformers_has_them(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    stored, values = by_fp8((32, 32))[0](torch.randn(96, 160))
    expected = _dequantize_fp8_weight(stored[".weight"], stored[".weight_scale_inv"], [32, 32], torch.float32)
    assert torch.equal(values, expected)


def test_mxfp4_is_as_transformers_has_it(tmp_path: Path) -> None:
    """gpt-oss's experts: no family here has them yet."""
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 20, 4, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 20, 4), generator=draw, dtype=torch.uint8)
    save_file({"model.e.down_proj_blocks": blocks, "model.e.down_proj_scales": scales}, tmp_path / "model.safetensors")
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).reshape(60, 128)
    checkpoint = open_checkpoint(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    assert checkpoint.shape("model.e.down_proj") == [60, 128]
    assert torch.equal(checkpoint.read("model.e.down_proj").numbers(torch.float32), expected)
    part = checkpoint.read("model.e.down_proj", rows=range(7, 31)).numbers(torch.float32)
    assert torch.equal(part, expected[7:31])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which can't be read; compressed-tensors, gptq"),
        ({"quant_method": ["gptq"]}, "quantised as \\['gptq'\\]"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}},
         "has a sparsity_config"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 3}}}}, "num_bits 3"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3; what can be read is one of 2, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "format": "gptq_v2", "checkpoint_format": "gptq"},
         "says two formats"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:x": {}}}, "differs by layer"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]; give rows and columns"),
        ("awq", "quantization_config is 'awq', not an object"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_one_line(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as told:
        scheme_of({"quantization_config": change})
    assert "\n" not in str(told.value)


def test_what_says_the_same_in_other_words() -> None:
    for field in ("format", "checkpoint_format"):
        given = {"quant_method": "gptq", "bits": 4, "group_size": 128, field: "gptq_v2"}
        found = scheme_of({"quantization_config": given})
        assert found is not None and not found.zero_less
    dense = {"quant_method": "compressed-tensors", "format": "dense",
             "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "ignore": []}}  # fmt: skip
    assert scheme_of({"quantization_config": dense}) is not None


def broken(directory: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Why a checkpoint of which something is missing or misshapen isn't loaded."""
    saved(directory, name)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
    with pytest.raises(InputError) as told:
        Ranks(directory, (1.0,))
    assert "\n" not in str(told.value)
    return str(told.value)


Q = "model.layers.0.self_attn.q_proj"


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("packed-4-group", "weight_scale"), ("packed-4-group", "weight_shape"), ("int-row", "weight"),
        ("gptq-4", "scales"), ("gptq-4", "qzeros"), ("awq", "scales"), ("awq", "qzeros"), ("fp8-tiles", "weight"),
    ],
)  # fmt: skip
def test_a_part_that_is_missing(name: str, gone: str, tmp_path: Path) -> None:
    said = broken(tmp_path / name, name, without(f"{Q}.{gone}"))
    assert f"{Q}.{gone}" in said or "shapes" in said


@pytest.mark.parametrize("name", ["int-row", "float-row", "fp8-tiles"])
def test_a_scale_that_is_missing(name: str, tmp_path: Path) -> None:
    """The numbers alone would be read as weights that are far too large."""
    scale = f"{Q}.weight_scale_inv" if name == "fp8-tiles" else f"{Q}.weight_scale"
    said = broken(tmp_path / name, name, without(scale))
    assert f"{Q}.weight is in torch." in said and "no scale says what that means" in said


@pytest.mark.parametrize(
    ("name", "part"),
    [("packed-4-group", "weight_scale"), ("packed-4-zeros", "weight_zero_point"), ("int-row", "weight_scale"),
     ("gptq-4", "qzeros"), ("gptq-4", "scales"), ("awq", "qzeros"), ("fp8-tiles", "weight_scale_inv")],
)  # fmt: skip
@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 0)])
def test_shapes_that_disagree(name: str, part: str, cut: slice, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][cut]

    said = broken(tmp_path / name, name, change)
    assert f"{Q}.{part}" in said or "don't go together" in said
