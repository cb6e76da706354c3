"""
Headers of safetensors files, read strictly and without any library.

A file is `<u64 length of the header> <header: JSON> <tensor data>`, little-endian. The header maps
each tensor's name to its dtype, its shape and its half-open byte range in the data. What is
accepted here is exactly that: ranges that cover the data without gap or overlap, known dtypes,
sizes that agree with the shapes, no name twice. So a truncated download, a renamed pickle and a
Git LFS pointer are told apart before a converter sees them. No tensor byte is read.

Source: format of huggingface/safetensors (README, "Format") and its limit of 100 MB for a header.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines.errors import UpstreamError
from pipelines.wording import first_few, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

MAX_HEADER_BYTES: Final = 100_000_000
# The first 8 bytes are the length of the header.
LENGTH_BYTES: Final = 8
# What is asked for at once of a file elsewhere: the headers of most shards are shorter.
GUESS_BYTES: Final = 64 << 10
_LENGTH: Final = struct.Struct("<Q")
_MAX_ELEMENTS: Final = (1 << 63) - 1

# Bits of one element. Below eight they are packed; a tensor still ends on a byte.
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# What an unquantized model is stored in. Everything else has lost precision already (F8_*, packed
# integers), and quantizing that a second time would measure somebody else's loss as ours.
UNQUANTIZED: Final = frozenset({"F32", "F16", "BF16"})

# Buffers that older versions of transformers saved beside the weights: positions and masks, no
# parameters. The converter drops them (conversion/base.py, bert.py, gpt2.py of the pinned commit).
_INTEGERS: Final = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_BUFFERS: Final = ("position_ids", "attn.bias", "attn.masked_bias", "attention.bias",
                   "attention.masked_bias", "num_batches_tracked")  # fmt: skip

# First bytes of what people really rename to .safetensors, or get instead of it.
_DISGUISES: Final = {
    b"PK\x03\x04": "a zip archive, as PyTorch writes pickles",
    b"\x80\x02": "a pickle",
    b"version ": "a Git LFS pointer (`git lfs pull` brings the file itself)",
    b"GGUF": "a GGUF",
    b"<!DOCTY": "a web page",
    b"<html": "a web page",
}


class RangeError(UpstreamError):
    """The bytes of a header elsewhere did not come as they were asked for, or are too many."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor as the header declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def elements_count(self) -> int:
        """Number of elements; a scalar has one."""
        return math.prod(self.shape)

    @property
    def is_buffer(self) -> bool:
        """Whether this is no weight but a position or a mask, stored as an integer."""
        return self.dtype in _INTEGERS and self.name.endswith(_BUFFERS)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All tensors of all shards of one model."""

    tensors: tuple[Tensor, ...]

    @property
    def parameters_count(self) -> int:
        """Elements of all weights; tied ones are stored, and counted, once."""
        return sum(tensor.elements_count for tensor in self.tensors if not tensor.is_buffer)

    @property
    def dtypes(self) -> dict[str, int]:
        """{dtype: number of tensors}, by name."""
        return dict(sorted(Counter(tensor.dtype for tensor in self.tensors).items()))


def read(path: Path) -> tuple[Tensor, ...]:
    """
    Read the header of one file; the tensors come in the order of their data.

    Raises:
        UpstreamError: The file is not safetensors, or not all of it is there.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = header_length(file.read(LENGTH_BYTES), name=path.name, size_bytes=size_bytes)
        return parse(file.read(length), name=path.name, size_bytes=size_bytes)


def header_length(start: bytes, *, name: str, size_bytes: int) -> int:
    """
    Tell from the first 8 bytes of a file how many bytes of header follow them.

    Args:
        start: The file's first bytes; what is behind the eighth tells what else the file is.
        name: Of the file, for messages.
        size_bytes: Of the whole file.

    Raises:
        UpstreamError: No header of that length fits into the file, or into `MAX_HEADER_BYTES`.
    """
    if len(start) < LENGTH_BYTES:
        raise _refused(name, f"it has {size_bytes} bytes, too few for a header")
    (length,) = _LENGTH.unpack(start[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > size_bytes:
        raise _refused(name, _disguise(start) or _cut(length, size_bytes))
    return int(length)


def parse(header: bytes, *, name: str, size_bytes: int) -> tuple[Tensor, ...]:
    """
    Read a header; the tensors come in the order of their data.

    Args:
        header: Exactly the bytes that `header_length` counts, those behind the first 8.
        name: Of the file, for messages.
        size_bytes: Of the whole file: the data has to end where the file does.

    Raises:
        UpstreamError: It is no header of safetensors, or not of a file of that size.
    """
    entries = _json_object(name, header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _refused(name, "its __metadata__ is no object")
    tensors = [_tensor(name, tensor, entry) for tensor, entry in entries.items()]
    tensors.sort(key=lambda item: item[0])
    _require_cover(name, tensors, size_bytes - LENGTH_BYTES - len(header))
    return tuple(tensor for _, tensor in tensors)


def read_ranges(
    read_range: Callable[[int, int], bytes],
    *,
    name: str,
    size_bytes: int,
    limit_bytes: int = MAX_HEADER_BYTES,
) -> tuple[tuple[Tensor, ...], int]:
    """
    Read the header of a file elsewhere, in one request, or in two where it is long.

    Args:
        read_range: Returns the bytes from the first position up to, not with, the second one.
        name: Of the file, for messages.
        size_bytes: Of the whole file.
        limit_bytes: A header that would need more bytes than these is not fetched.

    Returns:
        The tensors, in the order of their data, and the number of bytes that were fetched.

    Raises:
        RangeError: The header is longer than the limit, or other bytes came than were asked for.
        UpstreamError: See `read`. And whatever `read_range` raises.
    """
    start = _range(read_range, 0, min(size_bytes, GUESS_BYTES, limit_bytes), name)
    end = LENGTH_BYTES + header_length(start, name=name, size_bytes=size_bytes)
    if end > limit_bytes:
        raise RangeError(
            f"the header of {first_few([name])} has {end - LENGTH_BYTES:,} bytes, more than are "
            f"fetched to look at it ({limit_bytes:,})."
        )
    if end > len(start):
        start += _range(read_range, len(start), end, name)
    header = start[LENGTH_BYTES:end]
    return parse(header, name=name, size_bytes=size_bytes), len(start)


def _range(read_range: Callable[[int, int], bytes], start: int, end: int, name: str) -> bytes:
    """Fetch one range; a server may answer a range with anything."""
    found = read_range(start, end) if end > start else b""
    if len(found) != end - start:
        raise RangeError(
            f"{len(found):,} bytes of {first_few([name])} came where {end - start:,} were wanted."
        )
    return found


def read_checkpoint(directory: Path, shards: Sequence[str], index: Path | None) -> Checkpoint:
    """
    Read the headers of all shards of a model and hold them against each other.

    Args:
        directory: Where the shards are.
        shards: Their file names.
        index: model.safetensors.index.json, or None if the model has none.

    Raises:
        UpstreamError: A shard is bad; a tensor is in two shards; a tensor of the index is in no
            shard, in another one than it says, or not in the index; a tensor is quantized already.
    """
    home: dict[str, str] = {}
    tensors: list[Tensor] = []
    for shard in shards:
        for tensor in read(directory / shard):
            if tensor.name in home:
                raise UpstreamError(
                    f"tensor {first_few([tensor.name])} is in {home[tensor.name]} and again "
                    f"in {shard}."
                )
            home[tensor.name] = shard
            tensors.append(tensor)
    if index is not None:
        _require_index(index, home)
    if not tensors:
        raise UpstreamError(f"{', '.join(shards)}: there is no tensor in it.")
    _require_unquantized(tensors)
    return Checkpoint(tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)))


def weight_map(index: Path) -> dict[str, str]:
    """
    Read {tensor: shard} from model.safetensors.index.json.

    Raises:
        UpstreamError: It is no JSON object with a weight_map of strings.
    """
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise _refused(index.name, f"it has {index.stat().st_size} bytes")
    return parse_weight_map(index.read_bytes(), name=index.name)


def parse_weight_map(raw: bytes, *, name: str) -> dict[str, str]:
    """
    Read {tensor: shard} from the bytes of an index; see `weight_map`.

    Raises:
        UpstreamError: It is no JSON object with a weight_map of strings.
    """
    mapping = _json_object(name, raw).get("weight_map")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(shard, str) for shard in mapping.values())
    ):
        raise _refused(name, "it has no weight_map from tensors to files")
    return mapping


def _json_object(file: str, raw: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key comes twice, at any depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
            raise ValueError(f"{quoted(twice)} comes twice")
        return found

    try:
        parsed = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _refused(file, f"its header is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _refused(file, "its header is no JSON object")
    return parsed


def _tensor(file: str, name: str, entry: object) -> tuple[int, Tensor]:
    """Check one entry; return where its data begins, and the tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refused(file, f"tensor {quoted(name)} has not exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _refused(file, f"tensor {quoted(name)} is of the unknown dtype {quoted(str(dtype))}")
    shape = _naturals(entry["shape"])
    offsets = _naturals(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        raise _refused(file, f"tensor {quoted(name)} has a malformed shape or data_offsets")
    begin, end = offsets
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS:
        raise _refused(file, f"tensor {quoted(name)} claims {len(shape)} axes of impossible length")
    wanted_bits = elements * _BITS[dtype]
    if (end - begin) * 8 != wanted_bits:
        raise _refused(
            file,
            f"tensor {quoted(name)} of {dtype} {list(shape)} needs {wanted_bits / 8:g} bytes and "
            f"has {end - begin}",
        )
    return begin, Tensor(name=name, dtype=dtype, shape=shape, size_bytes=end - begin)


def _naturals(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of integers >= 0 as a tuple, None for anything else."""
    if not isinstance(value, list) or len(value) > 64:  # noqa: PLR2004 - no model has more axes
        return None
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)


def _require_cover(file: str, tensors: list[tuple[int, Tensor]], data_bytes: int) -> None:
    """Refuse data that is not covered once and only once by the sorted `(begin, tensor)`."""
    position = 0
    for begin, tensor in tensors:
        if begin != position:
            what = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise _refused(file, f"the data of tensor {quoted(tensor.name)} {what}")
        position += tensor.size_bytes
    if position > data_bytes:
        raise _refused(file, f"it is truncated: {position - data_bytes} bytes are missing")
    if position < data_bytes:
        raise _refused(file, f"{data_bytes - position} bytes after the last tensor are nobody's")


def _require_index(index: Path, home: Mapping[str, str]) -> None:
    """Refuse shards that do not hold exactly what the index says, each where it says."""
    mapping = weight_map(index)
    missing = sorted(mapping.keys() - home.keys())
    extra = sorted(home.keys() - mapping.keys())
    moved = sorted(name for name in mapping.keys() & home.keys() if mapping[name] != home[name])
    for names, what in (
        (missing, "are in the index but in no shard"),
        (extra, "are in a shard but not in the index"),
        (moved, "are in another shard than the index says"),
    ):
        if names:
            raise UpstreamError(
                f"{index.name}: {len(names)} tensor(s) {what}: {first_few(names)}.",
                hint="The upload is incomplete or mixed: take another revision.",
            )


def _require_unquantized(tensors: Sequence[Tensor]) -> None:
    quantized = {t.dtype: t.name for t in tensors if t.dtype not in UNQUANTIZED and not t.is_buffer}
    if quantized:
        examples = ", ".join(
            f"{dtype} ({first_few([name])})" for dtype, name in sorted(quantized.items())
        )
        raise UpstreamError(
            f"the model is stored in {examples}: only F32, F16 and BF16 are quantized from.",
            hint="Take the original, unquantized repository of this model.",
        )


def _disguise(start: bytes) -> str:
    return next((f"it is {what}" for magic, what in _DISGUISES.items() if start.startswith(magic)),
                "")  # fmt: skip


def _cut(header_bytes: int, file_size_bytes: int) -> str:
    if header_bytes > MAX_HEADER_BYTES:
        return f"it claims a header of {header_bytes} bytes (limit {MAX_HEADER_BYTES})"
    return f"it is truncated: {file_size_bytes} bytes cannot hold a header of {header_bytes}"


def _refused(file: str, why: str) -> UpstreamError:
    return UpstreamError(
        f"{first_few([file])} is no complete safetensors file: {why}.",
        hint="Fetch or copy it again; if it is like this upstream, take another revision.",
    )
