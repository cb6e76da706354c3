"""
Strict reader of a GGUF file's header: metadata and tensor list, never tensor data.

The file may come from anywhere, so every count, length and offset in it is a claim. It is checked
against the size of the file and a fixed limit before memory or time is spent on it; the file is
read forwards, once, and arrays are skipped (`Array.values` reads one when somebody wants it).
Whatever the bytes are, `read` returns a `Header` or raises `GgufError`.

What is refused although the format's description allows it, since llama.cpp refuses it too
(ggml/src/gguf.cpp): nested arrays, gaps between tensors, names of 64 bytes or more.

    offset  size  field                      all numbers little-endian
    0       4     "GGUF"
    4       4     version, 2 or 3
    8       8     number of tensors
    16      8     number of metadata pairs
    24            pairs: key, u32 type, value
                  tensors: name, u32 n_dims, u64 dims[], u32 type, u64 offset
                  padding to `general.alignment`, 32 unless stated
                  data of the tensors, each padded to the alignment

Source: docs/gguf.md of ggml; types and block sizes from gguf-py/gguf/constants.py of the pinned
llama.cpp (`tests/test_gguf_header.py` compares them with the gguf package).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Final, Self, TypeAlias

from pipelines import console
from pipelines.errors import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MAGIC: Final = b"GGUF"
VERSIONS: Final = frozenset({2, 3})
DEFAULT_ALIGNMENT: Final = 32

# Limits. The largest real vocabularies have some 300,000 tokens, the largest models some 3,000
# tensors; a chat template of 64 KiB is already a long one.
MAX_STRING_BYTES: Final = 16 << 20
MAX_TEXT_BYTES: Final = 64 << 20  # all strings that are kept in memory together
MAX_KEY_BYTES: Final = 0xFFFF  # docs/gguf.md
MAX_NAME_BYTES: Final = 63  # GGML_MAX_NAME less its zero byte
MAX_ARRAY_ELEMENTS: Final = 1 << 26
MAX_ARRAY_STRINGS: Final = 1 << 22  # in all arrays together: each costs a step of a loop
MAX_PAIRS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 17
MAX_DIMS: Final = 4
_MAX_INT64: Final = (1 << 63) - 1

# Smallest possible size of a pair (key of one byte, value of one) and of a tensor (empty name, one
# dimension): a count that the rest of the file cannot hold is refused before the first of them.
_MIN_PAIR_BYTES: Final = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 1 + 4 + 8 + 4 + 8

_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_UINT32: Final = 4
# GGUF value type -> (name, struct format). Bools are read as bytes: only 0 and 1 are valid.
_SCALARS: Final = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"),
    5: ("i32", "i"), 6: ("f32", "f"), 7: ("bool", "B"), 10: ("u64", "Q"), 11: ("i64", "q"),
    12: ("f64", "d"),
}  # fmt: skip

_U64: Final = struct.Struct("<Q")

# ggml type -> (name, elements in a block, bytes of a block).
_TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

# Name of a tensor type -> (elements in a block, bytes of a block).
BLOCKS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {name: (elements, size_bytes) for name, elements, size_bytes in _TYPES.values()}
)


class GgufError(ToolError):
    """A file is not a GGUF that anything may be built on; the message has the offset and cause."""


@dataclass(frozen=True)
class Array:
    """
    An array in the metadata: where it lies, not what is in it.

    Attributes:
        path: File that holds it.
        element: "str", "bool", or the number type such as "f32".
        count: Elements.
        offset: Position in the file of the first element.
        size_bytes: Bytes that all elements take, string lengths included.
    """

    path: Path
    element: str
    count: int
    offset: int
    size_bytes: int

    def values(self) -> list[str] | list[int] | list[float] | list[bool]:
        """
        Read the elements. Text that is not UTF-8 is kept by replacing the bad bytes.

        Raises:
            GgufError: The file is not what it was when its header was read.
        """
        with _open(self.path) as cursor:
            cursor.skip(self.offset, "array")
            data = cursor.take(self.size_bytes, "array")
        if self.element == "str":
            return list(_split_strings(data, self.count, self.path))
        code = next(code for name, code in _SCALARS.values() if name == self.element)
        numbers = struct.unpack(f"<{self.count}{code}", data)
        return [bool(number) for number in numbers] if self.element == "bool" else list(numbers)


Value: TypeAlias = str | int | float | bool | Array


@dataclass(frozen=True)
class TensorInfo:
    """
    One tensor.

    Attributes:
        name: Its name, e.g. "blk.0.attn_v.weight".
        shape: Elements in each dimension, row length first (ggml's ne).
        type: Name of its type in capitals, e.g. "Q4_K".
        offset: Position of its data, relative to `Header.data_offset`.
        size_bytes: Bytes of its data, padding not included.
        n_elements: Product of `shape`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int
    n_elements: int


@dataclass(frozen=True)
class Header:
    """
    What a GGUF file says about itself.

    Attributes:
        path: The file.
        version: 2 or 3.
        alignment: Bytes to which every tensor is aligned, a power of two.
        metadata: Keys and values in file order.
        tensors: In file order, which is also the order of their data, without gaps.
        data_offset: Position in the file at which tensor data begins.
        file_size_bytes: Size of the file.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size_bytes: int

    @property
    def end_offset(self) -> int:
        """Size that the file has if the padding of the last tensor is its end."""
        if not self.tensors:
            return self.data_offset
        last = self.tensors[-1]
        return self.data_offset + _padded(last.offset + last.size_bytes, self.alignment)

    def type_counts(self) -> dict[str, int]:
        """Number of tensors of each type, most frequent first, then by name."""
        return _by_size(Counter(tensor.type for tensor in self.tensors))

    def type_bytes(self) -> dict[str, int]:
        """Bytes of tensor data of each type, largest first, then by name."""
        total: Counter[str] = Counter()
        for tensor in self.tensors:
            total[tensor.type] += tensor.size_bytes
        return _by_size(total)

    def bits_per_weight(self) -> float:
        """Bits of tensor data for each weight, norms included, as llama-quantize counts them."""
        weights = sum(tensor.n_elements for tensor in self.tensors)
        return 8 * sum(tensor.size_bytes for tensor in self.tensors) / weights if weights else 0.0

    def text(self, key: str) -> str:
        """
        Return a text value.

        Raises:
            GgufError: The key is missing or holds something else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise GgufError(f"{self.path} has no text under {key}.")
        return value

    def integer(self, key: str) -> int:
        """
        Return an integer value.

        Raises:
            GgufError: The key is missing or holds something else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise GgufError(f"{self.path} has no integer under {key}.")
        return value


def read(path: Path) -> Header:
    """
    Read the header of a GGUF file.

    Raises:
        GgufError: It cannot be read, is no GGUF of version 2 or 3, is cut off, or contradicts
            itself; the message names the byte and the cause.
    """
    with _open(path) as cursor:
        version, n_tensors, n_pairs = _preamble(cursor)
        metadata = _metadata(cursor, n_pairs)
        alignment = _alignment(cursor, metadata)
        infos = [_tensor(cursor) for _ in range(n_tensors)]
        data_offset = _padded(cursor.offset, alignment)
        tensors = _placed(cursor, infos, data_offset, alignment)
        return Header(
            path=path,
            version=version,
            alignment=alignment,
            metadata=MappingProxyType({key: value for key, (_, value) in metadata.items()}),
            tensors=tensors,
            data_offset=data_offset,
            file_size_bytes=cursor.size,
        )


def write_plan(source: Header, types: Mapping[str, str], into: Path) -> int:
    """
    Write a GGUF with the metadata of another one, other tensor types and a hole for its weights.

    For tools that plan from a header alone. Its size is that of a real file; the disk holds a few
    blocks of it.

    Args:
        source: Header of the file whose metadata and shapes are taken.
        types: Type of every tensor, by name.
        into: Where to write.

    Returns:
        Bytes of the file, the hole included.

    Raises:
        GgufError: The source is not what it was, or a row does not fit its type.
    """
    numbers = {name: number for number, (name, _, _) in _TYPES.items()}
    with _open(source.path) as cursor:
        _metadata(cursor, _preamble(cursor)[2])
        metadata_bytes = cursor.offset
    with source.path.open("rb") as file:
        head = bytearray(file.read(metadata_bytes))
    offset = 0
    for tensor in source.tensors:
        elements, block_bytes = BLOCKS[types[tensor.name]]
        if tensor.shape[0] % elements:
            raise GgufError(f"rows of {_shown(tensor.name)} do not fit {types[tensor.name]}.")
        name = tensor.name.encode()
        head += struct.pack(f"<Q{len(name)}sI", len(name), name, len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        head += struct.pack("<IQ", numbers[types[tensor.name]], offset)
        size_bytes = tensor.n_elements // elements * block_bytes
        offset = _padded(offset + size_bytes, source.alignment)
    size_bytes = _padded(len(head), source.alignment) + offset
    with into.open("wb") as file:
        file.write(head)
        file.truncate(size_bytes)
    return size_bytes


class _Cursor:
    """A position in the file; every step is checked against the file's size before it is made."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self._file = file
        self.path = path
        self.size = size
        self.offset = 0
        self.text_bytes = 0
        self.array_strings = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def error(self, cause: str) -> GgufError:
        return GgufError(
            f"{self.path} is not a valid GGUF file: at byte {self.offset:,}: {cause}.",
            hint="The file is damaged or was made by something else: remove it and make it again.",
        )

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.offset:
            raise self.error(
                f"{what} needs {count:,} bytes, {self.size - self.offset:,} are left in the file"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        try:
            data = self._file.read(count)
        except OSError as error:
            raise self.error(f"reading failed: {error.strerror}") from error
        if len(data) != count:
            raise self.error("the file became shorter while it was read")
        self.offset += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self._file.seek(count, 1)
        self.offset += count

    def peek(self, at_least: int, what: str) -> bytes:
        """Return what comes next, up to 64 KiB, without moving."""
        self.need(at_least, what)
        data = self.take(min(1 << 16, self.size - self.offset), what)
        self._file.seek(self.offset - len(data))
        self.offset -= len(data)
        return data

    def number(self, code: str, what: str) -> int | float:
        value: int | float = struct.unpack(
            f"<{code}", self.take(struct.calcsize(f"<{code}"), what)
        )[0]
        return value

    def unsigned(self, code: str, what: str) -> int:
        return int(self.number(code, what))

    def string(self, what: str, limit: int) -> str:
        length = self.unsigned("Q", what)
        if length > limit:
            raise self.error(f"{what} has {length:,} bytes, {limit:,} are allowed")
        self.text_bytes += length
        if self.text_bytes > MAX_TEXT_BYTES:
            raise self.error(f"the strings before have more than {MAX_TEXT_BYTES:,} bytes together")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason}") from error


def _open(path: Path) -> _Cursor:
    """Open a regular file; a pipe or a device would block or never end."""
    try:
        if not path.is_file():
            raise GgufError(f"{path} is not a file.")
        file = path.open("rb")
        return _Cursor(file, path, path.stat().st_size)
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror}.") from error


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Read magic, version, and both counts."""
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        cursor.offset = 0
        raise cursor.error(f"it begins with {magic!r}, not with {MAGIC!r}")
    version = cursor.unsigned("I", "the version")
    if version not in VERSIONS:
        order = ", written with the bytes in big-endian order" if version & 0xFFFF == 0 else ""
        raise cursor.error(f"version {version:,}{order} is not one of 2 and 3")
    n_tensors = cursor.unsigned("Q", "the number of tensors")
    n_pairs = cursor.unsigned("Q", "the number of metadata pairs")
    for count, limit, size_bytes, what in (
        (n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES, "tensors"),
        (n_pairs, MAX_PAIRS, _MIN_PAIR_BYTES, "metadata pairs"),
    ):
        if count > limit:
            raise cursor.error(f"{count:,} {what}, {limit:,} are allowed")
        cursor.need(count * size_bytes, f"a list of {count:,} {what}")
    return version, n_tensors, n_pairs


def _metadata(cursor: _Cursor, n_pairs: int) -> dict[str, tuple[int, Value]]:
    """Read all pairs as {key: (GGUF type, value)}."""
    pairs: dict[str, tuple[int, Value]] = {}
    for _ in range(n_pairs):
        key = cursor.string("a metadata key", MAX_KEY_BYTES)
        if not key or not key.isprintable():
            raise cursor.error(f"{_shown(key)} is no metadata key")
        if key in pairs:
            raise cursor.error(f"metadata key {_shown(key)} occurs twice")
        type_ = cursor.unsigned("I", f"the type of {_shown(key)}")
        pairs[key] = (type_, _value(cursor, type_, f"the value of {_shown(key)}"))
    return pairs


def _value(cursor: _Cursor, type_: int, what: str) -> Value:
    if type_ == _STRING:
        return cursor.string(what, MAX_STRING_BYTES)
    if type_ == _ARRAY:
        return _array(cursor, what)
    if type_ not in _SCALARS:
        raise cursor.error(f"{what} has the unknown type {type_}")
    number = cursor.number(_SCALARS[type_][1], what)
    if type_ != _BOOL:
        return number
    if number not in {0, 1}:
        raise cursor.error(f"{what} is {number}, neither true nor false")
    return bool(number)


def _array(cursor: _Cursor, what: str) -> Array:
    """Walk over an array without keeping it."""
    type_ = cursor.unsigned("I", f"{what}: element type")
    count = cursor.unsigned("Q", f"{what}: length")
    if count > MAX_ARRAY_ELEMENTS:
        raise cursor.error(f"{what} has {count:,} elements, {MAX_ARRAY_ELEMENTS:,} are allowed")
    start = cursor.offset
    if type_ == _STRING:
        _skip_strings(cursor, count, what)
        return Array(cursor.path, "str", count, start, cursor.offset - start)
    if type_ not in _SCALARS:
        kind = "an array in an array" if type_ == _ARRAY else f"elements of unknown type {type_}"
        raise cursor.error(f"{what} is {kind}")
    name, code = _SCALARS[type_]
    size_bytes = count * struct.calcsize(f"<{code}")
    if type_ == _BOOL:
        _skip_bools(cursor, count, what)
    else:
        cursor.skip(size_bytes, what)
    return Array(cursor.path, name, count, start, size_bytes)


def _skip_strings(cursor: _Cursor, count: int, what: str) -> None:
    cursor.array_strings += count
    if cursor.array_strings > MAX_ARRAY_STRINGS:
        raise cursor.error(f"the arrays up to {what} have more than {MAX_ARRAY_STRINGS:,} strings")
    cursor.need(count * 8, what)
    window, at = b"", 0
    for _ in range(count):
        if at + 8 > len(window):
            cursor.skip(at, what)
            window, at = cursor.peek(8, what), 0
        length: int = _U64.unpack_from(window, at)[0]
        if length > MAX_STRING_BYTES:
            cursor.skip(at, what)
            raise cursor.error(
                f"{what} has a string of {length:,} bytes, {MAX_STRING_BYTES:,} are allowed"
            )
        at += 8 + length
    cursor.skip(at, what)


def _skip_bools(cursor: _Cursor, count: int, what: str) -> None:
    """Bools are the only numbers with invalid values; look at all, a piece at a time."""
    left = count
    while left:
        piece = cursor.take(min(left, 1 << 20), what)
        if piece.strip(b"\x00\x01"):
            raise cursor.error(f"{what} has an element that is neither true nor false")
        left -= len(piece)


def _split_strings(data: bytes, count: int, path: Path) -> Iterator[str]:
    """Yield the strings of an array whose bytes `_skip_strings` has walked over before."""
    at = 0
    for _ in range(count):
        end = at + 8
        if end <= len(data):
            end += int.from_bytes(data[at:end], "little")
        if end > len(data):
            raise GgufError(f"{path} changed after its header was read.")
        yield data[at + 8 : end].decode(errors="replace")
        at = end


def _alignment(cursor: _Cursor, metadata: dict[str, tuple[int, Value]]) -> int:
    type_, alignment = metadata.get("general.alignment", (_UINT32, DEFAULT_ALIGNMENT))
    if type_ != _UINT32 or not isinstance(alignment, int):
        raise cursor.error("general.alignment is not a 32-bit unsigned number")
    if alignment.bit_count() != 1:
        raise cursor.error(f"general.alignment is {alignment:,}, not a power of two")
    return alignment


def _tensor(cursor: _Cursor) -> TensorInfo:
    """Read one entry of the tensor list."""
    name = cursor.string("a tensor name", MAX_NAME_BYTES)
    shown = _shown(name)
    if not name or not name.isprintable() or " " in name:
        # Tools print names into the lines that we parse: a line end in a name could forge one.
        raise cursor.error(f"{shown} is no tensor name")
    n_dims = cursor.unsigned("I", f"tensor {shown}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {shown} has {n_dims:,} dimensions, 1 to 4 are allowed")
    shape = tuple(cursor.unsigned("Q", f"tensor {shown}") for _ in range(n_dims))
    n_elements = math.prod(shape)
    if min(shape) < 1 or max(shape) > _MAX_INT64 or n_elements > _MAX_INT64:
        raise cursor.error(f"tensor {shown} has the impossible shape {list(shape)}")
    number = cursor.unsigned("I", f"tensor {shown}")
    if number not in _TYPES:
        raise cursor.error(f"tensor {shown} has the unknown type {number}")
    type_, block_elements, block_bytes = _TYPES[number]
    if shape[0] % block_elements:
        raise cursor.error(
            f"tensor {shown} has rows of {shape[0]:,}, but {type_} wants multiples of "
            f"{block_elements}"
        )
    offset = cursor.unsigned("Q", f"tensor {shown}")
    size_bytes = n_elements // block_elements * block_bytes
    return TensorInfo(name, shape, type_, offset, size_bytes, n_elements)


def _placed(
    cursor: _Cursor, infos: list[TensorInfo], data_offset: int, alignment: int
) -> tuple[TensorInfo, ...]:
    """
    Check where the data of the tensors lies: in list order, each padded, inside the file.

    llama.cpp accepts no other order and no gap, so that overlaps cannot occur either.
    """
    names: set[str] = set()
    expected = 0
    for info in infos:
        if info.name in names:
            raise cursor.error(f"tensor {_shown(info.name)} occurs twice")
        names.add(info.name)
        if info.offset != expected:
            raise cursor.error(
                f"tensor {_shown(info.name)} begins at {info.offset:,}, not at {expected:,}"
            )
        end = data_offset + info.offset + info.size_bytes
        if end > cursor.size:
            raise cursor.error(
                f"tensor {_shown(info.name)} ends at byte {end:,}, the file at {cursor.size:,}"
            )
        expected = _padded(info.offset + info.size_bytes, alignment)
    return tuple(infos)


def _padded(offset: int, alignment: int) -> int:
    """Round up to the next multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def _by_size(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _shown(name: str) -> str:
    """Make a name from the file fit for a message: short, on one line, no runner command."""
    return console.clean(ascii(name[:80]))
