"""Safetensors headers: what is whole is read, everything else is named for what it is."""

from __future__ import annotations

import json
import re
import struct
from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import SHAPES, pack, safetensors, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import safetensors_header
from pipelines.errors import UpstreamError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = safetensors({"a": ("BF16", (4, 8)), "b": ("F32", (3,)), "c": ("F16", ())})


def entry(dtype: str = "F16", shape: object = (2,), offsets: object = (0, 4)) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_whole_file_is_read_with_names_dtypes_and_shapes(tmp_path: Path) -> None:
    """Tensors come in the order of their data, with dtype, shape and size; a scalar has one."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)

    tensors = safetensors_header.read(path)

    assert [(t.name, t.dtype, t.shape, t.size_bytes) for t in tensors] == [
        ("a", "BF16", (4, 8), 64),
        ("b", "F32", (3,), 12),
        ("c", "F16", (), 2),
    ]
    assert [t.elements_count for t in tensors] == [32, 3, 1]


def test_the_reader_agrees_with_the_reference_implementation(tmp_path: Path) -> None:
    """The safetensors library reads the same names, dtypes and shapes from the same file."""
    reference = pytest.importorskip("safetensors")
    path = tiny(tmp_path) / "model.safetensors"

    with reference.safe_open(path, framework="numpy") as file:
        expected = {
            name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118 - no mapping
        }

    assert {t.name: (t.dtype, t.shape) for t in safetensors_header.read(path)} == expected


BAD = {
    "empty": (b"", "too few for a header"),
    "short": (b"\x10\x00", "too few for a header"),
    "cut in the header": (GOOD[:40], "truncated"),
    "cut in the data": (GOOD[:-1], "truncated: 1 bytes are missing"),
    "something behind": (GOOD + b"\0", "1 bytes after the last tensor are nobody's"),
    "a zip": (b"PK\x03\x04" + bytes(60), "zip archive, as PyTorch writes pickles"),
    "a pickle": (b"\x80\x02}q\x00" + bytes(60), "a pickle"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "a huge header": (struct.pack("<Q", 1 << 62) + bytes(9), "claims a header of"),
    "no JSON": (pack(b"{'a': 1}"), "no JSON"),
    "deep JSON": (pack(b"[" * 200_000), "no JSON"),
    "a list": (pack([]), "no JSON object"),
    "metadata that is no object": (pack({"__metadata__": 3}), "__metadata__ is no object"),
    "one name twice": (pack(b'{"a":1,"a":2}'), '"a" comes twice'),
    "an unknown dtype": (pack({"a": entry(dtype="Q9")}, bytes(4)), 'unknown dtype "Q9"'),
    "a missing key": (pack({"a": {"dtype": "F16"}}), "not exactly dtype, shape"),
    "an extra key": (pack({"a": entry() | {"x": 1}}, bytes(4)), "not exactly dtype, shape"),
    "a negative shape": (pack({"a": entry(shape=[-2])}, bytes(4)), "malformed shape"),
    "a true shape": (pack({"a": entry(shape=[True])}, bytes(4)), "malformed shape"),
    "a shape beyond any number": (
        pack({"a": entry(shape=[1 << 62] * 64)}, bytes(4)),
        "64 axes of impossible length",
    ),
    "a text shape": (pack({"a": entry(shape="2")}, bytes(4)), "malformed shape"),
    "offsets of one": (pack({"a": entry(offsets=[0])}, bytes(4)), "malformed shape"),
    "too few bytes": (pack({"a": entry(shape=[3])}, bytes(4)), "needs 6 bytes and has 4"),
    "backward": (pack({"a": entry(offsets=[4, 0])}, bytes(4)), "needs 4 bytes and has -4"),
    "an overlap": (
        pack({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
        '"b" overlaps the one before it',
    ),
    "a gap": (
        pack({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10)),
        '"b" leaves a gap before it',
    ),
}


@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD.keys())
def test_what_is_not_whole_safetensors_is_refused_and_named(
    content: bytes, why: str, tmp_path: Path
) -> None:
    """The message names the file and what is wrong with it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(UpstreamError, match=r"^model\.safetensors is no") as caught:
        safetensors_header.read(path)

    assert why in caught.value.message


@pytest.mark.parametrize(
    "header",
    [
        {"\n::set-env name=X::##[add-path]": entry(shape=[3])},
        {"a": entry(dtype="\n::error::##[x]")},
        {"\n::stop-commands::" + "a" * 100_000: {}},
    ],
)
def test_names_of_a_stranger_are_short_and_no_runner_command(
    header: dict[str, Any], tmp_path: Path
) -> None:
    """A tensor may be called anything; the message about it stays one line that steers nobody."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, bytes(4)))

    with pytest.raises(UpstreamError) as caught:
        safetensors_header.read(path)

    assert not any(hostile in caught.value.message for hostile in ("::", "##[", "\n"))
    assert len(caught.value.message) < 300


def by_ranges(
    content: bytes, asked: list[tuple[int, int]] | None = None, **options: Any
) -> tuple[tuple[safetensors_header.Tensor, ...], int]:
    """Read a header as of a file elsewhere, and note what was asked for."""

    def read_range(start: int, end: int) -> bytes:
        if asked is not None:
            asked.append((start, end))
        return content[start:end]

    return safetensors_header.read_ranges(
        read_range, name="model.safetensors", size_bytes=len(content), **options
    )


def test_a_header_elsewhere_takes_one_request_or_two(tmp_path: Path) -> None:
    """The first guess holds most headers; of a longer one just the rest is asked for."""
    path = tmp_path / "model.safetensors"
    for count, wanted in ((3, 1), (3000, 2)):
        path.write_bytes(safetensors({f"layer.{i}.weight": ("F16", (4,)) for i in range(count)}))
        content = path.read_bytes()
        asked: list[tuple[int, int]] = []

        tensors, fetched_bytes = by_ranges(content, asked)

        assert tensors == safetensors_header.read(path)
        (header_bytes,) = struct.unpack("<Q", content[:8])
        assert len(asked) == wanted
        assert asked[-1][1] == fetched_bytes == max(8 + header_bytes, min(len(content), 64 << 10))


def test_a_range_is_believed_in_its_length_alone_and_a_long_header_is_not_fetched() -> None:
    """A server that cuts, or one whose header is endless, is told from a file that is none."""
    long = safetensors({f"layer.{i}.weight": ("F16", (4,)) for i in range(3000)})
    asked: list[tuple[int, int]] = []

    with pytest.raises(safetensors_header.RangeError, match="more than are fetched"):
        by_ranges(long, asked, limit_bytes=100_000)
    assert asked == [(0, 64 << 10)]
    with pytest.raises(safetensors_header.RangeError, match=r"^7 bytes of model"):
        safetensors_header.read_ranges(lambda *_: bytes(7), name="model.safetensors", size_bytes=99)


@settings(max_examples=400, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_a_changed_header_is_read_right_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """No mutation of a file makes the reader fail otherwise, or accept data it does not cover."""
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    try:
        tensors = safetensors_header.read(path)
    except UpstreamError as error:
        with pytest.raises(UpstreamError, match=re.escape(error.message)):
            by_ranges(bytes(content))
        return

    assert by_ranges(bytes(content))[0] == tensors
    (header_bytes,) = struct.unpack("<Q", content[:8])
    assert 8 + header_bytes + sum(t.size_bytes for t in tensors) == len(content)


def test_shards_and_their_index_make_one_checkpoint(tmp_path: Path) -> None:
    """Parameters and dtypes are counted over all shards."""
    tiny(tmp_path, shards=3)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"

    found = safetensors_header.read_checkpoint(tmp_path, shards, index)

    assert {t.name: t.shape for t in found.tensors} == SHAPES
    assert found.dtypes == {"BF16": len(SHAPES)}


def _missing(weight_map: dict[str, str]) -> None:
    weight_map["model.layers.1.extra.weight"] = "model-00001-of-00002.safetensors"


def _extra(weight_map: dict[str, str]) -> None:
    del weight_map["lm_head.weight"]


def _moved(weight_map: dict[str, str]) -> None:
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_missing, "1 tensor(s) are in the index but in no shard: model.layers.1.extra.weight"),
        (_extra, "1 tensor(s) are in a shard but not in the index: lm_head.weight"),
        (_moved, "1 tensor(s) are in another shard than the index says: lm_head.weight"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    change: Any, why: str, tmp_path: Path
) -> None:
    """A tensor that is missing, too many or elsewhere is named."""
    tiny(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))

    with pytest.raises(UpstreamError, match=re.escape(why)):
        safetensors_header.read_checkpoint(tmp_path, shards, index)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Both shards are named."""
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(GOOD)

    with pytest.raises(UpstreamError, match=r"tensor a is in model-1.+ and again in model-2"):
        safetensors_header.read_checkpoint(
            tmp_path, ["model-1.safetensors", "model-2.safetensors"], None
        )


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I32"])
def test_a_quantized_source_is_refused(dtype: str, tmp_path: Path) -> None:
    """Eight-bit floats and packed integers are no source for another quantization."""
    (tmp_path / "model.safetensors").write_bytes(
        safetensors({"a.weight": ("BF16", (8, 8)), "b.weight": (dtype, (8, 8))})
    )

    with pytest.raises(UpstreamError, match=rf"{dtype} \(b.weight\): only F32, F16 and BF16"):
        safetensors_header.read_checkpoint(tmp_path, ["model.safetensors"], None)


def test_positions_saved_beside_the_weights_are_no_weights(tmp_path: Path) -> None:
    """A buffer of an older transformers is neither refused as quantized nor counted."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        safetensors({"embeddings.position_ids": ("I64", (1, 512)), "w": ("F32", (4, 4))})
    )

    found = safetensors_header.read_checkpoint(tmp_path, [path.name], None)

    assert found.parameters_count == 16


def test_packed_weights_are_quantized_whatever_they_are_called(tmp_path: Path) -> None:
    """Integers under a weight's name are refused, beside a harmless buffer too."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        safetensors({"embeddings.position_ids": ("I64", (1, 8)), "q.qweight": ("I32", (4, 4))})
    )

    with pytest.raises(UpstreamError, match="I32"):
        safetensors_header.read_checkpoint(tmp_path, [path.name], None)
