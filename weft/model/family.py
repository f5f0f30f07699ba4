"""What a family's row can say, and how that and one model's configuration make a blueprint. No torch.

A flag is True, False, or the name of the field of `config.json` that says so. Knows configurations; knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.blueprint import (
    AttentionBranch,
    Axis,
    Blueprint,
    Matrix,
    MlpBranch,
    Norm,
    ProjectionBranch,
    StageParts,
    Within,
)
from weft.program.stages import Kind, Stage

Flag = bool | str
SLIDING, SCALED_QUERIES = "sliding_attention", "llama_4_scaling_beta"
KINDS = ("full_attention", SLIDING)  # of layers
# Names for one thing, in configurations and here.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "relu2": "relu2",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What tensors are called, in a layer after the layer's prefix. An empty norm isn't there. `queries`, `keys` and
    `values` may be one tensor, and so may `gate` and `up`; an empty gate isn't there."""

    layer: str = "model.layers.{}."
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    before_attention: str = "input_layernorm"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    after_mlp: str = ""


@dataclass(frozen=True)
class NormKind:
    """How all norms of rows are taken; see `blueprint.Norm`."""

    centred: bool = False
    offset: float = 0.0
    biased: bool = False


def everywhere(config: ModelConfig) -> tuple[bool, ...]:
    """All layers."""
    return (True,) * config.layers


def number(config: ModelConfig, name: str, above: float = float("-inf")) -> float:
    """A field's value. Raises `InputError` for what is no number, or not above that one."""
    value: Any = config.fields.get(name)
    if type(value) not in (int, float) or not above < value < float("inf"):
        least = "" if above == float("-inf") else f" above {above:g}"
        raise InputError(f"the configuration is inconsistent: {name} is {value!r}; it must be a number{least}")
    return float(value)


def no_factor(config: ModelConfig) -> float:
    """One."""
    return 1.0


def field_value(name: str) -> Callable[[ModelConfig], float]:
    """A field's value, as a number; 1.0 where it is missing or null."""
    return lambda config: 1.0 if config.fields.get(name) is None else number(config, name)


def decoder(config: ModelConfig, family: Family) -> Blueprint:
    """A decoder with rotary positions and an MLP, as the row says."""
    return _Declaring(config, family).blueprint()


@dataclass(frozen=True)
class Family:
    """What sets one family apart from a plain pre-norm Llama.

    `notes`: for people. `wrapped`: model types of which it is the text part; `formerly`: what checkpoints with code of
    their own call it. `fields`: what its configuration calls rms_norm_eps and the like; `defaults`: of fields that its
    files may leave out, as in transformers; `derived`: those that transformers makes from others then; `neutral`:
    values of fields beside which it would be computed otherwise.

    `norm`: of rows. `qk_norm`: of each query and key head; with `across`, over all heads. `parallel`: attention and MLP
    read one input. `windowed`: attention to the last `sliding_window` positions only, in the layers of that kind;
    `rotates`: layers in which positions turn queries and keys; `interleaved`: neighbours, not halves; `partial`: a part
    of each head, by partial_rotary_factor. `by_head`: the one tensor of queries, keys and values has the three of a
    head together. `ropes_by_kind`: layers that slide turn otherwise than those that don't; `own_ropes`: what files
    without rope_parameters mean is for transformers to say; `scaled_queries`: by position, if its rope says so.
    Factors: of embeddings, scores (instead of 1/sqrt(head width)), contributions and logits. `softcaps`: fields of
    scores and logits. `sinks`: the tensor. `aliases`: how names may begin, and how in files then. `declare`: all that
    it consists of.
    """

    architecture: str
    wrapped: tuple[str, ...] = ()
    formerly: tuple[str, ...] = ()
    notes: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    names: Names = Names()
    norm: NormKind = NormKind()
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: Flag = False
    across: bool = False
    parallel: Flag = False
    windowed: Flag = False
    rotates: Callable[[ModelConfig], tuple[bool, ...]] = everywhere
    interleaved: bool = False
    partial: bool = False
    by_head: bool = False
    ropes_by_kind: bool = False
    own_ropes: bool = False
    scaled_queries: bool = False
    embedding_factor: Callable[[ModelConfig], float] = no_factor
    score_factor: Callable[[ModelConfig], float] | None = None
    contribution_factor: Callable[[ModelConfig], float] = no_factor
    logit_factor: Callable[[ModelConfig], float] = no_factor
    softcaps: tuple[str, str] = ("", "")
    sinks: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    declare: Callable[[ModelConfig, Family], Blueprint] = decoder


class _Declaring:
    """A blueprint in the making."""

    def __init__(self, config: ModelConfig, family: Family) -> None:
        self.config, self.family, self.names = config, family, family.names
        self.heads = Axis("heads", config.heads, config.head_dim, unit=config.heads // config.kv_heads)
        self.kv_heads = Axis("kv_heads", config.kv_heads, config.head_dim, of="heads")
        self.width = Axis("width", config.intermediate, unit=16)
        self.vocabulary = Axis("vocabulary", config.vocabulary, unit=16)
        self.rotary = rotary_width(config) if family.partial else config.head_dim
        self.contribution = family.contribution_factor(config)

    def on(self, flag: Flag) -> bool:
        return bool(self.config.fields.get(flag)) if isinstance(flag, str) else flag

    def norm(self, name: str, factor: float = 1.0) -> Norm | None:
        kind = self.family.norm
        return Norm(name, kind.centred, kind.offset, kind.biased, factor) if name else None

    def blueprint(self) -> Blueprint:
        config, names, family = self.config, self.names, self.family
        norm = self.norm(names.norm, family.logit_factor(config))
        assert norm is not None, "no family is without a norm before the head"
        windowed = self.sliding() if self.on(family.windowed) else (False,) * config.layers
        window = config.fields.get("sliding_window")
        ropes, turned = ropes_of(config, family.rotates(config))
        if not family.scaled_queries:
            ropes = tuple({name: value for name, value in rope.items() if name != SCALED_QUERIES} for rope in ropes)
        return Blueprint(
            config.hidden, (self.heads, self.kv_heads, self.width, self.vocabulary),
            (StageParts(Stage("embed", None)),), self.layer(), (StageParts(Stage("head", Kind.GATHER)),),
            config.layers, Matrix(names.embedding, config.vocabulary, config.hidden), norm,
            Matrix(names.head, self.vocabulary, config.hidden), config.tied_embeddings,
            tuple(window if narrow else None for narrow in windowed), ropes, turned, self.rotary, config.norm_epsilon,
            names.layer, family.embedding_factor(config), self.softcap(1),
        )  # fmt: skip

    def sliding(self) -> tuple[bool, ...]:
        """Which layers have a window: as `layer_types` has it, where the family reads that; else all of them."""
        kinds = self.config.fields.get("layer_types") if "layer_types" in self.family.derived else None
        return tuple(kind == SLIDING for kind in (kinds or [SLIDING] * self.config.layers)[: self.config.layers])

    def softcap(self, which: int) -> float | None:
        name = self.family.softcaps[which]
        return number(self.config, name, 0.0) if name and self.config.fields.get(name) else None

    def layer(self) -> tuple[StageParts, ...]:
        names, stages, mlp = self.names, list[StageParts](), self.mlp()
        attention = AttentionBranch(
            self.projections(),
            Matrix(
                names.output, self.config.hidden, self.heads, self.on(self.family.output_bias), factor=self.contribution
            ),
            self.norm(names.before_attention), 2.0, self.head_norms(), remembers=self.kv_heads, softcap=self.softcap(0),
            sinks=(self.family.sinks, self.heads) if self.family.sinks else None,
        )  # fmt: skip
        if self.family.across:
            projected = ProjectionBranch(attention.first, None, attention.norm, 1.0, attention.head_norms, True)
            stages.append(StageParts(Stage("qk_norm", Kind.REDUCE, aside=2), (projected,)))
            attention = replace(attention, first=(), norm=None, head_norms=())
        if self.on(self.family.parallel):
            return (*stages, StageParts(Stage("block", Kind.REDUCE, ordered=True), (attention, mlp)))
        after_attention, after_mlp = self.norm(names.after_attention), self.norm(names.after_mlp)
        return (
            *stages, StageParts(Stage("attention", Kind.REDUCE, ordered=True), (attention,), after_attention),
            StageParts(Stage("mlp", Kind.REDUCE), (mlp,), after_mlp),
        )  # fmt: skip

    def head_norms(self) -> tuple[tuple[Norm, Axis], ...]:
        if not self.on(self.family.qk_norm):
            return ()
        offset = self.family.norm.offset
        return (
            (Norm(self.names.query_norm, offset=offset, factor=self.query_factor), self.heads),
            (Norm(self.names.key_norm, offset=offset), self.kv_heads),
        )

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that scores divided by the root of the head's width are as wanted."""
        wanted = self.family.score_factor
        return 1.0 if wanted is None else wanted(self.config) * self.config.head_dim**0.5

    def projections(self) -> tuple[Matrix, ...]:
        """Queries, keys and values."""
        names, biased, hidden = self.names, self.on(self.family.qkv_bias), self.config.hidden
        parts = ((names.queries, self.heads), (names.keys, self.kv_heads), (names.values, self.kv_heads))
        rows, width = sum(axis.numbers for _, axis in parts), self.config.head_dim
        halves = 0 if self.family.interleaved else 2 * -(-self.rotary // 2)
        turned = (halves, halves, 0)
        factors = (1.0 if self.on(self.family.qk_norm) else self.query_factor, 1.0, 1.0)
        found, start = [], 0
        for number, ((name, axis), first, factor) in enumerate(zip(parts, turned, factors, strict=True)):
            within = None
            if names.queries == names.keys:
                within = Within(start, width, rows)
                within = Within(number * width, 3 * width, rows) if self.family.by_head else within
            found.append(Matrix(name, axis, hidden, biased, first, factor, within))
            start += axis.numbers
        return tuple(found)

    def mlp(self) -> MlpBranch:
        names, width, biased = self.names, self.width, self.on(self.family.mlp_bias)
        gated = tuple(name for name in (names.gate, names.up) if name)
        rows = 2 * width.count if names.gate == names.up else 0
        first = (
            Matrix(name, width, self.config.hidden, biased, within=Within(at * width.count, 1, rows) if rows else None)
            for at, name in enumerate(gated)
        )
        last = Matrix(names.down, self.config.hidden, width, biased, factor=self.contribution)
        norm = self.norm(names.before_mlp)
        return MlpBranch(tuple(first), last, norm, 1.5, ACTIVATIONS[self.config.activation], bool(names.gate))


def rotary_width(config: ModelConfig) -> int:
    """Of each head, how many numbers are turned."""
    part = (config.fields.get("rope_parameters") or {}).get("partial_rotary_factor")
    return config.head_dim if part is None else int(config.head_dim * part)


def by_kind(rope: dict[str, Any]) -> bool:
    """Whether these rope_parameters are one for each kind of layer; None for a kind that doesn't turn."""
    return any(isinstance(rope.get(kind), dict) for kind in KINDS)


def ropes_of(config: ModelConfig, turns: tuple[bool, ...]) -> tuple[tuple[dict[str, Any], ...], tuple[int | None, ...]]:
    """All ways in which positions turn, and for each layer which of them it has: one for all layers, one by kind of
    layer, or a base for each layer, where 0 is none."""
    given, kinds = config.fields.get("rope_parameters") or {}, config.fields.get("layer_types") or []
    bases = config.fields.get("layer_rope_theta")
    if isinstance(bases, list):
        if not all(type(base) in (int, float) and 0 <= base < float("inf") for base in bases):
            raise InputError(f"the configuration is inconsistent: layer_rope_theta is {bases!r}; give numbers from 0")
        each = [given | {"rope_theta": base} if base else None for base in bases[: config.layers]]
    elif by_kind(given):
        each = [given[kind] for kind in kinds[: config.layers]]
    else:
        each = [given] * config.layers
    found: list[dict[str, Any]] = []
    for rope, on in zip(each, turns, strict=True):
        if on and rope is not None and rope not in found:
            found.append(rope)
    return tuple(found), tuple(
        found.index(r) if on and r is not None else None for r, on in zip(each, turns, strict=True)
    )
