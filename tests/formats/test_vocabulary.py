"""Tokenizers from GGUF's metadata: the tokens of the model's own tokenizer, and refusals of what isn't known."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from weft.errors import InputError
from weft.execute.process import Peak
from weft.formats.gguf.architectures import _ends
from weft.formats.gguf.header import header_of
from weft.formats.gguf.vocabulary import PRE_TOKENIZERS
from weft.model.description import model_config
from weft.text import Tokenizer as Weft
from weft.text import has_tokenizer, tokenizer_of

TEXTS = [
    "The for statement", " leading", "  two  spaces\n\n\ttabs", "I'm sure they'll say it's John's; WE'RE NOT",
    "3.14159 and 1234567 in 2024", "naïve café ﬁ ½ ١٢٣ ²", "日本語のテキスト、中文", "e\u0301 is é",
    "def f(x):\r\n    return x\r\n", "CamelCaseWords HTTPServer mixedUP", "emoji 😀👍🏽 done", "a/b\\c//d", "...!!!???",
    "<end>", "x<end>y <think> z", "",
    "don\u2019t", "\u00a0nbsp\u3000wide", "ÀÉÎ áéí ǅ", "\x00\x07",
]  # fmt: skip
CORPUS = [text * 3 for text in TEXTS] + ["the statement of the words in the text is what it is " * 4]


def trained(split: Any, whole: bool = False) -> Tokenizer:
    """A byte-level BPE of some hundred merges, as tokenizer.json has it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def isolated(*patterns: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write(path: Path, tokenizer: Tokenizer, pre: str | None, **changes: Any) -> Path:
    """As convert_hf_to_gguf.py writes a byte-level vocabulary."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(changes.get("tokens", tokens))
    writer.add_token_types(changes.get("kinds", [3 if token == "<end>" else 1 for token in tokens]))
    writer.add_token_merges(changes.get("merges", [" ".join(pair) for pair in model["merges"]]))
    writer.add_eos_token_id(changes.get("eos", tokens.index("<end>")))
    if changes.get("bos", True):
        writer.add_bos_token_id(tokens.index("<end>"))
    for name in ("add_add_bos_token", "add_add_eos_token", "add_chat_template"):
        if name in changes:
            getattr(writer, name)(changes[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


DIGITS_FIRST = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
)
# What the models' own tokenizer.json has: transformers' table of expressions, or the library's own parts.
OWN: dict[str, Any] = {
    **{
        name: isolated(GGUF_PRE_TOKENIZER_SPLITS[name])
        for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o", "smaug-bpe")
    },
    **dict.fromkeys(("smollm", "refact", "command-r"), DIGITS_FIRST),
    "olmo": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


@pytest.mark.parametrize("pre", OWN)
def test_tokens_are_those_of_the_models_own_tokenizer(pre: str, tmp_path: Path) -> None:
    row = PRE_TOKENIZERS[pre]
    own = trained(OWN[pre], row.whole)
    if row.composed:
        own.normalizer = normalizers.NFC()
    found = tokenizer_of(write(tmp_path / "a.gguf", own, pre, add_add_bos_token=False))
    assert found is not None
    for text in TEXTS:
        assert found.encode(text) == ids(own, text), text
        if not row.composed:
            assert found.decode(found.encode(text)) == text


def test_rows_are_those_that_transformers_has_too() -> None:
    """Where both know a name, both cut alike."""
    for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
        if name not in PRE_TOKENIZERS:
            continue
        ours = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in PRE_TOKENIZERS[name].patterns]
        )
        theirs = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for text in TEXTS:
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), (name, text)


# As llama-vocab.cpp of llama.cpp has them, where it has the whole of an expression.
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PUBLISHED = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), (LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (LLAMA3.replace("{1,3}", ""),)),
    **dict.fromkeys(("smollm", "minerva-7b", "refact", "command-r"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("olmo", "mpt", "gpt-2"), (GPT2,)),
}  # fmt: skip


def test_every_row_is_held_against_somebody_elses_words() -> None:
    assert set(PRE_TOKENIZERS) == set(PUBLISHED) | {
        name for name in GGUF_PRE_TOKENIZER_SPLITS if name in PRE_TOKENIZERS
    }
    for name, patterns in PUBLISHED.items():
        ours, theirs = (
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(each), behavior="isolated") for each in expressions])
            for expressions in (PRE_TOKENIZERS[name].patterns, patterns)
        )
        for text in TEXTS:
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), (name, text)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["it", "'s", " ", "1", "2", " cats"]), ("llama-bpe", ["it", "'s", " ", "12", " cats"]),
        ("qwen2", ["it", "'s", " ", "1", "2", " cats"]), ("gpt-2", ["it", "'s", " 12", " cats"]),
    ],
)  # fmt: skip
def test_cuts_by_hand(pre: str, expected: list[str]) -> None:
    cuts = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in PRE_TOKENIZERS[pre].patterns]
    found = pre_tokenizers.Sequence(cuts).pre_tokenize_str("it's 12 cats")
    assert [text for text, _ in found] == expected


def test_control_and_added_tokens_are_found_whole(tmp_path: Path) -> None:
    own = trained(OWN["gpt-2"])
    vocabulary = own.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "<think>"]  # type: ignore[arg-type]
    kinds = [3 if token == "<end>" else 4 if token == "<think>" else 1 for token in tokens]
    found = tokenizer_of(write(tmp_path / "a.gguf", own, "gpt-2", tokens=tokens, kinds=kinds))
    assert found is not None
    end, think = tokens.index("<end>"), tokens.index("<think>")
    encoded = found.encode("x<end>y <think> z")
    assert encoded.count(end) == 1 and encoded.count(think) == 1
    assert found.end_ids == {end} and found.decode([think]) == "<think>"
    stream = found.stream((), skip_special_tokens=True)
    assert stream.step(end) + stream.step(think) + stream.end() == "<think>"


@pytest.mark.parametrize(
    ("pre", "given", "begins", "ends"),
    [("llama-bpe", {}, True, False), ("gpt-2", {}, False, False), ("gpt-2", {"add_add_bos_token": True}, True, False),
     ("llama-bpe", {"add_add_bos_token": False}, False, False), ("gpt-2", {"add_add_eos_token": True}, False, True)],
)  # fmt: skip
def test_what_stands_around_a_text(pre: str, given: dict[str, Any], begins: bool, ends: bool, tmp_path: Path) -> None:
    own = trained(OWN[pre], PRE_TOKENIZERS[pre].whole)
    found = tokenizer_of(write(tmp_path / "a.gguf", own, pre, **given))
    assert found is not None
    [end] = found.end_ids
    encoded = found.encode("some words")
    assert (encoded[0] == end, encoded[-1] == end) == (begins, ends)
    assert [token for token in encoded if token != end] == ids(own, "some words")


def test_chat_templates(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{{ eos_token }}"
    own = trained(OWN["gpt-2"])
    found = tokenizer_of(write(tmp_path / "a.gguf", own, "gpt-2", add_chat_template=template))
    assert found is not None and found.has_template
    wrapped = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<end>", eos_token="<end>")
    wrapped.chat_template = template
    messages = [{"role": "user", "content": "hi there"}]
    assert found.chat(messages) == wrapped.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    bare = tokenizer_of(write(tmp_path / "b.gguf", own, "gpt-2"))
    assert bare is not None and not bare.has_template
    with pytest.raises(InputError, match="has no chat template"):
        bare.chat(messages)


def pieces(path: Path, **changes: Any) -> tuple[Path, list[str], list[float]]:
    """As SentencePiece's vocabularies are written: pieces with scores, bytes, control tokens."""
    words = ["▁the", "▁a", "▁state", "ment", "▁statement", "th", "he", "st", "at", "▁t", "▁th", "▁s", "▁st", "en",
             "men", "ate", "▁is", "is", "▁▁"]  # fmt: skip
    letters = sorted({letter for word in words for letter in word} | set("defxyz.,"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(place) for place in range(len(words) + len(letters))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(changes.get("scores", scores))
    writer.add_token_types(kinds)
    if "merges" in changes:
        writer.add_token_merges(changes["merges"])
    for key, token in () if changes.get("unnamed") else (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{key}_token_id")(token)
    if "space" in changes:
        writer.add_add_space_prefix(changes["space"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path, tokens, scores


def best_first(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's BPE as it is described: of all neighbours that make a piece, those of the best score are joined,
    the leftmost first."""
    value = dict(zip(tokens, scores, strict=True))
    parts = list(text.replace(" ", "▁"))
    while True:
        joined = [(-value[left + right], at) for at, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
                  if left + right in value]  # fmt: skip
        if not joined:
            return [each for part in parts for each in ([part] if part in value else
                    [f"<0x{byte:02X}>" for byte in part.encode()])]  # fmt: skip
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("space", [None, True, False])
def test_sentencepiece(space: bool | None, tmp_path: Path) -> None:
    path, tokens, scores = pieces(tmp_path / "a.gguf", **({} if space is None else {"space": space}))
    found = tokenizer_of(path)
    assert found is not None
    for text in ("the statement is a test", "  the", "statements, dé", "日", "a the", " a"):
        prefixed = text if space is False else f" {text}"
        encoded = found.encode(text)
        assert encoded[0] == 1, "it begins with the begin-of-text token, unless the file says otherwise"
        assert [tokens[token] for token in encoded[1:]] == best_first(prefixed, tokens, scores), text
        assert found.decode(encoded[1:]) == text
        stream = found.stream((), skip_special_tokens=True)
        assert "".join([*(stream.step(token) for token in encoded[1:]), stream.end()]) == text
    assert found.end_ids == {2} and found.encode("a</s>")[-1] == 2


def test_sentencepiece_with_one_score_for_all(tmp_path: Path) -> None:
    """As llama.cpp's converter writes it where a model has no tokenizer.model: then the file's merges tell, if any."""
    path, tokens, scores = pieces(tmp_path / "a.gguf")
    value = dict(zip(tokens, scores, strict=True))
    merges = [(left, right) for left in tokens for right in tokens if left + right in value and left and right]
    merges.sort(key=lambda pair: -value["".join(pair)])
    alike = [-1000.0] * len(tokens)
    other, _, _ = pieces(tmp_path / "b.gguf", scores=alike, merges=[" ".join(pair) for pair in merges])
    one, two = tokenizer_of(path), tokenizer_of(other)
    assert one is not None and two is not None
    for text in ("the statement is a test", "statements, dé", "a the"):
        assert one.encode(text) == two.encode(text)
    refused(pieces(tmp_path / "c.gguf", scores=alike)[0], "the same score for all tokens, and no merges")


def test_sentencepiece_names_no_tokens(tmp_path: Path) -> None:
    """llama.cpp has the usual ones then; of other vocabularies a wanted token must be named."""
    found = tokenizer_of(pieces(tmp_path / "a.gguf", unnamed=True)[0])
    assert found is not None and found.encode("the")[0] == 1 and found.end_ids == {2}


def test_ends_are_found_by_their_names_whatever_their_kind(tmp_path: Path) -> None:
    own = trained(OWN["gpt-2"])
    vocabulary = own.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "<|im_end|>", "<|eot_id|>"]  # type: ignore[arg-type]
    kinds = [3 if token == "<end>" else 4 if token == "<|im_end|>" else 1 for token in tokens]
    path = write(tmp_path / "a.gguf", own, "gpt-2", tokens=tokens, kinds=kinds)
    assert _ends(header_of(path)) == [tokens.index(name) for name in ("<end>", "<|im_end|>", "<|eot_id|>")]
    found = tokenizer_of(path)
    assert found is not None and found.encode("x<|eot_id|>") == [*found.encode("x"), tokens.index("<|eot_id|>")]


def test_what_takes_too_much_is_refused(tmp_path: Path) -> None:
    own, path = trained(OWN["gpt-2"]), tmp_path / "a.gguf"
    vocabulary = own.get_vocab()
    many = [*sorted(vocabulary, key=vocabulary.get), *map(str, range(10_000, 50_000))]  # type: ignore[arg-type]
    with Peak() as peak:
        refused(write(path, own, "gpt-2", tokens=many, kinds=[4] * len(many)), "tokens that are found whole, and 32768")
        words = ["".join(letters) for length in range(1, 17) for letters in product("ab", repeat=length)]
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words)
        writer.add_token_scores([float(number) for number in range(len(words))])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        refused(path, "made of others in more than 1048576 ways")
    assert peak.taken < 400 << 20, "a 6 MB file; the objects of a million ways"


def refused(path: Path, said: str) -> None:
    with pytest.raises(InputError, match=said) as told:
        Weft(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


def test_what_is_not_known_is_an_error_and_never_a_default(tmp_path: Path) -> None:
    own, path = trained(OWN["gpt-2"]), tmp_path / "a.gguf"
    refused(write(path, own, "brand-new"), r"what cuts texts \(tokenizer.ggml.pre\) is 'brand-new', which is not known")
    refused(write(path, own, "default"), "is 'default', which is not known; known are llama-bpe")
    refused(write(path, own, None), r"\(tokenizer.ggml.pre\) is missing")
    refused(write(path, own, "gpt-2", model="rwkv"), "the tokenizer 'rwkv' is not known in GGUF; known are gpt2, llama")


def test_what_does_not_go_together(tmp_path: Path) -> None:
    own, path = trained(OWN["gpt-2"]), tmp_path / "a.gguf"
    refused(write(path, own, "gpt-2", merges=["ab"]), "the merge 'ab' is no pair")
    refused(write(path, own, "gpt-2", merges=["zz qq"]), "merges don't go with its tokens")
    refused(write(path, own, "gpt-2", tokens=["a", "b", "a"]), "token 2, 'a', is there twice")
    refused(write(path, own, "gpt-2", tokens=["a", "x" * 2000]), "is there twice, or far too long")
    refused(write(path, own, "gpt-2", tokens=[f"{n:0600}" for n in range(2000)]), "tokens of 600 characters, far too")
    refused(write(path, own, "gpt-2", kinds=[1, 1]), "has 2 token_type for")
    refused(write(path, own, "gpt-2", eos=10_000), "the eos token is 10000, and there are")
    refused(write(path, own, "gpt-2", bos=False, add_add_bos_token=True), "wants a bos token with each text, and names")
    refused(write(path, own, "gpt-2", add_chat_template="x" * 2_000_000), "the chat template has 2000000 characters")
    refused(pieces(tmp_path / "p.gguf", scores=[0.0, 1.0])[0], "has 2 scores for")


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert not has_tokenizer(tmp_path / "a.gguf") and tokenizer_of(tmp_path / "a.gguf") is None
    with pytest.raises(InputError, match="does not say llama"):
        model_config(tmp_path / "a.gguf")
