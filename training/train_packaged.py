"""Trains the model that weft carries in its package, and writes its model card.

    python training/train_packaged.py --minutes 40 --out weft/packaged

Byte-level BPE by `tokenizers`, a Llama by `transformers`, bfloat16 autocast, on a CPU or a GPU. The text is
CPython's own (see corpus.py). Reports the loss on documents that were never trained on, in nats per token and
in bits per byte. Needs nothing but weft's own dependencies.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from datetime import date
from pathlib import Path

import torch
from corpus import Document, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
REPEATS = {"topic": 4, "docstrings": 2, "source": 1}  # prose is rare beside source; people prompt in prose
END_OF_TEXT = "<|endoftext|>"


# It was not taught to converse: messages are lines of one text, which it goes on with.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ message['content'] }}"
    "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}{%- endfor -%}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries with one special token, which ends and separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def configuration() -> LlamaConfig:
    """5.5 M parameters: 11 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=2048,
        rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, chosen: list[Document]) -> torch.Tensor:
    """Token ids [tokens] of the documents, each ended by the special token."""
    ids: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch([document.text for document in chosen]):
        ids += [*encoded.ids, 0]
    return torch.tensor(ids)


def training_stream(tokenizer: PreTrainedTokenizerFast, chosen: list[Document]) -> torch.Tensor:
    """All that may be trained on [tokens], each kind of document as often as `REPEATS` says."""
    return encode(tokenizer, [document for document in chosen for _ in range(REPEATS[document.kind])])


def windows(stream: torch.Tensor, tokens: int, length: int) -> torch.Tensor:
    """Random windows [tokens // length, length]: neighbours in a batch must not come from one document."""
    starts = torch.randint(0, len(stream) - length, (tokens // length,))
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor, length: int) -> float:
    """Mean next-token loss in nats over `ids` [tokens], in windows of `length`."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    model.eval()
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows.to(model.device)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up over the first 2% of the time, then a cosine down to 2% of the peak; `done` in 0..1."""
    if done < 0.02:
        return peak * done / 0.02
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.02) / 0.98))))


def window_length(done: float) -> int:
    """Short windows first, whose attention is cheap; long ones last, so that the whole context is trained."""
    return 256 if done < 0.65 else 1024 if done < 0.9 else 2048


def train(arguments: argparse.Namespace) -> None:
    """Trains for the given time and writes checkpoint, tokenizer and card to `--out`."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = [document for document in documents() if document.text]
    kept = [document for document in everything if not document.held_out]
    tokenizer = train_tokenizer([d.text for d in kept if d.kind != "docstrings"])
    prose = [d for d in everything if d.held_out and d.kind != "source"]
    sources = [d for d in everything if d.held_out and d.kind == "source"]
    tests = {"prose": (prose, encode(tokenizer, prose)), "source": (sources, encode(tokenizer, sources))}

    model = LlamaForCausalLM(configuration()).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    stream = training_stream(tokenizer, kept)
    begin, seen, step = time.monotonic(), 0, 0
    while (done := (time.monotonic() - begin) / (60 * arguments.minutes)) < 1:
        rows = windows(stream, arguments.batch_tokens, window_length(done)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, arguments.peak)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, step = seen + rows.numel(), step + 1
        if step % 50 == 0:
            rate = seen / (time.monotonic() - begin)
            print(f"{done:5.1%} epoch {seen / len(stream):.2f} loss {loss.item():.3f} {rate:,.0f} tokens/s", flush=True)
    write(arguments.out, model, tokenizer, tests, seen, time.monotonic() - begin, arguments)


def write(out: Path, model, tokenizer, tests, seen: int, seconds: float, arguments) -> None:  # type: ignore[no-untyped-def]
    """Checkpoint in bfloat16, tokenizer, and a card with the loss of exactly those bfloat16 weights."""
    model = model.to(torch.bfloat16).to(torch.float32)  # measure what is stored
    measured = {}
    for name, (chosen, ids) in tests.items():
        nats = held_out_loss(model, ids, 1024)
        size = sum(len(document.text.encode()) for document in chosen)
        measured[name] = (nats, nats * len(ids) / size / math.log(2), len(ids))
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "LICENSE-DATA").write_text(Path(_license_file()).read_text("utf-8"))
    parameters = sum(p.numel() for p in model.parameters())
    rows = "\n".join(
        f"| {name} | {count:,} | {nats:.3f} | {math.exp(nats):.1f} | {bits:.3f} |"
        for name, (nats, bits, count) in measured.items()
    )
    (out / "README.md").write_text(
        CARD.format(
            parameters=parameters / 1e6,
            seen=seen / 1e6,
            minutes=seconds / 60,
            rows=rows,
            date=date.today(),
            python=platform.python_version(),
            torch=torch.__version__,
            device=model.device.type,
            threads=torch.get_num_threads(),
            requested=arguments.minutes,
            vocabulary=VOCABULARY,
        )
    )
    print(json.dumps({name: {"nats": nats, "bits_per_byte": bits} for name, (nats, bits, _) in measured.items()}))


def _license_file() -> str:
    """CPython's own licence text, wherever this build keeps it."""
    import sysconfig

    library = Path(sysconfig.get_paths()["stdlib"])
    for candidate in (library / "LICENSE.txt", library.parent.parent / "LICENSE"):
        if candidate.exists():
            return str(candidate)
    raise SystemExit(f"no LICENSE.txt below {library}: the card must carry the licence of the training text")


CARD = """# The model in the package

A Llama of {parameters:.1f} M parameters (hidden 256, 6 layers, 8 heads over 4 key/value heads, vocabulary
{vocabulary}, context 2048), stored in bfloat16, so that weft's main job runs without a download. It continues
Python documentation and source recognisably and knows nothing else: it is for trying weft, not for asking.
Messages of a chat are lines of one text for it, which it goes on with.

- **Text**: what comes with CPython {python}: the documentation topics of `help()`, the docstrings and the
  sources of the standard library (without its tests). Python Software Foundation licence, see `LICENSE-DATA`.
- **Tokenizer**: byte-level BPE trained on the same text by `tokenizers`.
- **Training**: {seen:.1f} M tokens in {minutes:.0f} minutes on {device} with {threads} threads, torch {torch},
  {date}. Again: `python training/train_packaged.py --minutes {requested:g} --out weft/packaged`
- **Held out** ({date}): documents chosen by a hash of their name, 2% of all, never trained on.

| held-out text | tokens | loss, nats a token | perplexity | bits a byte |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0, help="how long to train")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of one step")
    parser.add_argument("--out", type=Path, default=Path("weft/packaged"))
    train(parser.parse_args())
