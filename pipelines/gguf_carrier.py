"""
A carrier: the smallest model that llama.cpp loads with the vocabulary and template of another.

What a server makes of a conversation depends on nothing but the metadata under `tokenizer.` (and on
the model's name, which llama.cpp looks at for one family). So these are copied byte for byte in
front of a Llama of one layer, all zeros in a file with holes: a question about the template of a
model of 100 GB costs as little as one about the smallest.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pipelines import gguf_header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.gguf_header import Header

CONTEXT_TOKENS: Final = 512
_WIDTH: Final = 32
_ALIGNMENT: Final = 32
_KEPT: Final = ("tokenizer.", "general.name")
_PREAMBLE_BYTES: Final = 24
# GGUF's numbers of value types with their sizes; 8 is text, 9 an array.
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _FLOAT32, _TEXT, _ARRAY = 4, 6, 8, 9
_F32, _F16 = 0, 1
_ITEM_BYTES: Final = {_F32: 4, _F16: 2}


def write(header: Header, into: Path) -> None:
    """
    Write the carrier of a GGUF.

    Args:
        header: Of the GGUF, as `gguf_header.read` has checked it.
        into: File to write.

    Raises:
        GgufError: The file is not what it was when its header was read.
    """
    kept = [pair for key, pair in raw_pairs(header) if key.startswith(_KEPT)]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    count = tokens.count if isinstance(tokens, gguf_header.Array) else 1
    pairs = [*_body(), *kept]
    tensors = list(_tensors(count))
    with into.open("wb") as file:
        file.write(gguf_header.MAGIC)
        file.write(struct.pack("<IQQ", 3, len(tensors), len(pairs)))
        file.writelines(pairs)
        offset = 0
        for name, shape, type_ in tensors:
            file.write(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            file.write(struct.pack("<IQ", type_, offset))
            size_bytes = _ITEM_BYTES[type_] * shape[0] * (shape[1] if len(shape) > 1 else 1)
            offset += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        file.truncate(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT + offset)


def raw_pairs(header: Header) -> Iterator[tuple[str, bytes]]:
    """
    Yield each key of the metadata with the bytes of the whole pair, in file order.

    Raises:
        GgufError: The file is not what it was when its header was read.
    """
    with header.path.open("rb") as file:
        data = file.read(header.data_offset)
    at = _PREAMBLE_BYTES
    try:
        for expected in header.metadata:
            start = at
            length: int = struct.unpack_from("<Q", data, at)[0]
            key = data[at + 8 : at + 8 + length].decode()
            at += 8 + length
            type_: int = struct.unpack_from("<I", data, at)[0]
            at = _behind(data, at + 4, type_)
            if key != expected:
                break
            yield key, data[start:at]
        else:
            return
    except (struct.error, UnicodeDecodeError, KeyError):
        pass
    raise gguf_header.GgufError(f"{header.path} changed after its header was read.")


def _behind(data: bytes, at: int, type_: int) -> int:
    """Return where a value ends that begins at `at`."""
    if type_ == _TEXT:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if type_ != _ARRAY:
        return at + _SIZES[type_]
    element, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if element != _TEXT:
        return int(at + count * _SIZES[element])
    for _ in range(count):
        at += 8 + int(struct.unpack_from("<Q", data, at)[0])
    return at


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _body() -> Iterator[bytes]:
    """Yield the metadata of a Llama of one layer."""
    yield _string("general.architecture") + struct.pack("<I", _TEXT) + _string("llama")
    for key, value in (
        ("context_length", CONTEXT_TOKENS),
        ("embedding_length", _WIDTH),
        ("block_count", 1),
        ("feed_forward_length", _WIDTH),
        ("attention.head_count", 1),
        ("rope.dimension_count", _WIDTH),
    ):
        yield _string(f"llama.{key}") + struct.pack("<II", _UINT32, value)
    epsilon = struct.pack("<If", _FLOAT32, 1e-5)
    yield _string("llama.attention.layer_norm_rms_epsilon") + epsilon


def _tensors(tokens_count: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield name, shape and type; embeddings serve as output."""
    yield "token_embd.weight", (_WIDTH, tokens_count), _F16
    yield "output_norm.weight", (_WIDTH,), _F32
    yield "blk.0.attn_norm.weight", (_WIDTH,), _F32
    yield "blk.0.ffn_norm.weight", (_WIDTH,), _F32
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        yield f"blk.0.{part}.weight", (_WIDTH, _WIDTH), _F32
