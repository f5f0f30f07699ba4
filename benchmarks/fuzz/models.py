"""Tiny random models for the fuzz, one for each kind of tokenizer; what transformers makes of a prompt.

Their answers are soup: bytes that are no characters, pieces of characters, spaces, stop texts by chance.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from weft.detokenizer import BYTES

transformers.utils.logging.disable_progress_bar()

PIECES = [
    *'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-_!?',
    "é",
    "ö",
    "日",
    "本",
    "the",
    "ing",
    "er",
    "\n",
    "€",
    "🎉",
]
SPECIAL = ("<s>", "</s>", "<unk>")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
# With angles that stretch beyond 96 tokens, so that it matters how a prompt was cut.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer, the ranks that its model runs on, and what is special about that."""

    name: str
    ranks: int
    config: dict[str, Any]


KINDS = {
    "byte-level": Kind("byte-level", 2, {}),
    "byte-fallback": Kind("byte-fallback", 1, {}),
    "metaspace": Kind("metaspace", 1, {"max_position_embeddings": 96, "rope_parameters": DYNAMIC}),
}


def tokenizer(kind: str) -> Tokenizer:
    """One with all bytes and some pieces, as its kind has them."""
    made = {"byte-level": _byte_level, "byte-fallback": _byte_fallback, "metaspace": _metaspace}[kind]()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def _byte_level() -> Tokenizer:
    listed = dict.fromkeys([*SPECIAL, *BYTES])
    names = {byte: character for character, byte in BYTES.items()}
    for piece in (*PIECES, " a", " the", "    "):
        listed["".join(names[byte] for byte in piece.encode())] = None
    made = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(listed)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _byte_fallback() -> Tokenizer:
    pieces = [*PIECES, "▁", *(f"▁{piece}" for piece in PIECES if piece.isalnum()), "�"]
    listed = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    del listed["\n"]  # as in Llama 2: only the byte is there
    vocabulary = {token: at for at, token in enumerate(listed)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _metaspace() -> Tokenizer:
    pieces = [*SPECIAL, "▁", *(f"▁{piece}" for piece in PIECES if piece.isalnum()), *PIECES, "�"]
    made = Tokenizer(models.Unigram([(piece, -1.0 - at / 100) for at, piece in enumerate(pieces)], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def save(kind: Kind, folder: Path) -> Path:
    """A checkpoint with that kind of tokenizer; one end token of its generation_config.json doesn't exist."""
    directory, backend = folder / kind.name, tokenizer(kind.name)
    if directory.exists():
        return directory
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(directory)
    size, end = backend.get_vocab_size(), backend.token_to_id("</s>")
    config = transformers.LlamaConfig(
        **{
            "vocab_size": size, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 768,
            "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": end, "pad_token_id": None, **kind.config,
        }
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, size + 1000]}))
    return directory


class Reference:
    """The same model in transformers."""

    def __init__(self, directory: Path) -> None:
        self._model = transformers.LlamaForCausalLM.from_pretrained(directory).eval()

    def states(self, prompt: list[int]) -> list[list[float]]:
        """The last hidden states [tokens, width]."""
        model = copy.deepcopy(self._model)
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        return [[float(value) for value in row] for row in states]

    def scores(self, prompt: list[int]) -> list[float]:
        """Log-probabilities of the prompt's tokens, from the second one on."""
        model = copy.deepcopy(self._model)  # its rotary embedding remembers the longest prompt that it has seen
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=1)
        return [float(logprobs[at - 1, prompt[at]]) for at in range(1, len(prompt))]
