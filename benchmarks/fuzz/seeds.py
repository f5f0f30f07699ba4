"""Small whole models in every format, for files.py to damage: of one layer, with random numbers.

GGUF ones are written by the `gguf` package, the others as their formats' documents say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDTH, HEADS, KV_HEADS, VOCABULARY = 256, 512, 4, 2, 300
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}  # fmt: skip
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": HIDDEN,
    "intermediate_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


def gguf_model(folder: Path, kind: str) -> Path:
    """One file, with a tokenizer of bytes."""
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = [chr(code) for code in range(33, 127)] + [chr(0x100 + code) for code in range(256)]
    tokens = [*alphabet[: VOCABULARY - 2], "ab", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCABULARY - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    draw = np.random.default_rng(1)

    def add(name: str, shape: tuple[int, ...], stored: str) -> None:
        values = draw.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, quants.quantize(values, Type[stored]), raw_dtype=Type[stored])

    add("token_embd.weight", (VOCABULARY, HIDDEN), "Q8_0")
    for name, shape in MATRICES.items():
        add(f"blk.0.{name}.weight", shape, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        add(f"{name}.weight", (HIDDEN,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _words(rows: int, columns: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (rows, columns), dtype=torch.int64).to(torch.int32)


def packed4(rows: int, columns: int) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized, 4 bits in groups of 32, with zeros."""
    return {
        ".weight_packed": _words(rows, columns // 8), ".weight_scale": torch.rand(rows, columns // 32).bfloat16(),
        ".weight_zero_point": _words(rows // 8, columns // 32), ".weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip


def int8(rows: int, columns: int) -> dict[str, Tensor]:
    """compressed-tensors' int-quantized, a scale a row."""
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return {".weight": weight, ".weight_scale": torch.rand(rows, 1)}


def gptq(rows: int, columns: int) -> dict[str, Tensor]:
    """4 bits in groups of 64."""
    return {
        ".qweight": _words(columns // 8, rows), ".qzeros": _words(columns // 64, rows // 8),
        ".scales": torch.rand(columns // 64, rows).half(), ".g_idx": (torch.arange(columns) // 64).to(torch.int32),
    }  # fmt: skip


def awq(rows: int, columns: int) -> dict[str, Tensor]:
    """4 bits in groups of 64."""
    return {
        ".qweight": _words(columns, rows // 8), ".qzeros": _words(columns // 64, rows // 8),
        ".scales": torch.rand(columns // 64, rows).half(),
    }  # fmt: skip


def fp8(rows: int, columns: int) -> dict[str, Tensor]:
    """A scale for each tile of 128 by 128."""
    tiles = torch.rand(-(-rows // 128), -(-columns // 128))
    return {".weight": torch.randn(rows, columns).to(torch.float8_e4m3fn), ".weight_scale_inv": tiles}


def _compressed(kind: str, weights: dict[str, object]) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


QUANTISED: dict[str, tuple[Callable[[int, int], dict[str, Tensor]], dict[str, object]]] = {
    "packed4": (packed4, _compressed("pack-quantized", {"num_bits": 4, "type": "int", "group_size": 32,
                                                        "strategy": "group", "symmetric": False})),
    "int8": (int8, _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"})),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}  # fmt: skip


def quantised_model(folder: Path, kind: str) -> Path:
    """A directory in Hugging Face's format."""
    make, scheme = QUANTISED[kind]
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).bfloat16(),
               "model.norm.weight": torch.ones(HIDDEN)}  # fmt: skip
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"] = torch.ones(HIDDEN)
    for name, shape in MATRICES.items():
        tensors |= {f"model.layers.0.{NAMES[name]}{suffix}": value for suffix, value in make(*shape).items()}
    directory = folder / kind
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": scheme}))
    return directory


SEEDS: tuple[Callable[[Path], Path], ...] = (
    *(partial(gguf_model, kind=kind) for kind in ("Q4_1", "Q8_0", "MXFP4", "TQ1_0")),
    *(partial(quantised_model, kind=kind) for kind in QUANTISED),
)
