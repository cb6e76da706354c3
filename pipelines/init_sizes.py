"""
How large a quant will be and what it will take of a host, estimated before anything is fetched.

The shapes of the tensors are known exactly, from the headers of the weights. Which type each gets
follows the rules of llama-quantize (src/llama-quant.cpp of the pinned commit,
`llama_tensor_get_type_impl`), of which only those are kept that move a size by a percent: held
against the tool itself, the weights of models such as Qwen2.5-7B come out within 1 %. Memory is
that file, the key-value cache of every slot at the declared context, and the working space of one
batch. Nothing of this decides a verdict: the benchmark measures size and memory of every quant, and
`fleet quantize --explain` asks llama.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from pipelines import disk, hyperparameters
from pipelines.gguf_header import BLOCKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.safetensors_header import Tensor

MIB: Final = 1 << 20
# Rows that no K block divides go to one of 32 weights; see `tensor_fallback` in the same file.
_K_BLOCK: Final = 256
_SMALL_BLOCK: Final = 32
_FALLBACKS: Final[Mapping[str, str]] = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL",
}  # fmt: skip
# Tokens of one physical batch (params.Benchmark.ubatch_tokens), whose logits are in the working
# space, and what llama.cpp keeps beside it.
_UBATCH_TOKENS: Final = 512
_COMPUTE_EXTRA_BYTES: Final = 32 * MIB
_KV_BYTES: Final = 2
# Of the tokenizer in a GGUF: text, kind and score of each token, and the merges.
_TOKEN_BYTES: Final = 40

# Part of a model that llama-quantize treats in a way of its own, by upstream's name of a tensor.
_PARTS: Final = (
    ("output", re.compile(r"(^|\.)(lm_head|embed_out)\.weight$|^output\.weight$")),
    ("embeddings", re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.")),
    (
        "kept",
        re.compile(
            r"(position_embeddings|token_type_embeddings|wpe|mlp\.gate|moe\.gate|router|conv1d)\."
        ),
    ),
    ("qkv", re.compile(r"(qkv_proj|query_key_value|c_attn|Wqkv|in_proj)\.")),
    ("value", re.compile(r"\.(v_proj|attention\.self\.value|v_lin|wv)\.")),
    (
        "down",
        re.compile(r"\.(down_proj|fc2|w2|dense_4h_to_h|mlp\.c_proj)(\.|$)|\d\.output\.dense\."),
    ),
    ("attention_output", re.compile(r"\.(o_proj|attn\.c_proj|attention\.(output\.)?dense|wo)\.")),
)


_EXPERT: Final = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class _Recipe:
    """
    Types of one llama-quantize type; a pair means half of the layers each.

    Attributes:
        base: Of every matrix that is not named below.
        value: Of the values of attention; None as all others.
        down: Of the second matrix of feed-forward.
        attention_output: Of the output of attention.
        qkv: Of fused queries, keys and values.
    """

    base: str
    value: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    attention_output: tuple[str, ...] = ()
    qkv: tuple[str, ...] = ()


_HALF_4: Final = ("Q6_K", "Q4_K")
_HALF_5: Final = ("Q6_K", "Q5_K")
_RECIPES: Final[Mapping[str, _Recipe]] = {
    "F16": _Recipe("F16"),
    "BF16": _Recipe("BF16"),
    "Q8_0": _Recipe("Q8_0"),
    "Q6_K": _Recipe("Q6_K"),
    "Q5_K_M": _Recipe("Q5_K", value=_HALF_5, down=_HALF_5, qkv=("Q6_K",)),
    "Q5_K_S": _Recipe("Q5_K"),
    "Q4_K_M": _Recipe("Q4_K", value=_HALF_4, down=_HALF_4, qkv=("Q5_K",)),
    "Q4_K_S": _Recipe("Q4_K"),
    "IQ4_XS": _Recipe("IQ4_XS", value=("Q5_K",)),
    "Q3_K_M": _Recipe("Q3_K", value=("Q4_K",), down=("Q4_K",), attention_output=("Q4_K",),
                      qkv=("Q4_K",)),
    "IQ3_M": _Recipe("IQ3_S", value=("Q4_K",), down=("Q4_K", *["IQ3_S"] * 7),
                     attention_output=("Q4_K",), qkv=("Q4_K",)),
    "Q2_K": _Recipe("Q2_K", value=("Q4_K",), down=("Q3_K",), attention_output=("Q3_K",),
                    qkv=("Q3_K",)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    One quant of a model on a host.

    Attributes:
        type: As llama-quantize calls it.
        size_bytes: Of the file.
        bits_per_weight: Of the whole file.
        memory_bytes: What serving it takes: file, cache of all slots, working space.
        fallbacks_count: Tensors whose rows do not fit the type, at most.
    """

    type: str
    size_bytes: int
    bits_per_weight: float
    memory_bytes: int
    fallbacks_count: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """
    What of a model decides its sizes.

    Attributes:
        config: config.json of the text model (`hyperparameters.text_config`).
        tensors: Of its weights.
        is_encoder: It makes embeddings, and keeps no cache.
    """

    config: Mapping[str, Any]
    tensors: Sequence[Tensor]
    is_encoder: bool

    @cached_property
    def parameters_count(self) -> int:
        """All weights; tied ones count once."""
        return sum(tensor.elements_count for tensor in self.tensors if not tensor.is_buffer)

    @property
    def vocabulary_tokens(self) -> int:
        """Tokens that it knows, by config.json, else by its embeddings."""
        declared = self.config.get("vocab_size")
        if isinstance(declared, int) and declared > 0:
            return declared
        found = (t.shape[0] for t in self.tensors if _part(t.name) == "embeddings" and t.shape)
        return max(found, default=0)

    @property
    def is_tied(self) -> bool:
        """Whether the embeddings are the output, too."""
        return not any(_part(tensor.name) == "output" for tensor in self.tensors)


def estimate(shape: Shape, type_: str, *, context_tokens: int, slots: int) -> Estimate:
    """
    Estimate one quant.

    Args:
        shape: The model.
        type_: As llama-quantize calls it; one that this module has no rules of is estimated from
            above, as for the room on the disk.
        context_tokens: Of each slot.
        slots: Requests that are served at the same time (`serving.parallel`).
    """
    size_bytes = _size_bytes(shape, type_)
    memory_bytes = size_bytes + cache_bytes(shape, context_tokens) * slots + _compute_bytes(shape)
    return Estimate(
        type=type_,
        size_bytes=size_bytes,
        bits_per_weight=size_bytes * 8 / max(shape.parameters_count, 1),
        memory_bytes=memory_bytes,
        fallbacks_count=fallbacks_count(shape, type_),
    )


def cache_bytes(shape: Shape, context_tokens: int) -> int:
    """
    Return the key-value cache of one slot in bytes, 16 bits for each value.

    Layers that look back a window only keep the window and one batch. Compressed attention keeps
    one vector for each token and layer (`kv_lora_rank`). Layers without attention keep less than is
    counted for them here.
    """
    config = shape.config
    layers = hyperparameters.layers_count(config)
    if shape.is_encoder or not layers:
        return 0
    rank = config.get("kv_lora_rank")
    if isinstance(rank, int):
        rotated = config.get("qk_rope_head_dim")
        width = rank + (rotated if isinstance(rotated, int) else 0)
        return layers * width * context_tokens * _KV_BYTES
    heads = _integer(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _integer(config, "num_key_value_heads", "n_kv_heads", "num_kv_heads") or (
        1 if config.get("multi_query") is True else heads
    )
    hidden = _integer(config, "hidden_size", "n_embd", "d_model", "dim")
    head_dim = hyperparameters.full_head_dim(config) or (hidden // heads if heads else 0)
    token_bytes = 2 * kv_heads * head_dim * _KV_BYTES
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    short = 0
    if isinstance(window, int) and isinstance(kinds, list):
        short = sum(kind == "sliding_attention" for kind in kinds[:layers])
        window = min(window + _UBATCH_TOKENS, context_tokens)
        return token_bytes * (short * window + (layers - short) * context_tokens)
    return token_bytes * layers * context_tokens


def fallbacks_count(shape: Shape, type_: str) -> int:
    """Return how many tensors of the GGUF may fall back to a wider type, at most."""
    block = _block(type_)
    if block == 1:
        return 0
    is_gpt2 = "GPT2" in str((shape.config.get("architectures") or [""])[0])
    odd: set[str] = set()
    for tensor in shape.tensors:
        part = _part(tensor.name)
        if not _is_matrix(tensor) or part == "kept":
            continue
        # Conv1D and fused experts keep matrices the other way round, and the converter turns them.
        may_turn = is_gpt2 or len(tensor.shape) > 2  # noqa: PLR2004 - a stack of matrices
        rows = tensor.shape[-2:] if may_turn else tensor.shape[-1:]
        # The output gets Q8_0 at once where no K block divides its rows.
        own = min(block, _SMALL_BLOCK) if _is_output(part, is_tied=shape.is_tied) else block
        if any(length % own for length in rows):
            # The converter stacks experts.
            odd.add(_EXPERT.sub(".experts.", tensor.name))
    # What blows up compressed keys is turned in each head, and its rows are as long as a head.
    turned = shape.config.get("qk_nope_head_dim")
    extra = isinstance(turned, int) and turned % block
    return len(odd) + (hyperparameters.layers_count(shape.config) if extra else 0)


def _block(type_: str) -> int:
    """Return how many weights the widest block of a type holds; 1 where nothing is quantized."""
    if type_ in {"F32", "F16", "BF16"}:
        return 1
    recipe = _RECIPES.get(type_)
    if recipe is not None:
        return BLOCKS[recipe.base][0]
    return BLOCKS[type_][0] if type_ in BLOCKS else _K_BLOCK


def _size_bytes(shape: Shape, type_: str) -> int:
    if type_ not in _RECIPES:
        return disk.quant_bytes(type_, shape.parameters_count)
    recipe = _RECIPES[type_]
    bits = sum(_bits(tensor, recipe, shape) for tensor in shape.tensors if not tensor.is_buffer)
    return int(bits / 8) + shape.vocabulary_tokens * _TOKEN_BYTES


def _bits(tensor: Tensor, recipe: _Recipe, shape: Shape) -> float:
    part = _part(tensor.name)
    if not _is_matrix(tensor) or part == "kept":
        return 32.0 * tensor.elements_count
    types = _types(part, recipe, is_tied=shape.is_tied)
    row = tensor.shape[-1]
    return tensor.elements_count * sum(_bits_of(type_, row) for type_ in types) / len(types)


def _types(part: str, recipe: _Recipe, *, is_tied: bool) -> tuple[str, ...]:
    """Return the types that a part gets, of which each has the same share of the layers."""
    if _is_output(part, is_tied=is_tied) and recipe.base not in {"F16", "BF16", "Q8_0"}:
        return ("Q6_K",)
    own: dict[str, tuple[str, ...]] = {
        "value": recipe.value,
        "down": recipe.down,
        "attention_output": recipe.attention_output,
        "qkv": recipe.qkv,
    }
    return own.get(part) or (recipe.base,)


def _is_output(part: str, *, is_tied: bool) -> bool:
    return part == "output" or (part == "embeddings" and is_tied)


def _bits_of(type_: str, row: int) -> float:
    """Return the bits of one weight in a row of that length, after the fallback that it needs."""
    if row % BLOCKS[type_][0]:
        type_ = _FALLBACKS.get(type_, "F16")
    if row % BLOCKS[type_][0]:
        type_ = "F16"
    elements, size_bytes = BLOCKS[type_]
    return size_bytes * 8 / elements


def _part(name: str) -> str:
    return next((part for part, pattern in _PARTS if pattern.search(name)), "matrix")


def _is_matrix(tensor: Tensor) -> bool:
    """Tell whether llama-quantize would quantize it: two axes or more, no buffer and no bias."""
    return len(tensor.shape) > 1 and not tensor.is_buffer and not tensor.name.endswith("bias")


def _compute_bytes(shape: Shape) -> int:
    """Return the working space of one batch: the logits of its tokens, or a layer's activations."""
    hidden = _integer(shape.config, "hidden_size", "n_embd", "d_model", "dim")
    inner = _integer(shape.config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    width = max(0 if shape.is_encoder else shape.vocabulary_tokens, 8 * hidden + 2 * inner)
    return _UBATCH_TOKENS * 4 * width + _COMPUTE_EXTRA_BYTES


def _integer(config: Mapping[str, Any], *names: str) -> int:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)
