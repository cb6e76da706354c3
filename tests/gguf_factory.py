"""
Small GGUF models that the real llama.cpp tools load, and fleets with one of them.

A Llama with random weights: it predicts nothing, but it is tokenized, evaluated, calibrated,
quantized and measured like any other. Equal arguments give equal bytes.
"""

from __future__ import annotations

from itertools import count, islice, product
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np

from pipelines import gguf_header, hashing, records
from pipelines.layout import Layout
from pipelines.params import QuantizeSlice, TensorRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = 256
SMALLEST_VOCAB = len(_SPECIAL) + _BYTES + 1
_LETTERS = "etaoinshrdlucmfwygpbvk"


def tiny_llama_gguf(  # noqa: PLR0913 - each argument is one dimension of the model
    path: Path,
    *,
    seed: int = 0,
    n_embd: int = 256,
    n_ff: int = 512,
    n_layer: int = 2,
    vocab: int = 512,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ctx: int = 512,
    dtype: Literal["F32", "F16", "BF16"] = "F16",
    tied: bool = False,
    chat_template: str | None = None,
    n_expert: int = 0,
) -> Path:
    """
    Write a Llama with a SentencePiece vocabulary and return its path.

    Args:
        path: File to write; its directory is made.
        seed: Of the weights.
        n_embd: Row length of all matrices but `ffn_down`; a multiple of `n_head`, twice.
        n_ff: Row length of `ffn_down`.
        n_layer: Blocks.
        vocab: Tokens, at least `SMALLEST_VOCAB`.
        n_head: Query heads.
        n_head_kv: Key and value heads.
        n_ctx: Context that the metadata promises.
        dtype: Type of the matrices; norms are always F32.
        tied: Leave out `output.weight`, so that the embeddings serve as output.
        chat_template: Jinja; None leaves it out.
        n_expert: Experts of each block, of which two answer, as Mixtral has them; 0 for none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, n_embd, n_ff, n_layer, n_head, n_head_kv, n_ctx, dtype)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
    _write_vocabulary(writer, vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    random = np.random.default_rng(seed)
    shapes = _shapes(n_embd, n_ff, n_layer, vocab, n_head, n_head_kv, tied=tied)
    for name, shape in _with_experts(shapes, n_embd, n_expert):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        # Scaled so that activations neither die nor explode over the layers.
        weights = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        type_ = gguf.GGMLQuantizationType[dtype]
        writer.add_tensor(name, gguf.quants.quantize(weights, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted_model(root: Path, *, model: str = "tiny", **dimensions: Any) -> Layout:
    """Make a folder in which `convert` of one model has run: the 16-bit GGUF and its record."""
    at = Layout(root)
    path = tiny_llama_gguf(at.f16(model), **dimensions)
    header = gguf_header.read(path)
    digests = hashing.digest(path)
    record = records.ConvertRecord(
        model=model,
        revision="0" * 40,
        architecture="llama",
        llama_cpp_commit="f" * 40,
        recipe=1,
        tensors_count=len(header.tensors),
        tensor_types=header.type_counts(),
        context_train_tokens=header.integer("llama.context_length"),
        gguf=records.FileDigest(
            name=path.name, size_bytes=digests.size_bytes, sha256=digests.sha256, md5=digests.md5
        ),
    )
    records.write(at.model_record("convert", model), record)
    return at


def quant(
    type_: str = "Q4_K_M", rules: tuple[tuple[str, str], ...] = (), **options: Any
) -> QuantizeSlice:
    """Return the slice of one quant of the model `tiny`, with defaults."""
    values = {
        "key": f"tiny-{type_}",
        "model": "tiny",
        "recipe": 1,
        "type": type_,
        "imatrix": False,
        "tensor_types": tuple(TensorRule(match=m, type=t) for m, t in rules),  # type: ignore[arg-type]
        "preset": None,
        "recipe_file": None,
        "output_tensor_type": None,
        "token_embedding_type": None,
        "pure": False,
        "leave_output_tensor": False,
        "max_fallbacks": 0,
    }
    return QuantizeSlice.model_validate(values | options)


def _write_metadata(  # noqa: PLR0913, PLR0917 - as above
    writer: Any,
    n_embd: int,
    n_ff: int,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    n_ctx: int,
    dtype: str,
) -> None:
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'F32' else 'MOSTLY'}_{dtype}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_vocabulary(writer: Any, vocab: int, last: Sequence[str] = ()) -> None:
    """Special tokens, all bytes, then the shortest words that a few letters make, then `last`."""
    assert vocab >= SMALLEST_VOCAB
    pieces = ["▁", *islice(_words(), vocab - SMALLEST_VOCAB - len(last)), *last]
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(_BYTES)), *pieces]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * _BYTES + [gguf.TokenType.NORMAL] * len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (vocab - len(pieces)) + [-float(i) for i in range(len(pieces))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(value=True)
    writer.add_add_eos_token(value=False)


def _words() -> Iterator[str]:
    for length in count(1):
        yield from ("".join(letters) for letters in product(_LETTERS, repeat=length))


def _with_experts(
    shapes: Iterable[tuple[str, tuple[int, ...]]], n_embd: int, n_expert: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Put `n_expert` of each feed-forward matrix in its place, with a router in front."""
    for name, shape in shapes:
        if not n_expert or ".ffn_" not in name or "norm" in name:
            yield name, shape
            continue
        if ".ffn_gate." in name:
            yield name.replace("ffn_gate", "ffn_gate_inp"), (n_expert, n_embd)
        yield name.replace(".weight", "_exps.weight"), (n_expert, *shape)


def _shapes(  # noqa: PLR0913, PLR0917 - as above
    n_embd: int,
    n_ff: int,
    n_layer: int,
    vocab: int,
    n_head: int,
    n_head_kv: int,
    *,
    tied: bool,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes as numpy counts them: rows first, row length last."""
    n_kv = n_embd // n_head * n_head_kv
    yield "token_embd.weight", (vocab, n_embd)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (n_embd,)
        yield f"{block}.attn_q.weight", (n_embd, n_embd)
        yield f"{block}.attn_k.weight", (n_kv, n_embd)
        yield f"{block}.attn_v.weight", (n_kv, n_embd)
        yield f"{block}.attn_output.weight", (n_embd, n_embd)
        yield f"{block}.ffn_norm.weight", (n_embd,)
        yield f"{block}.ffn_gate.weight", (n_ff, n_embd)
        yield f"{block}.ffn_up.weight", (n_ff, n_embd)
        yield f"{block}.ffn_down.weight", (n_embd, n_ff)
    yield "output_norm.weight", (n_embd,)
    if not tied:
        yield "output.weight", (vocab, n_embd)


def parrot_gguf(path: Path, pieces: tuple[str, ...], *, chat_template: str) -> Path:
    """
    Write a Llama that says `pieces` after each prompt that ends with a line feed, and then ends.

    Each piece is a token, and the next one depends on the last one alone: the embeddings are the
    unit vectors, blocks add nothing to them, and the output of a token is the one that follows.
    """
    vocab = 512
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, vocab, vocab, 1, 4, 2, 512, "F16")
    spoken = [piece.replace(" ", "▁") for piece in pieces]
    _write_vocabulary(writer, vocab, spoken)
    writer.add_chat_template(chat_template)
    first = vocab - len(pieces)
    line_feed, end = len(_SPECIAL) + ord("\n"), _SPECIAL.index("</s>")
    follows = np.full(vocab, end)
    follows[[line_feed, *range(first, vocab - 1)]] = range(first, vocab)
    for name, shape in _shapes(vocab, vocab, 1, vocab, 4, 2, tied=False):
        weights = np.zeros(shape, dtype=np.float32 if len(shape) == 1 else np.float16)
        if len(shape) == 1:
            weights[:] = 1
        elif name == "token_embd.weight":
            np.fill_diagonal(weights, 1)
        elif name == "output.weight":
            weights[follows, range(vocab)] = 8
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
