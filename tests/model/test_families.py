"""Configurations and families: what is known, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.families import PAGE, lines_of, page
from tests.ranks import Ranks
from tests.tiny import FIRST, MODELS, SMALL, Checkpoints, prompt_of
from weft import LLM, SamplingParams
from weft.errors import InputError
from weft.model import kept_fields
from weft.model.configuration import complete_fields, configured, huggingface_fields
from weft.model.description import model_config
from weft.model.families import FAMILIES, blueprint_of


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    raw = getattr(transformers, f"{family}Config")(**{**SMALL, **changes}).to_dict()
    return raw | {"architectures": [f"{family}ForCausalLM"]}


def test_every_family_has_a_tiny_model() -> None:
    assert {f"{family}ForCausalLM" for family, _ in MODELS.values()} == {f.architecture for f in FAMILIES.values()}


def test_dimensions_and_flags(checkpoints: Checkpoints) -> None:
    config = model_config(checkpoints.directory("qwen2-window"))
    assert (config.hidden, config.heads, config.kv_heads, config.head_dim) == (48, 6, 2, 8)
    attention = blueprint_of(config).layer[0]
    assert all(matrix.biased for matrix in attention.first) and not any(m.biased for m in attention.last)
    assert blueprint_of(config).windows == (None, 40)
    assert model_config(checkpoints.directory("qwen3")).head_dim == 32


@pytest.mark.parametrize(
    ("name", "length"),
    [("llama", 1024), ("llama-linear", 2048), ("llama-dynamic", 1024), ("llama-yarn", 1024), ("llama-llama3", 1024)],
)
def test_context_counts_rope_scaling_in(checkpoints: Checkpoints, name: str, length: int) -> None:
    assert model_config(checkpoints.directory(name)).max_length == length


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (
            config_of("Starcoder2"),
            "Starcoder2ForCausalLM .starcoder2. is not known; closest by .* is Mistral.*; known are llama, ",
        ),
        (config_of("Llama") | {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "own.Own"}}, "OwnFor"),
        ({"model_type": "t5"}, "the architecture t5"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        (config_of("Llama") | {"num_hidden_layers": -1}, "num_hidden_layers -1; it must be above 0"),
        (config_of("Llama") | {"vocab_size": 0}, "vocab_size 0; it must be above 0"),
        (config_of("Llama", hidden_act="mish"), "activation 'mish' is not known; known are silu, swish, gelu"),
        (
            config_of("Gemma3Text", use_bidirectional_attention=True),
            "use_bidirectional_attention True computes what weft",
        ),
        (config_of("Qwen2") | {"is_causal": False}, "Qwen2ForCausalLM with is_causal False computes what weft"),
        (config_of("Llama") | {"is_causal": None}, "is_causal None"),
        (config_of("Llama") | {"per_layer_config": {"0": {"intermediate_size": 40}}}, "per_layer_config {'0'"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(raw: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        blueprint_of(configured(raw))


WEFT_READS = ("rope_parameters", "attention_bias", "mlp_bias", "use_sliding_window", "eos_token_id")


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_says_everything_is_read_without_transformers(name: str, checkpoints: Checkpoints) -> None:
    """And means what it means there; so do fields that it may leave out."""
    raw = json.loads((checkpoints.directory(name) / "config.json").read_text("utf-8"))
    optional = FAMILIES[raw["model_type"]].defaults
    scarce = {key: value for key, value in raw.items() if key not in optional}
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    ropes = dict(raw["rope_parameters"])
    if "rope_theta" in ropes:
        rope = dict(ropes)
        old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    for given in (raw, scarce, old):
        ours, theirs = complete_fields(given), huggingface_fields(given)
        assert theirs is not None
        if ours is None:  # of all of these, what each layer's window is
            assert (given is scarce and name in ("qwen2-window", "phi3-long")) or (
                given is old and ("rope_theta" not in ropes or FAMILIES[raw["model_type"]].own_ropes)
            )
            continue
        for key in (*WEFT_READS, *optional):
            assert ours.get(key) == theirs.get(key), key
        left, right = configured(given), configured(theirs | {"model_type": given["model_type"]})
        assert replace(left, architecture="") == replace(right, architecture="")
        assert blueprint_of(left) == blueprint_of(right)


@pytest.mark.parametrize(
    "change",
    [{"model_type": ["llama"]}, {"model_type": None}, {"rope_parameters": {"rope_type": ["linear"], "rope_theta": 1e4}},
     {"rope_parameters": {"rope_type": {}, "rope_theta": 1e4}}, {"rope_parameters": "linear"},
     {"num_hidden_layers": [2]}, {"hidden_act": 3}, {"max_position_embeddings": -1},
     {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"rope_type": ["yarn"]}},
     {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
     {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": float("inf")}},
     {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 10**400}},
     {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": "x",
                          "original_max_position_embeddings": 256}},
     {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                          "original_max_position_embeddings": 0}}],
)  # fmt: skip
def test_fields_of_odd_kinds_are_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama") | change))
    with pytest.raises(InputError) as told:
        blueprint_of(model_config(tmp_path))
    assert "\n" not in str(told.value)


SIX = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"], "sliding_window": 40}
LINEAR, YARN = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2,
                                                        "original_max_position_embeddings": 128}  # fmt: skip
MORE: list[tuple[str, dict[str, Any]]] = [
    # As files of before transformers 5 have them: two ropes in one, patterns instead of lists, parts by other names.
    ("Gemma3Text", SIX | {"rope_parameters": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    ("Gemma3Text", SIX | {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": LINEAR}),
    ("Gemma3Text", SIX | {"rope_parameters": ..., "layer_types": ..., "sliding_window_pattern": 3}),
    ("Olmo3", SIX | {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": YARN}),
    ("Olmo3", SIX | {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None}),
    ("Cohere2", {"rope_parameters": ..., "rope_theta": 5e4, "layer_types": ..., "sliding_window_pattern": 2,
                 "rotary_pct": 1.0, "head_dim": 8}),
    ("GPTNeoX", {"rope_parameters": ..., "rotary_pct": 0.5, "rotary_emb_base": 5000}),
    ("Nemotron", {"rope_parameters": ..., "partial_rotary_factor": 0.25, "rope_theta": 1e4}),
    ("Glm4", {"rope_parameters": ..., "partial_rotary_factor": 0.5, "rope_theta": 1e4, "eos_token_id": None}),
    ("Glm", {"rope_parameters": ..., "rope_theta": 1e4, "eos_token_id": ...}),
    ("Phi3", {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": None, "layer_types": ["full_attention"] * 2,
              "sliding_window": 40}),
    ("GPTNeoX", {"rope_parameters": ..., "rotary_pct": 0.25, "partial_rotary_factor": 1.0, "rope_theta": 5e3}),
    ("Ministral3", {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": None, "head_dim": 8}),
    ("SmolLM3", {"no_rope_layers": ..., "layer_types": ..., "no_rope_layer_interval": 2}),
    ("SmolLM3", {"layer_types": ..., "sliding_window": 40, "use_sliding_window": True}),
    ("GraniteSWA", {"layer_rope_theta": ..., "layer_types": ...}), ("Granite", {"attention_multiplier": ...}),
    ("Llama", {"num_key_value_heads": ...}), ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": ...}),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
               "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5}),
    ("Llama", {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}),
    ("Qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"],
               "sliding_window": ...}),
    ("Qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"],
               "sliding_window": ...}),
    ("Mistral", {"sliding_window": ...}), ("Mistral", {"sliding_window": 16}), ("Mistral", {"sliding_window": None}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change"), MORE)
def test_what_is_said_twice_or_left_out_means_what_it_means_in_transformers(
    family: str, change: dict[str, Any]
) -> None:
    given = {key: value for key, value in (config_of(family) | change).items() if value is not ...}
    theirs = huggingface_fields(given)
    assert theirs is not None
    whole = configured(given)
    through = configured(theirs | {"model_type": given["model_type"]})
    assert replace(whole, architecture="") == replace(through, architecture="")
    assert blueprint_of(whole) == blueprint_of(through) and whole.fields["rope_parameters"] == theirs["rope_parameters"]


@pytest.mark.parametrize(
    ("family", "change"),
    [("Mistral", {"sliding_window": "8"}), ("Mistral", {"layer_types": 7}), ("Qwen3", {"head_dim": 15}),
     ("Qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"], "sliding_window": 8}),
     ("Llama", {"eos_token_id": "2"}), ("Llama", {"eos_token_id": True}), ("Llama", {"eos_token_id": [[2]]})],
)  # fmt: skip
def test_what_is_odd_is_left_to_transformers(family: str, change: dict[str, Any]) -> None:
    assert complete_fields(config_of(family) | change) is None


def test_an_architecture_of_an_odd_kind_says_nothing(tmp_path: Path) -> None:
    for given in (5, "LlamaForCausalLM", {}, [], [None]):
        (tmp_path / "config.json").write_text(json.dumps(config_of("Llama") | {"architectures": given}))
        blueprint_of(model_config(tmp_path))


def test_whatever_a_file_leaves_open_is_transformers_to_say() -> None:
    raw = config_of("Llama")
    assert complete_fields(raw) is not None
    for change in (
        {"num_key_value_heads": None}, {"num_hidden_layers": "2"}, {"num_hidden_layers": 0}, {"rms_norm_eps": 1},
        {"hidden_size": 50},
        {"attention_bias": None}, {"partial_rotary_factor": 0.5}, {"rope_parameters": {"rope_type": "longrope"}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"model_type": "gemma2"}, {"rope_parameters": [1]},
    ):  # fmt: skip
        assert complete_fields({key: value for key, value in raw.items() if key != "head_dim"} | change) is None, change


WRONG = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -1},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
STRETCHED = {kind: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
             for kind in ("full_attention", "sliding_attention")}  # fmt: skip
BY_KIND = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in WRONG}
SHORT = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0],
         "long_factor": [1.0], "original_max_position_embeddings": 4096}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("Gemma3Text", {"layer_types": ["sliding_attention"]}), ("SmolLM3", {"no_rope_layers": [1]}),
        ("GraniteSWA", {"layer_rope_theta": [1e4]}), ("Cohere2", {"layer_types": []}),
        ("Gemma3Text", {"layer_types": ["full_attention"] * 2, "rope_parameters": WRONG}),
        ("Glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}}),
        ("Phi3", {"rope_parameters": SHORT}), ("Granite", {"logits_scaling": 0.0}),
        ("Granite", {"logits_scaling": None}),
        ("Gemma2", {"query_pre_attn_scalar": 0}), ("Gemma2", {"query_pre_attn_scalar": "x"}),
        ("Gemma2", {"attn_logit_softcapping": "x"}), ("Cohere2", {"logit_scale": "x"}),
        ("GraniteSWA", {"layer_rope_theta": ["x", 1]}), ("GraniteSWA", {"layer_rope_theta": [-1.0, 1]}),
        ("Gemma3Text", {"layer_types": ["full_attention"] * 2, "rope_parameters": STRETCHED}),
        ("Llama", {"rope_parameters": BY_KIND}), ("GPTNeoX", {"rope_parameters": BY_KIND}),
        ("Llama", {"rope_parameters": BY_KIND | {"full_attention": "x"}}),
        ("Llama", {"rope_parameters": BY_KIND | {"full_attention": {}}, "layer_types": ["sliding_attention"]}),
        ("Llama", {"rope_parameters": {kind: {"rope_type": "default"} for kind in BY_KIND},
                   "layer_types": ["full_attention"] * 2}),
        *(("Llama", {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"rope_type": kind, "factor": None}})
          for kind in ("linear", "dynamic", "llama3")),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": None}}),
        ("Llama", {"rope_parameters": SHORT | {"partial_rotary_factor": 0.25}}),
        ("Ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}),
        ("GPTNeoX", {"rope_parameters": ..., "rotary_emb_base": None}),
        ("Nemotron", {"head_dim": 12, "rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 0.75,
                      "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}}),
        ("Phi3", {"rope_parameters": {"rope_type": "dynamic", "partial_rotary_factor": 0.25, "factor": 2.0,
                  "rope_theta": 1e4}}),
        ("GraniteSWA", {"layer_types": ["linear_attention"] * 2}),
    ],
)  # fmt: skip
def test_what_says_nothing_of_some_layers_is_one_line(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as told:
        given = {key: value for key, value in (config_of(family) | change).items() if value is not ...}
        blueprint_of(configured(given))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("smollm3", {"use_sliding_window": False, "sliding_window": 40, "layer_types": ["sliding_attention"] * 4}),
        ("mistral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0,
                     "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.5}}),
        ("gpt_neox", {"rope_parameters": ..., "rotary_pct": 0.5, "partial_rotary_factor": 1.0, "rope_theta": 5e3}),
        ("ministral3", {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": None}),
    ],
)  # fmt: skip
def test_fields_count_where_they_do_in_transformers(
    name: str, change: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path, prompt = tmp_path / name, prompt_of(150)
    shutil.copytree(checkpoints.directory(name), path)
    raw = json.loads((path / "config.json").read_text("utf-8")) | change
    (path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    before, _ = checkpoints.reference(name, prompt)
    ranks = Ranks(path, (1.0, 1.0))
    found = ranks.logits([prompt], "iso:2")[0]
    ranks.close()
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert (expected - before).abs().max() > 2e-3 * expected.abs().max()  # the change is one


def test_the_page_is_as_the_rows_have_it() -> None:
    """`python -m benchmarks.families --write` makes it so."""
    assert page() == PAGE.read_text("utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_few_lines(name: str) -> None:
    assert 0 < lines_of(name) <= 40


def wrapped(path: Path, text: Path, outer: str, prefix: str, head: str) -> Path:
    """A checkpoint of a larger model whose text part is that one: pictures beside, other names."""
    tensors = load_file(text / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1) if name.startswith("model.") else head + name: tensor
               for name, tensor in tensors.items()}  # fmt: skip
    path.mkdir()
    save_file(renamed | {"vision_tower.weight": torch.zeros(3)}, path / "model.safetensors", {"format": "pt"})
    part = json.loads((text / "config.json").read_text("utf-8"))
    raw = {"model_type": outer, "architectures": ["LargerForConditionalGeneration"], "text_config": part,
           "vision_config": {"hidden_size": 8}, "eos_token_id": [1, 106],
           "tie_word_embeddings": part.pop("tie_word_embeddings")}  # fmt: skip
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(("name", "outer"), [("gemma3", "gemma3"), ("ministral3", "mistral3"), ("mistral", "mistral3")])
@pytest.mark.parametrize(("prefix", "head"), [("language_model.model.", "language_model."),
                                              ("model.language_model.", "")])  # fmt: skip
def test_the_text_part_of_a_larger_model(
    name: str, outer: str, prefix: str, head: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    larger = wrapped(tmp_path / "larger", checkpoints.directory(name), outer, prefix, head)
    assert model_config(larger).fields["eos_token_id"] == [1, 106]
    ranks = Ranks(larger, (1.0, 1.0))
    found, prompt = ranks.logits([prompt_of(90)], "iso:2")[0], prompt_of(90)
    ranks.close()
    expected, _ = checkpoints.reference(name, prompt)
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_what_is_around_a_text_part_says_whether_its_head_is_the_embedding() -> None:
    part = config_of("Gemma3Text") | {"tie_word_embeddings": False}
    assert configured({"model_type": "gemma3", "text_config": part}).tied_embeddings
    assert not configured({"model_type": "gemma3", "text_config": part, "tie_word_embeddings": False}).tied_embeddings


def test_another_text_part_is_refused() -> None:
    raw = {"model_type": "gemma3", "text_config": {"model_type": "qwen2", "hidden_size": 8}}
    with pytest.raises(InputError, match="the architecture gemma3 .gemma3. is not known"):
        blueprint_of(configured(raw))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FIRST.values()])
def test_checkpoints_of_fewer_bits(name: str, dtype: torch.dtype, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Computed in float32, they give what transformers computes from them in float32."""
    prompt = prompt_of(40)
    copy.deepcopy(checkpoints.model(name)).to(dtype).save_pretrained(tmp_path / name)
    theirs: Any = type(checkpoints.model(name))
    model = theirs.from_pretrained(tmp_path / name, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    ranks = Ranks(tmp_path / name, (2.0, 1.0))
    found = ranks.logits([prompt], "iso:2")[0]
    ranks.close()
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


SAMPLED = ("gemma2", "phi3", "olmo2", "granite_swa", "cohere2", "gpt_neox")


@pytest.mark.parametrize(
    "name", [each if each in SAMPLED else pytest.param(each, marks=pytest.mark.grid) for each in FIRST.values()]
)
def test_computed_in_bfloat16(name: str, checkpoints: Checkpoints) -> None:
    """As far from float32 as transformers is, or less: its own type's noise."""
    prompt, exact = prompt_of(40), checkpoints.model_anew(name)

    def scores(model: Any) -> list[float]:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=1)
        return [float(logprobs[at - 1, prompt[at]]) for at in range(1, len(prompt))]

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    options: dict[str, Any] = {"num_threads": 1, "tensor_parallel_size": 2, "overlap": "iso:2", "dtype": "bfloat16"}
    with LLM(checkpoints.directory(name), **options) as llm:
        [output] = llm.generate({"prompt_token_ids": list(prompt)}, params)
    told = output.prompt_logprobs
    assert told is not None
    found = [entry[token].logprob for entry, token in zip(told[1:], prompt[1:], strict=True) if entry is not None]
    expected, theirs = scores(exact), scores(copy.deepcopy(exact).to(torch.bfloat16))
    ours, noise = (sum(abs(a - b) for a, b in zip(each, expected, strict=True)) for each in (found, theirs))
    assert len(found) == len(expected) and 0 < ours <= 1.6 * noise


def test_what_transformers_completes_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second look at the same file doesn't import it; what is kept of another one, or broken, is not believed."""
    monkeypatch.setattr(kept_fields, "user_cache_path", lambda name: tmp_path / name)
    raw = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    first = model_config(path)
    [kept] = kept_fields.folder().glob("*.json")
    monkeypatch.setattr("weft.model.configuration.huggingface_fields", lambda raw: pytest.fail("asked again"))
    again = model_config(path)
    assert again == first and again.fields == first.fields
    monkeypatch.undo()
    monkeypatch.setattr(kept_fields, "user_cache_path", lambda name: tmp_path / name)
    for broken in ("", "[]", '{"raw": {}, "fields": {"hidden_size": 1}}'):
        kept.write_text(broken)
        assert model_config(path) == first
