"""GGUF files of tiny models, written by the `gguf` package from what transformers has, and what they hold by its own
reader. Nothing here is weft's: names come from the package's table, rows are reordered as llama.cpp's converter does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from torch import Tensor

WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
HALVES = {  # of types that the package can't write: where blocks have float16 scales, in bytes
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
}  # fmt: skip
SIZES = {"Q2_K": 0.01, "Q3_K": 0.002, "Q4_K": 0.0004, "Q5_K": 0.0002, "Q6_K": 0.00003, "IQ4_NL": 0.002,
         "IQ4_XS": 0.0001}  # fmt: skip
Choice = Callable[[str, tuple[int, ...]], str]  # the type of a tensor, by its name and shape


def blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks of a type, with scales of a usual size."""
    numbers, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), dtype=np.uint8)
    for at in HALVES.get(kind, ()):
        scale = draw.uniform(0.5, 1.5, data.shape[:-1]).astype(np.float16) * np.float16(SIZES.get(kind, 0.01))
        data[..., at : at + 2] = scale[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def encoded(values: Tensor, kind: str, seed: int) -> np.ndarray:
    """As a file has it."""
    if kind in HALVES:
        return blocks(kind, tuple(values.shape), seed)
    return quants.quantize(values.float().numpy(), Type[kind])


def plain(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type that a tensor gets: vectors are never quantised."""
    return "F32" if len(shape) < 2 else kind


def permuted(values: Tensor, heads: int) -> Tensor:
    """As convert_hf_to_gguf.py's LlamaModel.permute has it."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def restored(values: Tensor, heads: int) -> Tensor:
    """Back from there."""
    return (
        values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


SILENT = {"freq_base": ("gemma2", "gptneox"), "width": ("phi3", "gptneox", "chatglm")}  # what isn't written for whom
PERMUTED, ONE_MORE = ("llama", "mistral3", "granite", "smollm3"), ("gemma2", "gemma3", "nemotron")


def stored(name: str, values: Tensor, config: Any, arch: str, back: bool = False) -> Tensor:
    """As convert_hf_to_gguf.py changes a tensor of some architectures; or `back` from there."""
    heads = config.num_attention_heads
    if arch in PERMUTED:
        counts = {".q_proj.": heads, ".k_proj.": config.num_key_value_heads}
        how = restored if back else permuted
        return next((how(values, count) for part, count in counts.items() if part in name), values)
    if arch in ONE_MORE and name.endswith("norm.weight"):
        return values - 1 if back else values + 1
    if arch == "gptneox" and "query_key_value" in name:
        one, other = ((3, heads), (heads, 3)) if back else ((heads, 3), (3, heads))
        return values.view(*one, -1, *values.shape[1:]).transpose(0, 1).reshape(*values.shape).contiguous().view(
            *other, -1, *values.shape[1:]
        ).reshape(values.shape)  # fmt: skip
    return values


def write(
    path: Path, model: Any, arch: str, choice: Choice | str = "F32",
    more: Callable[[gguf.GGUFWriter], None] | None = None, **options: Any,
) -> Path:  # fmt: skip
    """A transformers model as GGUF. `more`: writes what else the file should have."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), arch, **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if arch != "gptneox":
        writer.add_head_count_kv(config.num_key_value_heads)
    epsilons = [getattr(config, name, None) for name in ("layer_norm_eps", "norm_eps")]
    if epsilon := next(filter(None, epsilons), None):
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if arch not in SILENT["freq_base"]:
        writer.add_rope_freq_base(rope["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if arch not in SILENT["width"]:
        writer.add_key_length(width)
        writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    if more is not None:
        more(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for seed, (name, own) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = stored(name, own, config, arch)
        kind = (
            plain(name, tuple(values.shape), choice) if isinstance(choice, str) else choice(name, tuple(values.shape))
        )
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(called, encoded(values, kind, seed), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bytes_only(writer: gguf.GGUFWriter) -> None:
    """A tokenizer of single bytes, with an end."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "Ġa", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: ")


def held(path: Path, model: Any, arch: str) -> dict[str, Tensor]:
    """The tensors of a file by the package's own reader, under transformers' names and as it has them."""
    config = model.config
    found: dict[str, Tensor] = {}
    reverse = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name in model.state_dict():
        reverse[names.get_name(name, try_suffixes=(".weight", ".bias"))] = name
    for part in sorted(path.parent.glob(path.name)):
        for tensor in gguf.GGUFReader(str(part)).tensors:
            if tensor.name not in reverse:
                continue
            name = reverse[tensor.name]
            shape = tuple(int(size) for size in reversed(tensor.shape))
            values = torch.from_numpy(quants.dequantize(np.array(tensor.data), tensor.tensor_type).copy()).reshape(
                shape
            )
            found[name] = stored(name, values.float(), config, arch, back=True)
    return found
