"""
Small encoders as GGUF, which the real llama.cpp and the real Ollama load and serve.

A BERT with random weights and a WordPiece vocabulary of words and letters. Its weights are large
enough that texts get different vectors, so that what quantizing does to them shows.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np

from pipelines import gguf_header, hashing, proc, records
from pipelines.layout import Layout
from pipelines.params import Benchmark, BenchmarkSlice, Corpus, Quality

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.params import QuantType
    from pipelines.toolchain import Toolchain

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NOUNS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night point
home water room mother area money story fact month lot right study book eye job word business
issue side kind head house service friend father power hour game line end member law car city
community name president team minute idea kid body information back parent face others level
office door health person art war history party result change morning reason
"""
NOUNS = _NOUNS.split()


def text_of(words: int, *, seed: int = 0) -> str:
    """Return a text of so many words, none of which follows from those before."""
    random = np.random.default_rng(seed)
    return " ".join(NOUNS[i] for i in random.integers(0, len(NOUNS), words))


def tiny_bert_gguf(  # noqa: PLR0913 - each argument is one dimension of the model
    path: Path,
    *,
    seed: int = 0,
    n_embd: int = 256,
    n_ff: int = 512,
    n_layer: int = 2,
    n_head: int = 4,
    n_ctx: int = 512,
    pooling: int | None = 1,
) -> Path:
    """
    Write a BERT in F16 and return its path.

    Args:
        path: File to write; its directory is made.
        seed: Of the weights.
        n_embd: Length of an embedding.
        n_ff: Width of the feed-forward layers.
        n_layer: Blocks.
        n_head: Heads.
        n_ctx: Longest text in tokens.
        pooling: llama.cpp's number for how one vector is made of those of the tokens (1 mean,
            2 CLS); None leaves it out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = gguf.GGUFWriter(path, "bert")
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(value=False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    vocabulary = _write_vocabulary(writer)
    random = np.random.default_rng(seed)
    for name, shape in _shapes(n_embd, n_ff, n_layer, n_ctx, vocabulary):
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            writer.add_tensor(name, np.full(shape, fill, dtype=np.float32))
            continue
        weights = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if name in {"position_embd.weight", "token_types.weight"}:
            writer.add_tensor(name, weights * 0.1)
            continue
        half = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(weights, half), raw_dtype=half)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted_encoder(root: Path, *, model: str = "tiny", **dimensions: Any) -> Layout:
    """Make a folder in which `convert` of one encoder has run: the 16-bit GGUF and its record."""
    at = Layout(root)
    tiny_bert_gguf(at.f16(model), **dimensions)
    record_conversion(at, model)
    return at


def record_conversion(at: Layout, model: str = "tiny") -> None:
    """Leave the record of a 16-bit GGUF that is there, as the stage `convert` does."""
    path = at.f16(model)
    header = gguf_header.read(path)
    digests = hashing.digest(path)
    record = records.ConvertRecord(
        model=model,
        revision="0" * 40,
        architecture="bert",
        llama_cpp_commit="f" * 40,
        recipe=1,
        tensors_count=len(header.tensors),
        tensor_types=header.type_counts(),
        context_train_tokens=header.integer("bert.context_length"),
        gguf=records.FileDigest(
            name=path.name, size_bytes=digests.size_bytes, sha256=digests.sha256, md5=digests.md5
        ),
    )
    records.write(at.model_record("convert", model), record)


def add_quant(at: Layout, type_: str, tools: Toolchain, *, model: str = "tiny") -> None:
    """Leave a quant of an encoder and its record as the stage `quantize` does."""
    key = f"{model}-{type_}"
    path = at.gguf(model, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    proc.run(
        [tools.tool("llama-quantize"), at.f16(model), path, type_, "1"],
        log=at.log("quantize", key),
    )
    header, digests = gguf_header.read(path), hashing.digest(path)
    record = records.QuantizeRecord(
        key=key,
        model=model,
        type=type_,
        f16_sha256=hashing.digest(at.f16(model)).sha256,
        llama_cpp_commit=tools.commit,
        recipe=1,
        imatrix_sha256=None,
        imatrix_corpus_sha256=None,
        bits_per_weight=header.bits_per_weight(),
        tensors_count=len(header.tensors),
        tensor_types=header.type_counts(),
        tensor_bytes=header.type_bytes(),
        rules=(),
        fallbacks=(),
        gguf=records.FileDigest(
            name=path.name, size_bytes=digests.size_bytes, sha256=digests.sha256, md5=digests.md5
        ),
    )
    records.write(at.quant_record("quantize", model, type_), record)


def benchmark_slice(at: Layout, type_: str, **changes: Any) -> BenchmarkSlice:
    """Return a benchmark that takes a second: 64 texts of up to 64 tokens, 3 repetitions."""
    corpus = at.root / "corpora/evaluation.txt"
    declared: dict[str, Any] = {
        "prompt_tokens": 64,
        "generate_tokens": 4,
        "depths": (0, 16),
        "repetitions": 3,
        "dropped_repetitions": 1,
        "threads": 1,
        "quality": Quality(context_tokens=64, chunks=4),
    }
    return BenchmarkSlice(
        key=f"tiny-{type_}",
        model="tiny",
        type=cast("QuantType", type_),
        recipe=1,
        context_tokens=512,
        corpus=Corpus(path="corpora/evaluation.txt", sha256=hashing.digest(corpus).sha256),
        benchmark=Benchmark(**(declared | changes)),
    )


def _write_vocabulary(writer: Any) -> int:
    """Write special tokens, words, and letters of which any other word is made; return the size."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    # Of the converter: a token that begins a word has U+2581 in front, the others have nothing.
    tokens = [*_SPECIAL, *(f"\u2581{word}" for word in (*NOUNS, *letters)), *letters]
    kinds = [gguf.TokenType.CONTROL] * len(_SPECIAL)
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(_SPECIAL))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_unk_token_id(1)
    writer.add_sep_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_mask_token_id(4)
    return len(tokens)


def _shapes(
    n_embd: int, n_ff: int, n_layer: int, n_ctx: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes as numpy counts them: rows first, row length last."""
    yield "token_embd.weight", (vocabulary, n_embd)
    yield "position_embd.weight", (n_ctx, n_embd)
    yield "token_types.weight", (2, n_embd)
    yield from _with_bias("token_embd_norm", (n_embd,))
    for layer in range(n_layer):
        block = f"blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield from _with_bias(f"{block}.{part}", (n_embd, n_embd))
        yield from _with_bias(f"{block}.attn_output_norm", (n_embd,))
        yield from _with_bias(f"{block}.ffn_up", (n_ff, n_embd))
        yield from _with_bias(f"{block}.ffn_down", (n_embd, n_ff))
        yield from _with_bias(f"{block}.layer_output_norm", (n_embd,))


def _with_bias(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
