"""The tokenizer of a GGUF model, from its metadata, in the form of transformers' own.

What cuts a text before pairs are merged has a name there, and each name is a row here: one that isn't known is refused,
because another cut gives other tokens, and worse answers that nobody notices. Knows metadata; knows nothing of tensors.
No torch.

Sources of the rows: each model's tokenizer.json; names: llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.errors import InputError
from weft.formats.gguf.architectures import END_NAMES
from weft.formats.gguf.header import GgufHeader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NONE = (None, "none", "no_vocab")  # what files without a tokenizer call theirs
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds: text, no text, text that is found whole, text of nobody
MOST_ADDED = 1 << 15  # tokens that are found whole; usual vocabularies have up to some thousands
MOST_MERGES = 1 << 20  # that pieces are made by; the largest in use have half of that
LONGEST_TOKEN = 1 << 10  # characters
MOST_WORK = 1 << 28  # squares of all tokens' lengths: what finding their merges takes; usual ones have 2^24
LONGEST_TEMPLATE = 1 << 20
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    """Words end where capitals begin."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}|{_SLASHES}"


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before pairs are merged: by these expressions, one after the other, each match on its own.
    `begins`: with the begin-of-text token, unless the file says otherwise; `whole`: a piece that is a token is not
    merged from parts; `composed`: characters are composed first (NFC)."""

    patterns: tuple[str, ...]
    begins: bool = False
    whole: bool = False
    composed: bool = False


# By what GGUF calls them; the tests hold each against somebody else's words.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
                    PreTokenizer((_LLAMA3,), begins=True, whole=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), PreTokenizer((_QWEN2,), composed=True)),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), begins=True, whole=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), PreTokenizer((_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),))),
    **dict.fromkeys(("smollm", "minerva-7b", "refact"), PreTokenizer((r"\p{N}", _GPT2))),
    "command-r": PreTokenizer((r"\p{N}", _GPT2), composed=True),
    **dict.fromkeys(("olmo", "mpt"), PreTokenizer((_GPT2,), composed=True)),
    "gpt-2": PreTokenizer((_GPT2,)),
}  # fmt: skip
# Tokens of SentencePiece's vocabularies that a file need not name.
USUAL = {"bos": 1, "eos": 2, "unknown": 0}


def tokenizer_of(header: GgufHeader) -> Any:
    """transformers' tokenizer of a model; None if its file has none. Raises `InputError`."""
    kind = header.get("tokenizer.ggml.model", str)
    if kind in NONE:
        return None
    builders = {"gpt2": _byte_level, "llama": _pieces}
    if kind not in builders:
        raise InputError(f"{header.path}: the tokenizer {kind!r} is not known in GGUF; known are {', '.join(builders)}")
    tokens = _tokens(header)
    backend, begins = builders[kind](header, tokens)
    _add_special(backend, header, tokens)
    usual = USUAL if kind == "llama" else {}
    named = {name: _named(header, tokens, key, usual) for name, key in
             {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()}  # fmt: skip
    _put_around(backend, header, named, begins)
    import transformers

    given = {f"{name}_token": tokens[token] for name, token in named.items() if token is not None}
    wrap: Any = transformers.PreTrainedTokenizerFast
    return wrap(tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=_template(header), **given)


def _template(header: GgufHeader) -> str | None:
    template: str | None = header.get("tokenizer.chat_template", str)
    if template is not None and len(template) > LONGEST_TEMPLATE:
        raise InputError(f"{header.path}: the chat template has {len(template)} characters, which none needs")
    return template


def _tokens(header: GgufHeader) -> list[str]:
    """By their ids; each is there once."""
    tokens = header.listed("tokenizer.ggml.tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{header.path} has a tokenizer without tokens; download it again")
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if len(token) > LONGEST_TOKEN or seen.setdefault(token, number) != number:
            raise InputError(f"{header.path}: token {number}, {token[:20]!r}, is there twice, or far too long")
    if sum(len(token) ** 2 for token in tokens) > MOST_WORK:
        longest = max(map(len, tokens))
        raise InputError(f"{header.path} has tokens of {longest} characters, far too many of them; download it again")
    return tokens


def _named(header: GgufHeader, tokens: Sequence[str], name: str, usual: dict[str, int]) -> int | None:
    default = usual.get(name) if usual.get(name, len(tokens)) < len(tokens) else None
    token: int | None = header.get(f"tokenizer.ggml.{name}_token_id", int, default)
    if token is not None and not 0 <= token < len(tokens):
        raise InputError(f"{header.path}: the {name} token is {token}, and there are {len(tokens)}; download it again")
    return token


def _byte_level(header: GgufHeader, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Bytes, merged pair by pair in the file's order."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = header.get("tokenizer.ggml.pre", str)
    if name not in PRE_TOKENIZERS:
        raise _unknown(header, name)
    cut, merges = PRE_TOKENIZERS[name], header.listed("tokenizer.ggml.merges")
    if merges is None:
        raise InputError(f"{header.path} has no tokenizer.ggml.merges; download it again")
    pairs = [_pair(header, merge) for merge in merges]
    backend = Tokenizer(_model(header, models.BPE, tokens, pairs, ignore_merges=cut.whole))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    if cut.composed:
        backend.normalizer = normalizers.NFC()
    return backend, cut.begins


def _unknown(header: GgufHeader, name: str | None) -> InputError:
    told, known = f"is {name!r}, which is not known" if name else "is missing", ", ".join(PRE_TOKENIZERS)
    what = f"what cuts texts (tokenizer.ggml.pre) {told}; known are {known}"
    return InputError(f"{header.path}: {what}; give another conversion of the model, or its Hugging Face directory")


def _pair(header: GgufHeader, merge: Any) -> tuple[str, str]:
    """Its halves; the first one may begin with a space."""
    at = merge.find(" ", 1) if isinstance(merge, str) else -1
    if at < 0:
        raise InputError(f"{header.path}: the merge {merge!r:.40} is no pair; download it again")
    return merge[:at], merge[at + 1 :]


def _pieces(header: GgufHeader, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """SentencePiece's: characters, merged to the pieces of the best scores; bytes where there is no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = _named(header, tokens, "unknown", USUAL)
    options = {"fuse_unk": True, "byte_fallback": True, "unk_token": tokens[unknown] if unknown is not None else None}
    backend = Tokenizer(_model(header, models.BPE, tokens, _merges(header, tokens), **options))
    spaced: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if header.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaced.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(spaced)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(back + ([decoders.Strip(" ", 1, 0)] if len(spaced) > 1 else []))
    return backend, True


def _merges(header: GgufHeader, tokens: list[str]) -> list[tuple[str, str]]:
    """Which pairs make a piece, the best first. Some files have no scores, but one number for all; then only merges
    that they list can tell."""
    scores, kinds = _for_each(header, tokens, "scores"), _kinds(header, tokens)
    if not scores:
        raise InputError(f"{header.path} has no scores for its tokens; download it again")
    normal = [score for score, kind in zip(scores, kinds, strict=True) if kind == NORMAL]
    if len(normal) < 2 or len({*normal}) > 1:
        return _by_score(header, tokens, scores, kinds)
    listed = header.listed("tokenizer.ggml.merges")
    if listed is None:
        raise InputError(f"{header.path} has the same score for all tokens, and no merges: nobody can tell how texts "
                         "become tokens; download a file that was made from the model's tokenizer")  # fmt: skip
    return [_pair(header, merge) for merge in listed]


def _by_score(header: GgufHeader, tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    ids, found = {token: number for number, token in enumerate(tokens)}, list[tuple[float, int, int, int, int, int]]()
    for number, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        if kind not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        for at in range(1, len(token)):
            left, right = ids.get(token[:at]), ids.get(token[at:])
            if left is not None and right is not None:
                found.append((-score, -at, at - len(token), number, left, right))
        if len(found) > MOST_MERGES:
            raise InputError(f"{header.path} has tokens that are made of others in more than {MOST_MERGES} ways")
    return [(tokens[left], tokens[right]) for *_, left, right in sorted(found)]


def _for_each(header: GgufHeader, tokens: list[str], name: str) -> list[Any]:
    """A list with something for each token; an empty one if there is none."""
    count = header.count(f"tokenizer.ggml.{name}")
    if count not in (0, len(tokens)):
        raise InputError(f"{header.path} has {count} {name} for {len(tokens)} tokens; download it again")
    return header.listed(f"tokenizer.ggml.{name}") or []


def _kinds(header: GgufHeader, tokens: list[str]) -> list[int]:
    """Of each token; names that end answers are control tokens, whatever the file says."""
    kinds = _for_each(header, tokens, "token_type") or [NORMAL] * len(tokens)
    return [CONTROL if token in END_NAMES else kind for token, kind in zip(tokens, kinds, strict=True)]


def _model(header: GgufHeader, kind: Any, tokens: list[str], merges: Any, **options: Any) -> Any:
    try:
        return kind({token: number for number, token in enumerate(tokens)}, merges, **options)
    except Exception as error:  # tokenizers raises bare ones, for a merge of no token, say
        raise InputError(f"{header.path}: the tokenizer's merges don't go with its tokens ({error})") from None


def _add_special(backend: Tokenizer, header: GgufHeader, tokens: list[str]) -> None:
    """What is found whole in a text: control tokens, which are no text, and those that somebody added."""
    from tokenizers import AddedToken

    kinds = _kinds(header, tokens)
    if (count := sum(kind in (CONTROL, USER_DEFINED) for kind in kinds)) > MOST_ADDED:
        raise InputError(f"{header.path} has {count} tokens that are found whole, and {MOST_ADDED} are the most")
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [AddedToken(token, normalized=False, special=special)
                 for token, kind in zip(tokens, kinds, strict=True) if kind == wanted and token]  # fmt: skip
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _put_around(backend: Tokenizer, header: GgufHeader, named: dict[str, int | None], begins: bool) -> None:
    """Tokens before and after each text, where the file says so, or its kind does."""
    from tokenizers import processors

    wanted = {
        "bos": header.get("tokenizer.ggml.add_bos_token", bool, begins),
        "eos": header.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    for name in (name for name, is_so in wanted.items() if is_so and named[name] is None):
        raise InputError(f"{header.path} wants a {name} token with each text, and names none; download another file")
    around = {name: token for name, token in named.items() if wanted.get(name) and token is not None}
    texts = {name: backend.id_to_token(token) for name, token in around.items()}
    if around:
        single = [*(texts[name] for name in texts if name == "bos"), "$A", *(texts[n] for n in texts if n == "eos")]
        special = [(texts[name], token) for name, token in around.items()]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
