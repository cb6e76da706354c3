"""
What decides the computation besides the weights: config.json against the metadata of the GGUF.

Both are read for what they mean, not for what they say: a key that is missing on one side stands
for the default of the program that reads that side. llama.cpp takes 10,000 for a rope base that the
GGUF does not name; a config.json without `head_dim` means hidden_size / heads.

Source: config classes of transformers 5; `llama_model::load_hparams` of the pinned llama.cpp.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pipelines.gguf_header import Array

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.gguf_header import Header, Value

# Numbers in a GGUF are float32, those of config.json are decimal.
_TOLERANCE: Final = 1e-6
_ROPE_BASE: Final = 10_000.0

Number: TypeAlias = int | float | bool | str

# (key below the architecture, keys of config.json of which the first that is there counts).
_SAME: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("embedding_length", ("hidden_size", "n_embd", "d_model", "dim")),
    ("attention.head_count", ("num_attention_heads", "n_head", "n_heads")),
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("expert_shared_count", ("n_shared_experts",)),
    ("expert_feed_forward_length", ("moe_intermediate_size",)),
    ("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",)),
    ("vocab_size", ("vocab_size",)),
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon",
     ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
    ("attn_logit_softcapping", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", ("final_logit_softcapping",)),
    ("attention.scale", ("attention_multiplier",)),
    ("embedding_scale", ("embedding_multiplier",)),
    ("residual_scale", ("residual_multiplier",)),
    ("logit_scale", ("logits_scaling", "logit_scale")),
    ("use_parallel_residual", ("use_parallel_residual",)),
    ("expert_weights_scale", ("routed_scaling_factor",)),
    ("attention.q_lora_rank", ("q_lora_rank",)),
    ("attention.kv_lora_rank", ("kv_lora_rank",)),
    ("ssm.state_size", ("state_size", "mamba_d_state")),
)  # fmt: skip
# llama.cpp does not run a model without these; what else is missing has a default or a reason.
_REQUIRED: Final = frozenset({"embedding_length", "attention.head_count"})
_EPSILONS: Final = frozenset({"attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"})
# Positions are rotated; the others count them, or use slopes (ALiBi).
_NO_ROPE: Final = frozenset({"bert", "jina-bert-v2", "gpt2", "bloom", "mpt", "starcoder", "t5",
                             "t5encoder", "opt", "jais", "refact", "mamba", "mamba2", "rwkv6",
                             "rwkv7"})  # fmt: skip
# Attention within a window is part of the graph that llama.cpp builds.
_WINDOWED: Final = frozenset({"gemma2", "gemma3", "gemma3n", "gemma4", "phi3", "cohere2", "gpt-oss",
                              "olmo2", "modern-bert", "gemma-embedding"})  # fmt: skip
_ENCODERS: Final = frozenset({"bert", "nomic-bert", "jina-bert-v2", "modern-bert"})
# Layers of the two largest models of the family, whose attention llama.cpp scales by heads.
_GEMMA_27B_LAYERS: Final = {"gemma2": 46, "gemma3": 62}
_KINDS: Final = frozenset({"default", "none", "linear", "yarn", "llama3", "su", "longrope",
                           "proportional"})  # fmt: skip
# Scalings that come with a factor on attention, too, which each family computes in its own way.
_KINDS_WITH_FACTOR: Final = frozenset({"yarn", "su", "longrope"})
_POOLING: Final = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2,
                   "pooling_mode_lasttoken": 3}  # fmt: skip


@dataclass(kw_only=True)
class Held:
    """
    All that was held against each other.

    Attributes:
        examined_count: Values that both sides state or imply.
        differing: One sentence for each that differs.
        notes: What upstream states and llama.cpp has no word for, and the reverse.
        seen: Keys of the GGUF for which there was something to compare with.
    """

    examined_count: int = 0
    differing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def hold(self, key: str, found: Value | None, wanted: Number, source: str) -> None:
        """Compare one value with what it should be; `source` says where that stands."""
        self.seen.add(key)
        if isinstance(found, Array):
            self.notes.append(f"{key}, which differs from layer to layer")
            return
        self.examined_count += 1
        if found is None:
            self.differing.append(f"{key} is missing, {source} means {_shown(wanted)}")
        elif not _equal(found, wanted):
            self.differing.append(f"{key} is {_shown(found)}, {source} means {_shown(wanted)}")


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """Both sides of one model."""

    header: Header
    architecture: str
    config: Mapping[str, Any]

    def found(self, key: str) -> Value | None:
        """Value in the GGUF below the architecture; an array of equal numbers counts as one."""
        value = self.header.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, Array) and value.element != "str":
            each: list[Any] = list(value.values())
            return each[0] if len(set(each)) == 1 else value
        return value

    def name(self, key: str) -> str:
        """The whole key."""
        return f"{self.architecture}.{key}"

    def declared(self, *keys: str) -> tuple[str, Any] | None:
        """First key of config.json that is there and not null."""
        return next(
            ((key, self.config[key]) for key in keys if self.config.get(key) is not None), None
        )

    def integer(self, *keys: str) -> int:
        """The same as an integer, 0 if there is none."""
        declared = self.declared(*keys)
        return declared[1] if declared and isinstance(declared[1], int) else 0

    @property
    def head_dim(self) -> int:
        """Length of one head, declared or implied."""
        heads = self.integer("num_attention_heads", "n_head", "n_heads")
        width = self.integer("hidden_size", "n_embd", "d_model", "dim")
        if self.architecture == "granite":
            # GraniteConfig has none; what stands there is not read.
            return width // heads if heads else 0
        return full_head_dim(self.config) or (width // heads if heads else 0)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of the text model: the section that a wrapper has, on top."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else dict(config)


def full_head_dim(config: Mapping[str, Any]) -> int:
    """
    Length of a head in the layers that see everything; 0 if it is not declared.

    Gemma 4 has longer heads there: `global_head_dim`, in newer files by layer.
    """
    layers = config.get("layer_types")
    by_layer = config.get("per_layer_config")
    if isinstance(layers, list) and isinstance(by_layer, dict):
        for number, own in by_layer.items():
            full = number.isdecimal() and int(number) < len(layers)
            if full and layers[int(number)] == "full_attention" and own.get("head_dim"):
                return int(own["head_dim"])
    return int(config.get("global_head_dim") or config.get("head_dim") or 0)


def hold_against(
    header: Header, architecture: str, config: Mapping[str, Any], source: Path | None = None
) -> Held:
    """
    Hold the metadata of a GGUF against config.json.

    Args:
        header: Of the GGUF.
        architecture: llama.cpp's name of it.
        config: Of the text model (`text_config`).
        source: Directory of upstream's files, for the pooling of an encoder.
    """
    sides = _Sides(header=header, architecture=architecture, config=config)
    held = Held()
    for key, names in _SAME:
        _same(held, sides, key, names)
    _epsilon(held, sides)
    _layers(held, sides)
    _heads(held, sides)
    _context(held, sides)
    _feed_forward(held, sides)
    _vocabulary(held, sides)
    if architecture not in _NO_ROPE:
        _rope(held, sides)
    _window(held, sides)
    _scale(held, sides)
    if source is not None and architecture in _ENCODERS:
        _encoder(held, sides, source)
    _undeclared(held, sides)
    return held


def _undeclared(held: Held, sides: _Sides) -> None:
    """
    Look at what the GGUF says although config.json has nothing that it could be compared with.

    llama.cpp reads the first two of any architecture. What else is there is named, so that nobody
    takes it for compared.
    """
    classes = sides.config.get("architectures") or [""]
    causal = sides.found("attention.causal")
    if causal is not None and str(classes[0]).endswith("ForCausalLM"):
        held.hold(sides.name("attention.causal"), causal, wanted=True, source=str(classes[0]))
    kind = str(rope_parameters(sides.config)["rope_type"]).lower()
    factor = sides.found("rope.scaling.attn_factor")
    if factor is not None and kind not in _KINDS_WITH_FACTOR:
        held.hold(sides.name("rope.scaling.attn_factor"), factor, 1.0,
                  f"rope_type {kind} of config.json")  # fmt: skip
    key = "rope.scaling.original_context_length"
    original = rope_parameters(sides.config).get("original_max_position_embeddings")
    if sides.name(key) not in held.seen and sides.found(key) is not None and original is not None:
        # Phi 3 states it of all its sizes, those without a scaling included.
        held.hold(sides.name(key), sides.found(key), original, "config.json")
    own = f"{sides.architecture}."
    held.notes += [
        f"{key}, which config.json does not state in a way that is known here"
        for key in sorted(sides.header.metadata.keys() - held.seen)
        if key.startswith(own)
    ]


def _same(held: Held, sides: _Sides, key: str, names: tuple[str, ...]) -> None:
    """Compare a value that both sides write the same way."""
    declared, found = sides.declared(*names), sides.found(key)
    if declared is None:
        if found is not None and key in _NEUTRAL and not _equal(found, _NEUTRAL[key]):
            held.hold(sides.name(key), found, _NEUTRAL[key], "config.json without it")
        return
    name, wanted = declared
    if not isinstance(wanted, int | float | str):
        return
    if found is None and key not in _REQUIRED and _may_lack(key, wanted):
        return
    held.hold(sides.name(key), found, wanted, f"{name} of config.json")


# What upstream computes with if config.json has no such key at all.
_NEUTRAL: Final[Mapping[str, Number]] = {
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


def _may_lack(key: str, wanted: Number) -> bool:
    """Tell whether a GGUF may do without a value that config.json states."""
    if key in {"attn_logit_softcapping", "final_logit_softcapping"}:
        return wanted == 0
    if key in {"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}:
        return wanted == 1
    # Epsilons have a rule of their own. Of the rest llama.cpp has its own defaults, or derives
    # them from the tensors: what is there must be right, what is not there is no fault.
    return key not in {"expert_count", "expert_used_count"} or wanted == 0


def _epsilon(held: Held, sides: _Sides) -> None:
    """One of both kinds of norm must have its epsilon, whatever the key is called upstream."""
    declared = sides.declared("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon",
                              "norm_epsilon")  # fmt: skip
    if declared and all(sides.found(key) is None for key in _EPSILONS):
        key = sides.name("attention.layer_norm_rms_epsilon")
        held.hold(key, None, declared[1], f"{declared[0]} of config.json")


def layers_count(config: Mapping[str, Any]) -> int:
    """Layers that config.json declares; 0 if it does not."""
    found = (config.get(key) for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    return next((value for value in found if isinstance(value, int)), 0)


def _layers(held: Held, sides: _Sides) -> None:
    layers = layers_count(sides.config)
    if layers:
        extra = sides.found("nextn_predict_layers")
        wanted = layers + (extra if isinstance(extra, int) else 0)
        held.hold(sides.name("block_count"), sides.found("block_count"), wanted,
                  "the number of layers in config.json")  # fmt: skip


def _heads(held: Held, sides: _Sides) -> None:
    """Heads of keys and values, and the length of one, each declared or implied on both sides."""
    heads = sides.integer("num_attention_heads", "n_head", "n_heads")
    if not heads:
        return
    kv = sides.integer("num_key_value_heads", "n_kv_heads", "num_kv_heads")
    if not kv:
        kv = 1 if sides.config.get("multi_query") is True else heads
    found_heads = sides.found("attention.head_count")
    found_kv = sides.found("attention.head_count_kv")
    if sides.config.get("kv_lora_rank") is not None:
        return  # compressed attention: heads and lengths of keys and values follow other rules
    held.hold(sides.name("attention.head_count_kv"),
              found_heads if found_kv is None else found_kv, kv,
              "config.json")  # fmt: skip
    width = sides.found("embedding_length")
    implied = (
        width // found_heads
        if isinstance(width, int) and isinstance(found_heads, int) and found_heads
        else None
    )
    for key in ("attention.key_length", "attention.value_length"):
        found = sides.found(key)
        held.hold(sides.name(key), implied if found is None else found, sides.head_dim,
                  "the head_dim of config.json")  # fmt: skip
        local, declared = sides.found(f"{key}_swa"), sides.integer("head_dim")
        if local is not None and declared:
            held.hold(sides.name(f"{key}_swa"), local, declared, "the head_dim of config.json")


# Where config.json says how many positions a model was trained with.
_POSITIONS: Final = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len",
    "seq_length", "max_length",
)  # fmt: skip


def context_tokens(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """
    Return the context that a model was trained with, after the key of config.json that says so.

    Args:
        config: Of the text model (`text_config`).

    Returns:
        None where config.json does not say.
    """
    name = next((key for key in _POSITIONS if config.get(key) is not None), None)
    tokens = config.get(name) if name else None
    if name is None or not isinstance(tokens, int):
        return None
    pad = config.get("pad_token_id")
    classes = config.get("architectures") or [""]
    if "oberta" in str(classes[0]) and isinstance(pad, int):
        tokens -= pad + 1  # positions start behind the padding token
    return name, tokens


def _context(held: Held, sides: _Sides) -> None:
    wanted = context_tokens(sides.config)
    if wanted is not None:
        found = sides.found("context_length")
        held.hold(sides.name("context_length"), found, wanted[1], f"{wanted[0]} of config.json")


def _feed_forward(held: Held, sides: _Sides) -> None:
    declared = sides.declared("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    found = sides.found("feed_forward_length")
    width = sides.integer("n_embd", "hidden_size")
    if declared is None and sides.architecture == "gpt2" and width:
        declared = ("n_embd", 4 * width)  # GPT2Config: n_inner of null means that
    if declared and isinstance(declared[1], int) and found is not None:
        held.hold(sides.name("feed_forward_length"), found, declared[1],
                  f"{declared[0]} of config.json")  # fmt: skip


def _vocabulary(held: Held, sides: _Sides) -> None:
    """Every row of the embeddings has a token, and every token a row."""
    tokens = sides.header.metadata.get("tokenizer.ggml.tokens")
    rows = next(
        (tensor.shape[-1] for tensor in sides.header.tensors if tensor.name == "token_embd.weight"),
        None,
    )
    if isinstance(tokens, Array) and rows is not None:
        held.hold("tokenizer.ggml.tokens", tokens.count, rows, "token_embd.weight")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return what config.json says about the rotation of the layers that see everything.

    transformers 5 keeps all of it in `rope_parameters`, by kind of layer if they differ; before,
    there were `rope_theta`, `rope_scaling` and names of each family.
    """
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = nested if isinstance(nested, dict) else {}
    found = dict(nested.get("full_attention") or nested)
    found.setdefault("rope_type", found.get("type") or "default")
    for key, names in (
        ("rope_theta", ("rope_theta", "rotary_emb_base", "global_rope_theta", "rope_base")),
        ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct", "rope_pct")),
        ("original_max_position_embeddings", ("original_max_position_embeddings",)),
    ):
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if found.get(key) is None and value is not None:
            found[key] = value
    return found


def _rope(held: Held, sides: _Sides) -> None:
    """The base, the part of a head that is rotated, and the scaling."""
    rope = rope_parameters(sides.config)
    base, found = rope.get("rope_theta"), sides.found("rope.freq_base")
    if base is not None or found is None:
        held.hold(
            sides.name("rope.freq_base"),
            _ROPE_BASE if found is None else found,
            _ROPE_BASE if base is None else base,
            "the rope_theta of config.json",
        )
    nested = sides.config.get("rope_parameters")
    local = (nested or {}).get("sliding_attention") if isinstance(nested, dict) else None
    local_base = (local or {}).get("rope_theta", sides.config.get("rope_local_base_freq"))
    if local_base is not None:
        found = sides.found("rope.freq_base_swa")
        held.hold(sides.name("rope.freq_base_swa"), _ROPE_BASE if found is None else found,
                  local_base, "the rope_theta of sliding layers in config.json")  # fmt: skip
    if sides.head_dim and sides.config.get("kv_lora_rank") is None:
        part = float(rope.get("partial_rotary_factor") or 1.0)
        if rope["rope_type"] == "proportional":
            part = 1.0  # rope_freqs.weight says which part is rotated
        length = sides.found("attention.key_length")
        found = sides.found("rope.dimension_count")
        held.hold(sides.name("rope.dimension_count"),
                  (length or sides.head_dim) if found is None else found,
                  int(sides.head_dim * part), "config.json")  # fmt: skip
    _rope_scaling(held, sides, rope)


def _rope_scaling(held: Held, sides: _Sides, rope: Mapping[str, Any]) -> None:
    type_, factor = sides.found("rope.scaling.type"), sides.found("rope.scaling.factor")
    kind = str(rope["rope_type"]).lower()
    names = {tensor.name for tensor in sides.header.tensors}
    where = f"rope_type {kind} of config.json"
    has_freqs = any(name.endswith("rope_freqs.weight") for name in names)
    if kind in {"linear", "yarn"}:
        held.hold(sides.name("rope.scaling.type"), type_, kind, where)
        held.hold(sides.name("rope.scaling.factor"), factor, rope.get("factor", 1.0), where)
    else:
        wanted = "longrope" if kind in {"su", "longrope"} else "none"
        if wanted == "none" or type_ is not None:
            held.hold(sides.name("rope.scaling.type"), type_ or "none", wanted, where)
        held.hold(sides.name("rope.scaling.factor"), factor or 1.0, 1.0, where)
    if kind == "yarn" and (original := rope.get("original_max_position_embeddings")):
        key = "rope.scaling.original_context_length"
        held.hold(sides.name(key), sides.found(key), original, where)
    if kind in {"su", "longrope"}:
        key = "rope.scaling.original_context_length"
        if (original := rope.get("original_max_position_embeddings")) is not None:
            held.hold(sides.name(key), sides.found(key), original, where)
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            held.hold(name, name in names or None, wanted=True, source=where)
    if kind in {"llama3", "proportional"}:
        held.hold("rope_freqs.weight", has_freqs or None, wanted=True, source=where)
    elif has_freqs and sides.architecture == "llama":
        held.differing.append(f"rope_freqs.weight is there, {where} scales no frequency")
    if kind not in _KINDS:
        held.notes.append(f"{where}, for which llama.cpp has no word")


def _window(held: Held, sides: _Sides) -> None:
    wanted = sides.config.get("sliding_window")
    found = sides.found("attention.sliding_window")
    if sides.config.get("use_sliding_window") is False:
        wanted = None
    if not isinstance(wanted, int):
        if found is not None:
            held.hold(sides.name("attention.sliding_window"), found, 0, "config.json without it")
        return
    if found is None and sides.architecture not in _WINDOWED:
        context = sides.integer("max_position_embeddings")
        if context > wanted:
            held.notes.append(
                f"the window: upstream attends to the last {wanted:,} tokens, llama.cpp's "
                f"{sides.architecture} to all, so behind that many they differ"
            )
        return
    held.hold(sides.name("attention.sliding_window"), found, wanted,
              "the sliding_window of config.json")  # fmt: skip


def _scale(held: Held, sides: _Sides) -> None:
    """
    What scores of Gemma are divided by: upstream declares it, llama.cpp derives it.

    It takes the length of a head, and for the largest model of a family hidden size by heads.
    """
    declared = sides.config.get("query_pre_attn_scalar")
    if sides.architecture not in _GEMMA_27B_LAYERS or not isinstance(declared, int | float):
        return
    heads = sides.integer("num_attention_heads")
    derived: float = sides.head_dim
    if sides.found("block_count") == _GEMMA_27B_LAYERS[sides.architecture] and heads:
        derived = sides.integer("hidden_size") / heads
    held.hold("the square of what llama.cpp divides attention by", derived, declared,
              "query_pre_attn_scalar of config.json")  # fmt: skip


def _encoder(held: Held, sides: _Sides, source: Path) -> None:
    """Both directions are attended to, and the vectors are pooled as upstream says."""
    causal = sides.found("attention.causal")
    held.hold(sides.name("attention.causal"), True if causal is None else causal, wanted=False,
              source="an encoder")  # fmt: skip
    try:
        pooling = json.loads((source / "1_Pooling" / "config.json").read_bytes())
    except (OSError, ValueError):
        held.notes.append("pooling, since upstream has no 1_Pooling/config.json")
        return
    modes = _POOLING.items()
    wanted = [number for key, number in modes if pooling.get(key) is True]
    if not wanted:
        # sentence-transformers 5 names the mode instead: "mean", "cls", "lasttoken".
        mode = pooling.get("pooling_mode")
        wanted = [number for key, number in modes if key.split("_")[2] == mode]
    if len(wanted) != 1:
        held.notes.append("pooling, of which 1_Pooling/config.json names no one mode that we know")
    else:
        held.hold(sides.name("pooling_type"), sides.found("pooling_type"), wanted[0],
                  "1_Pooling/config.json")  # fmt: skip


def _equal(found: Value, wanted: Number) -> bool:
    if isinstance(found, Array):
        return False
    if isinstance(found, bool) or isinstance(wanted, bool) or isinstance(found, str):
        return found == wanted
    if isinstance(wanted, str):
        return False
    return math.isclose(found, wanted, rel_tol=_TOLERANCE)


def _shown(value: Value | Number) -> str:
    if isinstance(value, Array):
        return f"an array of {value.count}"
    return f"{value:.8g}" if isinstance(value, float) else str(value)
