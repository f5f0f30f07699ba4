"""Random models of given sizes, for benchmarks: speed doesn't depend on what the weights are.

python benchmarks/models.py h2048        makes it if it isn't there, and prints its directory
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 32000


SIZES = {
    "h256": Size(256, 4, 8, 4, 704, 4096),
    "h512": Size(512, 8, 8, 4, 1408, 8192),
    "h1024": Size(1024, 6, 16, 16, 2816, 8192),  # 12 h² parameters a layer
    "h2048": Size(2048, 3, 32, 32, 5632, 8192),
    "deep": Size(64, 32, 4, 4, 176, 512),
    "483m": Size(2048, 8, 16, 4, 5632),  # a Llama of 483 M parameters, embedding and head included
}


def random_llama(name: str) -> Path:
    """The directory of a random float32 Llama of this size, made on first use and kept with the temporary files."""
    directory = Path(gettempdir()) / f"weft-benchmark-{os.getuid()}-{name}"
    if (directory / "model.safetensors").is_file():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, intermediate_size=size.intermediate, vocab_size=size.vocabulary,
        max_position_embeddings=32768, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="8GB")
    return directory


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in SIZES:
        print(random_llama(sys.argv[1]))
    else:
        sys.exit(f"give one of {', '.join(SIZES)}")
