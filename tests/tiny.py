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


FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
YARN = {"factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 4.0}
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
    "ministral": ("Ministral", {"head_dim": 16, "sliding_window": 40, "layer_types": [SLIDING, FULL]}),
    "ministral3": ("Ministral3", {"head_dim": 16, "max_position_embeddings": 1024} | _rope(
        "yarn", **YARN, mscale_all_dim=1.0, llama_4_scaling_beta=0.1
    )),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 40}),
    "gemma3": ("Gemma3", {
        "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 40, "num_hidden_layers": 6,
        "final_logit_softcapping": 9.0,
    }),
    "phi3": ("Phi3", {"sliding_window": 50}),
    "phi3-part": ("Phi3", _rope("default", partial_rotary_factor=0.75)),
    "phi3-long": ("Phi3", {"original_max_position_embeddings": 64} | _rope("longrope", **LONG)),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 40}),
    "granite": ("Granite", FACTORS),
    "granite_swa": ("GraniteSWA", FACTORS | {
        "num_hidden_layers": 4, "sliding_window": 40, "layer_rope_theta": [0, 1e4, 5e4, 1e4]
    }),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "nemotron": ("Nemotron", {}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 40, "attention_bias": True}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
}  # fmt: skip
# Of each family, of sizes that no kernel likes: heads that ranks don't divide, one key/value head, odd widths.
ODD = {"hidden_size": 50, "intermediate_size": 37, "num_attention_heads": 5, "num_key_value_heads": 1}
OWN = {"head_dim": 10}  # where it isn't what hidden_size gives
FIRST = {family: name for name, (family, _) in reversed(MODELS.items())}
MODELS |= {
    f"{name}-odd": (family, MODELS[name][1] | ODD | (OWN if "head_dim" in MODELS[name][1] else {}))
    for family, name in reversed(FIRST.items())
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}  # that aren't named after their model
FAMILIES = tuple(reversed(FIRST.values()))  # one of each
DEPTH = 5  # layers of those that several sections share


def _deeper(changes: dict[str, Any]) -> dict[str, Any]:
    """What is said layer by layer is said over again."""
    lists = {name: (value * DEPTH)[:DEPTH] for name, value in changes.items() if name.startswith("layer_")}
    return changes | lists | {"num_hidden_layers": DEPTH}


DEEP = {f"{name}-deep": (MODELS[name][0], _deeper(MODELS[name][1])) for name in MODELS if not name.endswith("-odd")}


def random_model(family: str, sizes: dict[str, Any]) -> Any:
    """transformers' model of a family, whose norms and biases are not all alike."""
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**sizes)
    config._attn_implementation = "eager"  # the others leave caps and sinks out
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm", "bias", "sinks")):
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
        family, changes = (MODELS | DEEP)[name]
        return random_model(family, SMALL | changes)

    def model_anew(self, name: str) -> Any:
        """The same; its rotary embedding has not seen a long prompt yet."""
        return copy.deepcopy(self.model(name)) if {"dynamic", "long"} & {*name.split("-")} else self.model(name)

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
