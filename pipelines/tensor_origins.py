"""
Where each tensor of a GGUF comes from: which of upstream's, its rows in which order, what is added.

The expectation is not taken from the converter that is to be proven. The names are those of
gguf-py's table; what has to happen to the numbers follows from how llama.cpp computes, class by
class, in `RULES`:

    rope_pairs   transformers rotates the halves of a head, llama.cpp neighbours for these classes:
                 rows i and i + d/2 of each head of q and k come to lie side by side
    norm_plus    transformers multiplies by 1 + w, llama.cpp by w
    transposed   transformers' Conv1D keeps (in, out)
    heads_fused  q, k and v lie head by head upstream, one after the other in llama.cpp
    positions    the first pad_token_id + 1 positions are never used and left out
    vocabulary   rows of the embeddings that no token has are left out
    tied         the embeddings are the output, even if config.json does not say so
    kv_apart     what blows up compressed keys and values is one matrix upstream; llama.cpp has two,
                 that of the keys turned in each head

Experts are stacked by their number, a fused gate and up of experts is cut in halves, for every
class. Of a class that is not in the table the names hold, and where numbers differ only the
multiset of them can be compared: `Origin.certain` says so.

Source: modeling_*.py of transformers 5, `llama_model_rope_type` and the graphs of the pinned
llama.cpp.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipelines.source_tensors import as_float32

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from pipelines.gguf_py import TensorNames
    from pipelines.source_tensors import SourceTensor


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a class of transformers needs done to its tensors; see the module."""

    rope_pairs: bool = False
    norm_plus: float = 0.0
    transposed: tuple[str, ...] = ()
    heads_fused: bool = False
    positions: bool = False
    vocabulary: bool = False
    tied: bool = False
    kv_apart: bool = False


_PLAIN: Final = Rules()
_PAIRS: Final = Rules(rope_pairs=True)
_GEMMA: Final = Rules(norm_plus=1.0, tied=True)
_GEMMA3: Final = replace(_GEMMA, vocabulary=True)
_GEMMA4: Final = replace(_GEMMA3, norm_plus=0.0)
_CONV1D: Final = Rules(transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"))
_ROBERTA: Final = Rules(positions=True)

RULES: Final[Mapping[str, Rules]] = {
    "BertForMaskedLM": _PLAIN,
    "BertModel": _PLAIN,
    "BloomForCausalLM": Rules(heads_fused=True),
    "CohereForCausalLM": _PLAIN,
    "DeepseekV2ForCausalLM": Rules(kv_apart=True),
    "DeepseekV3ForCausalLM": Rules(kv_apart=True),
    "DistilBertModel": _PLAIN,
    "GPT2LMHeadModel": _CONV1D,
    "GPTNeoXForCausalLM": Rules(heads_fused=True),
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "GemmaForCausalLM": _GEMMA,
    "GraniteForCausalLM": _PAIRS,
    "LlamaForCausalLM": _PAIRS,
    "MistralForCausalLM": _PAIRS,
    "MixtralForCausalLM": _PAIRS,
    "Olmo2ForCausalLM": _PLAIN,
    "Phi3ForCausalLM": _PLAIN,
    "PhiForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen2MoeForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _PLAIN,
    "RobertaModel": _ROBERTA,
    "SmolLM3ForCausalLM": _PAIRS,
    "Starcoder2ForCausalLM": _PLAIN,
    "XLMRobertaModel": _ROBERTA,
}

# What belongs to no text model, is recomputed, or serves a training task: never in a text GGUF.
_NOT_TEXT: Final = re.compile(
    r"(^|\.)(vision|visual|audio|vit|vpm|siglip2|talker|token2wav|code2wav|resampler|mm_projector|"
    r"multi_modal_projector|connector|merger|projector|image_newline|patch_embed|image_newline)"
    r"|vision_|audio_"
)
_NOT_WEIGHTS: Final = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"
    r"|position_ids$|^(bert\.|roberta\.)?pooler\.|^cls\.|^lm_head\.(dense|layer_norm|decoder|bias)"
    r"|^vocab_(transform|layer_norm|projector)"
)
_EXPERT: Final = re.compile(r"\.experts\.(\d+)\.")
_KV: Final = ".kv_b_proj.weight"
_BLOCK: Final = re.compile(r"\.(\d+)\.")
_PREFIXES: Final = ("bert.", "roberta.", "distilbert.", "transformer.", "model.")
_ADDED: Final = ("model.", "transformer.")
_AXES_OF_EXPERTS: Final = 3
EMBEDDINGS: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
# Made of config.json, of no tensor: `verify_tensors` computes what must be in them.
COMPUTED: Final = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """
    What one tensor of a GGUF has to hold.

    Attributes:
        name: llama.cpp's name.
        parts: Upstream's tensors. Several are stacked along a new first axis.
        rows: Row of the parts, all of them one after the other, for each row of the GGUF; None: as
            they are. Rows of a vector are its elements.
        shape: Shape that it must have in numpy's order, row length last.
        plus: Is added to every value, in float32.
        transposed: Rows are upstream's columns.
        turned: So many of `rows` at a time are transposed; 0: none are.
        first_rows: The GGUF may leave out rows at the end.
        certain: Whether the numbers must be equal; if not, only the rule is unknown.
    """

    name: str
    parts: tuple[SourceTensor, ...]
    shape: tuple[int, ...]
    rows: NDArray[np.int64] | None = None
    plus: float = 0.0
    transposed: bool = False
    turned: int = 0
    first_rows: bool = False
    certain: bool = True

    @property
    def upstream(self) -> str:
        """Name for people: the first part's, with a note of how many there are."""
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return self.parts[0].name + more

    @property
    def dtype(self) -> str:
        """Type that `matrix` returns: upstream's, F32 if the parts differ in it."""
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "F32"

    @property
    def rows_count(self) -> int:
        """Number of rows that `matrix` can return."""
        if self.transposed:
            return self.parts[0].shape[1]
        if self.rows is not None:
            return len(self.rows) * self.shape[-2] // self.turned if self.turned else len(self.rows)
        return sum(_rows_count(part) for part in self.parts)

    def matrix(self, start: int, stop: int) -> NDArray[Any]:
        """
        Read rows [start, stop) as upstream stores them, in the order of the GGUF.

        Returns:
            (rows, row length) in `dtype`, BF16 as uint16; `plus` is not added.
        """
        first = self.parts[0]
        if self.transposed:
            return np.ascontiguousarray(first.array()[:, start:stop].T)
        if self.turned and self.rows is not None:
            return self._turned(start, stop, self.rows)
        if len(self.parts) == 1:
            return _table(first)[slice(start, stop) if self.rows is None else self.rows[start:stop]]
        numbers = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        each = _rows_count(first)
        owners = numbers // each
        return np.concatenate(
            [
                self._typed(part, numbers[owners == part] - part * each)
                for part in dict.fromkeys(owners.tolist())
            ]
        )

    def _turned(self, start: int, stop: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read whole heads, turn each, and cut out the rows that are wanted."""
        width = self.shape[-2]
        first, last = start // width, -(-stop // width)
        heads = _table(self.parts[0])[rows[first * self.turned : last * self.turned]]
        turned = heads.reshape(last - first, self.turned, width).swapaxes(1, 2)
        whole = np.ascontiguousarray(turned).reshape(-1, self.turned)
        return whole[start - first * width : stop - first * width]

    def _typed(self, part: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        tensor = self.parts[part]
        values = _table(tensor)[rows]
        return values if tensor.dtype == self.dtype else as_float32(values, tensor.dtype)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """
    All tensors of a GGUF and of its source, held against each other by name.

    Attributes:
        origins: By llama.cpp's name.
        unknown: Upstream's weights for which the table has no name.
        ignored_count: Upstream's tensors that are no part of a text model, or no weights.
        tied: Whether the embeddings serve as output, so that no output tensor is needed.
        exact: Whether the class is in `RULES`.
    """

    origins: Mapping[str, Origin]
    unknown: tuple[str, ...]
    ignored_count: int
    tied: bool
    exact: bool


@dataclass(kw_only=True)
class _Found:
    """Parts of each GGUF tensor while they are collected: {name: {expert or 0: part}}."""

    parts: dict[str, dict[int, SourceTensor]] = field(default_factory=dict)
    halves: dict[str, tuple[SourceTensor, int]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    ignored_count: int = 0


def trace(
    sources: Mapping[str, SourceTensor], names: TensorNames, config: Mapping[str, Any], class_: str
) -> Traced:
    """
    Find the origin of every tensor that the GGUF must have.

    Args:
        sources: Upstream's weights by name.
        names: The table of names for the architecture.
        config: Of the text model.
        class_: Upstream's class, e.g. "LlamaForCausalLM".
    """
    rules = RULES.get(class_)
    found = _Found()
    apart: dict[str, Origin] = {}
    for name, tensor in sources.items():
        if _NOT_TEXT.search(name) or _NOT_WEIGHTS.search(name):
            found.ignored_count += 1
        elif rules and rules.kv_apart and name.endswith(_KV):
            apart |= _keys_and_values(tensor, names, config)
        elif not (_half_experts(tensor, names, found) or _whole(tensor, names, found)):
            found.unknown.append(name)
    origins = apart
    for name, by_expert in found.parts.items():
        parts = tuple(by_expert[number] for number in sorted(by_expert))
        stacked = (len(parts),) if _EXPERT.search(parts[0].name) else ()
        origin = Origin(
            name=name, parts=parts, shape=stacked + parts[0].shape, certain=rules is not None
        )
        origins[name] = _ruled(origin, rules or _PLAIN, config)
    for name, (tensor, half) in found.halves.items():
        origins[name] = replace(_half(name, tensor, half), certain=rules is not None)
    declared = config.get("tie_word_embeddings", rules.tied if rules else False)
    tied = declared is True or OUTPUT not in origins
    if tied and EMBEDDINGS in origins:
        # Upstream computes with the embeddings whatever else is stored as its output.
        origins[OUTPUT] = replace(origins[EMBEDDINGS], name=OUTPUT)
    return Traced(
        origins=origins,
        unknown=tuple(found.unknown),
        ignored_count=found.ignored_count,
        tied=tied,
        exact=rules is not None,
    )


def _whole(tensor: SourceTensor, names: TensorNames, found: _Found) -> bool:
    """File a tensor under llama.cpp's name; False if there is none."""
    expert = _EXPERT.search(tensor.name)
    merged = _EXPERT.sub(".experts.", tensor.name)
    target = next((name for each in _spellings(merged) if (name := names.of(each))), None)
    if target is None:
        return False
    parts = found.parts.setdefault(target, {})
    number = int(expert[1]) if expert else 0
    if number in parts:
        return False
    parts[number] = tensor
    return True


def _half_experts(tensor: SourceTensor, names: TensorNames, found: _Found) -> bool:
    """File `experts.gate_up_proj` (experts, 2 x ffn, hidden) as the two tensors that it is."""
    name = tensor.name.removesuffix(".weight")
    if not name.endswith("experts.gate_up_proj") or len(tensor.shape) != _AXES_OF_EXPERTS:
        return False
    stem = name.removesuffix("gate_up_proj")
    for half, word in enumerate(("gate_proj", "up_proj")):
        target = next(
            (n for each in _spellings(f"{stem}{word}.weight") if (n := names.of(each))), None
        )
        if target is None:
            return False
        found.halves[target] = (tensor, half)
    return True


def _half(name: str, tensor: SourceTensor, half: int) -> Origin:
    experts, both, width = tensor.shape
    ffn = both // 2
    first = np.arange(experts, dtype=np.int64)[:, None] * both + half * ffn
    rows = (first + np.arange(ffn, dtype=np.int64)[None, :]).ravel()
    return Origin(name=name, parts=(tensor,), shape=(experts, ffn, width), rows=rows)


def _keys_and_values(
    tensor: SourceTensor, names: TensorNames, config: Mapping[str, Any]
) -> dict[str, Origin]:
    """Cut `kv_b_proj` (heads x (keys + values), rank) into its keys, turned, and its values."""
    heads = _integer(config, "num_attention_heads")
    keys, values = _integer(config, "qk_nope_head_dim"), _integer(config, "v_head_dim")
    rank = tensor.shape[-1]
    numbers = np.arange(heads * (keys + values), dtype=np.int64).reshape(heads, keys + values)
    cuts = {
        "k_b_proj": ((heads, rank, keys), numbers[:, :keys], keys),
        "v_b_proj": ((heads, values, rank), numbers[:, keys:], 0),
    }
    origins: dict[str, Origin] = {}
    for word, (shape, rows, turned) in cuts.items():
        target = names.of(tensor.name.replace("kv_b_proj", word))
        if target is not None and numbers.size == tensor.shape[0]:
            origins[target] = Origin(
                name=target,
                parts=(tensor,),
                shape=shape,
                rows=np.ascontiguousarray(rows).ravel(),
                turned=turned,
            )
    return origins


def _spellings(name: str) -> Iterator[str]:
    """Yield a name as the table may spell it: with and without the prefixes that wrappers add."""
    name = name.replace("language_model.", "").replace("text_model.", "")
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    if name.endswith((".experts.down_proj", ".experts.gate_up_proj", "layer_scalar")):
        name += ".weight"
    yield name
    if block := _BLOCK.search(name):
        # gguf-py names Mixtral's experts as Mistral's own files do.
        yield re.sub(
            r"^.*block_sparse_moe\.experts", f"layers.{block[1]}.feed_forward.experts", name
        )
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
    for prefix in _ADDED:
        yield prefix + name


def _ruled(  # noqa: PLR0911 - one for each rule
    origin: Origin, rules: Rules, config: Mapping[str, Any]
) -> Origin:
    """Apply what the class needs done to this tensor."""
    name, (first, *_) = origin.parts[0].name, origin.parts
    heads = _integer(config, "num_attention_heads", "n_head")
    if rules.rope_pairs and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
        if ".k_proj." in name:
            heads = _integer(config, "num_key_value_heads") or heads
        if heads and not first.shape[0] % (2 * heads):
            return replace(origin, rows=_pairs(first.shape[0], heads))
    if (
        rules.heads_fused
        and re.search(r"query_key_value\.(weight|bias)$", name)
        and heads
        and not first.shape[0] % (3 * heads)
    ):
        return replace(origin, rows=_by_kind(first.shape[0], heads))
    if rules.norm_plus and name.endswith("norm.weight"):
        return replace(origin, plus=rules.norm_plus)
    if rules.transposed and name.endswith(rules.transposed):
        return replace(origin, transposed=True, shape=origin.shape[::-1])
    if rules.positions and name.endswith("position_embeddings.weight"):
        pad = config.get("pad_token_id")
        skipped = pad + 1 if isinstance(pad, int) else 0
        rows = np.arange(skipped, first.shape[0], dtype=np.int64)
        return replace(origin, rows=rows, shape=(len(rows), *first.shape[1:]))
    if rules.vocabulary and origin.name == EMBEDDINGS:
        return replace(origin, first_rows=True)
    return origin


def _pairs(rows_count: int, heads: int) -> NDArray[np.int64]:
    """Row of upstream for each row of the GGUF: halves of each head, interleaved."""
    numbers = np.arange(rows_count, dtype=np.int64).reshape(heads, 2, rows_count // heads // 2)
    return np.ascontiguousarray(numbers.swapaxes(1, 2)).ravel()


def _by_kind(rows_count: int, heads: int) -> NDArray[np.int64]:
    """Row of upstream for each row of the GGUF: all queries, then all keys, then all values."""
    numbers = np.arange(rows_count, dtype=np.int64).reshape(heads, 3, rows_count // heads // 3)
    return np.ascontiguousarray(numbers.swapaxes(0, 1)).ravel()


def _integer(config: Mapping[str, Any], *keys: str) -> int:
    found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
    return int(found)


def _rows_count(part: SourceTensor) -> int:
    """Rows of one part; of a vector each element is a row."""
    return math.prod(part.shape[:-1]) if len(part.shape) > 1 else part.elements_count


def _table(part: SourceTensor) -> NDArray[Any]:
    """One part as rows; of a vector each element is a row."""
    array = part.array()
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1)
