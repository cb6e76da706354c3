"""GGUF headers are read whole or refused, whatever the bytes are."""

from __future__ import annotations

import math
import os
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from gguf_factory import tiny_llama_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import gguf_header
from pipelines.gguf_header import Array, GgufError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.gguf_header import Header

# No input may take more, whatever it claims: the limits of a string and of all text together.
MEMORY_LIMIT_BYTES = 96 << 20


# --- a real file ------------------------------------------------------------------------------


def test_reads_what_the_gguf_package_reads(tmp_path: Path) -> None:
    """Metadata, tensor list and offsets of a model equal those that gguf-py finds."""
    path = tiny_llama_gguf(tmp_path / "f16.gguf")

    header = gguf_header.read(path)

    assert_same_as_gguf_py(header)
    assert header.text("general.architecture") == "llama"
    assert header.integer("llama.block_count") == 2
    assert header.end_offset == header.file_size_bytes == path.stat().st_size
    assert header.type_counts() == {"F16": 16, "F32": 5}


def test_every_value_type_is_read(tmp_path: Path) -> None:
    """All GGUF value types, alone and in arrays, come back as gguf-py gives them."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for code in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{code}")(f"a.{code}", 100)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", math.pi)
    writer.add_bool("a.bool", val=True)
    writer.add_string("a.string", "grüße")
    writer.add_array("b.ints", [1, -2, 3])
    writer.add_array("b.floats", [0.5, -0.25])
    writer.add_array("b.bools", [True, False, True])
    writer.add_array("b.strings", ["a", "", "ü" * 40_000, "z"])
    write(writer)

    header = gguf_header.read(path)

    assert_same_as_gguf_py(header)
    strings = header.metadata["b.strings"]
    assert isinstance(strings, Array)
    assert (strings.element, strings.count) == ("str", 4)
    assert header.metadata["a.bool"] is True


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    """Sizes of all tensor types equal gguf-py's, less one that it has wrong and nobody stores."""
    sizes = {type_.name: size for type_, size in gguf.GGML_QUANT_SIZES.items()}

    # ggml-common.h: block_q8_1 has two half floats before its 32 bytes, not two floats.
    assert sizes.pop("Q8_1") == (32, 40)
    assert {name: gguf_header.BLOCKS[name] for name in sizes} == sizes


def test_bits_per_weight_are_hand_computed(tmp_path: Path) -> None:
    """512 weights in F16 and 256 in F32 take (512 * 16 + 256 * 32) / 768 bits each."""
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes(tensors=[("a", (256, 2), 1), ("b", (256,), 0)]))

    header = gguf_header.read(path)

    assert header.bits_per_weight() == pytest.approx(64 / 3)
    assert header.type_bytes() == {"F16": 1024, "F32": 1024}


def test_vocabulary_is_not_kept_in_memory(tmp_path: Path) -> None:
    """A vocabulary of 300,000 tokens costs the reader less than a mebibyte."""
    tokens = [f"token{number}".encode() for number in range(300_000)]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([("tokens", 9, array_of_strings(tokens))]))

    tracemalloc.start()
    header = gguf_header.read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 1 << 20
    tokens_read = header.metadata["tokens"]
    assert isinstance(tokens_read, Array)
    assert tokens_read.values() == [token.decode() for token in tokens]


def test_a_missing_or_wrong_value_is_named(tmp_path: Path) -> None:
    """Asking for a key that is not there, or is something else, names file and key."""
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([("general.name", 8, text("x"))]))
    header = gguf_header.read(path)

    with pytest.raises(GgufError, match=r"a\.gguf has no integer under general\.name"):
        header.integer("general.name")
    with pytest.raises(GgufError, match=r"no text under general\.basename"):
        header.text("general.basename")


# --- hostile files ----------------------------------------------------------------------------

U64 = struct.Struct("<Q").pack
U32 = struct.Struct("<I").pack


def text(value: str | bytes) -> bytes:
    """Encode a GGUF string."""
    data = value.encode() if isinstance(value, str) else value
    return U64(len(data)) + data


def array_of_strings(values: list[bytes]) -> bytes:
    """Encode the value of an array of strings."""
    return U32(8) + U64(len(values)) + b"".join(text(value) for value in values)


def gguf_bytes(
    pairs: list[tuple[str, int, bytes]] | None = None,
    tensors: list[tuple[str, tuple[int, ...], int]] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    offsets: list[int] | None = None,
    version: int = 3,
) -> bytes:
    """Compose a GGUF file by hand: valid, unless the arguments say otherwise."""
    pairs, tensors = pairs or [], tensors or []
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    data = b"GGUF" + U32(version) + U64(n_tensors) + U64(n_pairs)
    for key, type_, value in pairs:
        data += text(key) + U32(type_) + value
    sizes = {0: 4, 1: 2, 12: 144 / 256}
    offset = 0
    for index, (name, shape, type_) in enumerate(tensors):
        data += text(name) + U32(len(shape)) + b"".join(U64(length) for length in shape)
        data += U32(type_) + U64(offsets[index] if offsets else offset)
        offset += int(math.prod(shape) * sizes.get(type_, 1)) + 31 & ~31
    data += b"\0" * (-len(data) % 32)
    return data + b"\0" * min(offset, 1 << 20)


BAD = {
    "empty": (b"", "needs 4 bytes"),
    "other format": (b"PK\3\4" * 10, "begins with b'PK"),
    "version 1": (gguf_bytes(version=1), "version 1 is not"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "only magic": (b"GGUF", "needs 4 bytes"),
    "counts cut off": (b"GGUF" + U32(3) + U64(0), "needs 8 bytes"),
    "2^63 tensors": (gguf_bytes(counts=(1 << 63, 0)), "tensors, 131,072 are allowed"),
    "2^63 pairs": (gguf_bytes(counts=(0, 1 << 63)), "pairs, 65,536 are allowed"),
    "more pairs than bytes": (gguf_bytes(counts=(0, 60_000)), "60,000 metadata pairs needs"),
    "more tensors than bytes": (gguf_bytes(counts=(9_000, 0)), "9,000 tensors needs"),
    "key longer than the file": (
        gguf_bytes(counts=(0, 1))[:24] + U64(60_000) + b"k" * 30, "needs 60,000 bytes"),
    "key of 2^63 bytes": (gguf_bytes(counts=(0, 1))[:24] + U64(1 << 63) + b"k" * 30, "65,535 are"),
    "empty key": (gguf_bytes([("", 0, b"\0" * 30)]), "no metadata key"),
    "key with a line end": (gguf_bytes([("a\n::error::", 0, b"\0" * 30)]), "no metadata key"),
    "key twice": (gguf_bytes([("a", 0, b"\0"), ("a", 0, b"\0")]), "'a' occurs twice"),
    "unknown value type": (gguf_bytes([("a", 13, b"\0" * 30)]), "unknown type 13"),
    "bool of 2": (gguf_bytes([("a", 7, b"\2")]), "neither true nor false"),
    "text that is not UTF-8": (gguf_bytes([("a", 8, text(b"\xff\xfe"))]), "not UTF-8"),
    "string of 2^63 bytes": (gguf_bytes([("a", 8, U64(1 << 63))]), "16,777,216 are allowed"),
    "array in an array": (gguf_bytes([("a", 9, U32(9) + U64(1) + b"\0" * 30)]), "array in an"),
    "array of unknown type": (gguf_bytes([("a", 9, U32(77) + U64(1))]), "unknown type 77"),
    "array of 2^31 bytes": (gguf_bytes([("a", 9, U32(0) + U64(1 << 31))]), "67,108,864 are"),
    "array longer than the file": (gguf_bytes([("a", 9, U32(0) + U64(1 << 20))]), "1,048,576 by"),
    "2^26 strings": (gguf_bytes([("a", 9, U32(8) + U64(1 << 26))]), "4,194,304 strings"),
    "array string of 2^60 bytes": (
        gguf_bytes([("a", 9, U32(8) + U64(1) + U64(1 << 60))]), "16,777,216 are"),
    "array string over the end": (
        gguf_bytes([("a", 9, U32(8) + U64(2) + U64(9_999) + b"\0" * 9)]), "left in the file"),
    "array bool of 3": (gguf_bytes([("a", 9, U32(7) + U64(2) + b"\1\3")]), "neither true"),
    "alignment 0": (gguf_bytes([("general.alignment", 4, U32(0))]), "not a power of two"),
    "alignment 33": (gguf_bytes([("general.alignment", 4, U32(33))]), "not a power of two"),
    "alignment of 8 bits": (gguf_bytes([("general.alignment", 0, b"\x20")]), "not a 32-bit"),
    "alignment as text": (gguf_bytes([("general.alignment", 8, text("32"))]), "not a 32-bit"),
    "tensor without name": (gguf_bytes(tensors=[("", (1,), 0)]), "no tensor name"),
    "tensor name with a line end": (gguf_bytes(tensors=[("a\nb", (1,), 0)]), "no tensor name"),
    "tensor name of 64 bytes": (gguf_bytes(tensors=[("a" * 64, (1,), 0)]), "63 are allowed"),
    "tensor twice": (gguf_bytes(tensors=[("a", (8,), 0), ("a", (8,), 0)]), "'a' occurs twice"),
    "no dimension": (gguf_bytes(tensors=[("a" * 9, (), 0)]), "0 dimensions"),
    "five dimensions": (gguf_bytes(tensors=[("a", (1,) * 5, 0)]), "5 dimensions"),
    "dimension 0": (gguf_bytes(tensors=[("a", (0,), 0)]), "impossible shape"),
    "overflow": (gguf_bytes(tensors=[("a", (1 << 40, 1 << 40), 0)]), "impossible shape"),
    "unknown tensor type": (gguf_bytes(tensors=[("a", (1,), 4)]), "unknown type 4"),
    "half a block": (gguf_bytes(tensors=[("a", (255,), 12)]), "wants multiples of 256"),
    "tensor over the end": (gguf_bytes(tensors=[("a", (1 << 50,), 0)]), "ends at byte"),
    "overlap": (
        gguf_bytes(tensors=[("a", (64,), 0), ("b", (64,), 0)], offsets=[0, 32]), "not at 256"),
    "gap": (gguf_bytes(tensors=[("a", (64,), 0), ("b", (64,), 0)], offsets=[0, 512]), "not at 256"),
    "offset of 2^64": (gguf_bytes(tensors=[("a", (64,), 0)], offsets=[(1 << 64) - 32]), "not at 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_file_is_refused_with_place_and_cause(tmp_path: Path, name: str) -> None:
    """Each contradiction is refused with the byte and the cause, in little memory."""
    data, cause = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)

    error = refusal(path)

    assert cause in error.message
    assert "bad.gguf is not a valid GGUF file: at byte " in error.message
    assert len(error.message) < 1000
    assert error.hint


def test_names_in_messages_cannot_command_a_runner(tmp_path: Path) -> None:
    """A name from the file appears on one line, without escapes and without runner commands."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes([("a\r\n::set-env::\x1b[2J##[add-mask]", 0, b"\0" * 30)]))

    message = refusal(path).message

    assert not any(hostile in message for hostile in ("\n", "\r", "\x1b", "::set", "##["))


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: float) -> None:
    """A model that lost its end, in the header or in the data, is no model."""
    path = tiny_llama_gguf(tmp_path / "f16.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])

    assert "bytes are left" in refusal(path).message or "ends at byte" in refusal(path).message


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a directory and a pipe are refused at once, not waited for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    for path in (tmp_path / "absent", tmp_path, fifo):
        with pytest.raises(GgufError, match="is not a file"):
            gguf_header.read(path)


def test_an_array_read_after_the_file_changed_is_refused(tmp_path: Path) -> None:
    """Values are read later than the header; a file that changed in between is noticed."""
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([("a", 9, array_of_strings([b"one", b"two"]))]))
    array = gguf_header.read(path).metadata["a"]
    assert isinstance(array, Array)
    path.write_bytes(path.read_bytes().replace(U64(3), U64(99)))

    with pytest.raises(GgufError, match="changed after its header was read"):
        array.values()


# --- differential: a thousand damaged models ---------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The smallest model that has everything: texts, arrays, tensors of two types."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_bool("a.bool", val=True)
    writer.add_float32("a.float", 0.5)
    writer.add_array("a.strings", ["one", "two", "three"])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.ints", [1, 2, 3])
    for name, rows in (("blk.0.attn_q.weight", 2), ("output.weight", 3)):
        writer.add_tensor(name, np.ones((rows, 32), dtype="float16"))
    write(writer)
    return path.read_bytes()


# Lengths and counts at which readers break.
EDGES = [0, 1, 2, 7, 8, 31, 33, 255, 1 << 16, (1 << 26) + 1, (1 << 31) - 1, 1 << 31,
         (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 2**16), st.integers(0, 255)),
        st.tuples(st.just("bit"), st.integers(0, 2**16), st.integers(0, 7)),
        st.tuples(st.just("u64"), st.integers(0, 2**16), st.sampled_from(EDGES)),
        st.tuples(st.just("u32"), st.integers(0, 2**16), st.sampled_from(EDGES)),
        st.tuples(st.just("cut"), st.integers(0, 2**16), st.integers(1, 64)),
        st.tuples(st.just("insert"), st.integers(0, 2**16), st.integers(1, 64)),
        st.tuples(st.just("end"), st.integers(0, 2**16), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=mutations)
def test_a_damaged_model_is_refused_or_read_as_gguf_py_reads_it(
    model: bytes, tmp_path: Path, steps: list[tuple[str, int, int]]
) -> None:
    """No damage makes the reader crash, and what it accepts it reads as the reference does."""
    path = tmp_path / "mutant.gguf"
    path.write_bytes(mutate(model, steps))

    try:
        header = gguf_header.read(path)
    except GgufError:
        return
    # gguf 0.19 does not know the newest type.
    if all(tensor.type != "Q2_0" for tensor in header.tensors):
        assert_same_as_gguf_py(header)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Random bytes behind a valid beginning are refused or are a small valid file."""
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF" + U32(3) + data)

    try:
        header = gguf_header.read(path)
    except GgufError:
        return
    assert len(header.metadata) + len(header.tensors) <= len(data)


def mutate(data: bytes, steps: list[tuple[str, int, int]]) -> bytes:
    """Damage `data` step by step; places beyond its end wrap around into the header."""
    result = bytearray(data)
    for kind, place, value in steps:
        at = place % max(len(result), 1)
        if kind == "byte":
            result[at : at + 1] = bytes([value])
        elif kind == "bit" and result:
            result[at] ^= 1 << value
        elif kind == "u64":
            result[at : at + 8] = U64(value)
        elif kind == "u32":
            result[at : at + 4] = U32(value & 0xFFFFFFFF)
        elif kind == "cut":
            del result[at : at + value]
        elif kind == "insert":
            result[at:at] = b"\1" * value
        elif kind == "end":
            del result[at:]
    return bytes(result)


# --- helpers ----------------------------------------------------------------------------------


def refusal(path: Path) -> GgufError:
    """Read a file that must be refused, and prove that this needed little memory."""
    tracemalloc.start()
    with pytest.raises(GgufError) as caught:
        gguf_header.read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < MEMORY_LIMIT_BYTES
    return caught.value


def write(writer: Any) -> None:
    """Finish a file of gguf-py's writer."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_as_gguf_py(header: Header) -> None:
    """Compare everything that was read with the reference reader."""
    reference = gguf.GGUFReader(header.path)
    fields = {k: field for k, field in reference.fields.items() if not k.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, value in header.metadata.items():
        if isinstance(value, Array):
            assert same(value.values(), elements(fields[key])), key
        else:
            assert same(value, fields[key].contents()), key
    assert header.data_offset == reference.data_offset
    assert [
        (t.name, list(t.shape), t.type, t.n_elements, t.size_bytes, header.data_offset + t.offset)
        for t in header.tensors
    ] == [
        (t.name, t.shape.tolist(), t.tensor_type.name, t.n_elements, t.n_bytes, t.data_offset)
        for t in reference.tensors
    ]


def elements(field: Any) -> list[Any]:
    """Return an array as gguf-py read it; text that is not UTF-8 breaks its own `contents`."""
    if field.types[-1] == gguf.GGUFValueType.STRING:
        return [bytes(field.parts[index]).decode(errors="replace") for index in field.data]
    return list(field.contents() or [])


def same(ours: Any, theirs: Any) -> bool:
    """Equal, with NaN equal to itself."""
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs) or (ours != ours and theirs != theirs)  # noqa: PLR0124 - NaN
