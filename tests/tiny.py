"""Tiny random models of every family, made by transformers, and what transformers says of a prompt.

Weights are drawn wide, so that attention, positions and norms all matter: a decoder that gets one of them wrong is
off by far more than rounding.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = dict(
    vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.25, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-one-group": ("Llama", {"num_key_value_heads": 6}),
    "llama-biased-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-llama3": ("Llama", _rope("llama3", **LLAMA3)),
    "llama-linear": ("Llama", _rope("linear", factor=2.0)),
    "llama-dynamic": ("Llama", {"max_position_embeddings": 256} | _rope("dynamic", factor=4.0)),
    "llama-yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=256)),
    "mistral": ("Mistral", {"sliding_window": 96}),
    "mistral-whole": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def random_model(family: str, sizes: dict[str, Any]) -> Any:
    """transformers' model of a family, whose norms and biases are not all alike."""
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


class Checkpoints:
    """Saves each model on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def directory(self, name: str) -> Path:
        """A checkpoint in Hugging Face format."""
        path = self.folder / name
        if not path.exists():
            self.model(name).save_pretrained(path)
        return path

    @cache  # noqa: B019 (one for the whole session)
    def model(self, name: str) -> Any:
        """transformers' own model."""
        family, changes = MODELS[name]
        return random_model(family, SMALL | changes)

    def model_anew(self, name: str) -> Any:
        """The same; its rotary embedding has not seen a long prompt yet."""
        return copy.deepcopy(self.model(name)) if "dynamic" in name else self.model(name)

    def greedy(self, directory: Path, prompt: tuple[int, ...], tokens: int) -> list[int]:
        """What transformers makes of a checkpoint as it is on disk."""
        model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        found = list(prompt)
        with torch.no_grad():
            for _ in range(tokens):
                found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
        return found[len(prompt) :]

    @cache  # noqa: B019
    def reference(self, name: str, prompt: tuple[int, ...], tokens: int = 32) -> tuple[torch.Tensor, list[int]]:
        """Logits after the prompt, and the greedy tokens that follow, as transformers computes them."""
        model = self.model_anew(name)
        with torch.no_grad():
            out = model(torch.tensor([prompt]), use_cache=True)
            first, past, greedy = out.logits[0, -1], out.cache, []
            logits = first
            for _ in range(tokens):
                greedy.append(int(logits.argmax()))
                step = model(torch.tensor([[greedy[-1]]]), cache=past, use_cache=True)
                logits, past = step.logits[0, -1], step.cache
        return first, greedy


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist())
