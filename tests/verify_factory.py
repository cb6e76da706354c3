"""Conversions to prove, and GGUFs in which one thing is wrong."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from record_factory import convert_record, fetch_record

from pipelines import convert, fetch, gguf_header
from pipelines.layout import Layout
from pipelines.params import Corpus, Verify, VerifySlice
from pipelines.verify_subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from pipelines.toolchain import Toolchain

EMBEDDED = Path(__file__).resolve().parent.parent / "examples/tiny-llama"


def converted(source: Path, into: Path, tools: Toolchain) -> Path:
    """Convert a model by the real converter, as the stage does; return the GGUF."""
    into.mkdir(parents=True, exist_ok=True)
    convert.convert(
        source, into / "f16.gguf", tools=tools, name="tiny", repository=None,
        scratch=into / "scratch", log=into / "log", label="convert tiny",
    )  # fmt: skip
    return into / "f16.gguf"


def subject(root: Path, source: Path, f16: Path, tools: Toolchain) -> Subject:
    """Put a conversion before the layers of `verify`."""
    header = gguf_header.read(f16)
    scratch = root / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(path="corpora/evaluation.txt", sha256="0" * 64)
    return Subject(
        model="tiny",
        source=source,
        f16=f16,
        header=header,
        config=fetch.read_config(source),
        fetch=fetch_record("tiny"),
        convert=convert_record("tiny", architecture=header.text("general.architecture")),
        tools=tools,
        log=root / "log",
        scratch=scratch,
        at=Layout(root),
        slice_=VerifySlice(model="tiny", recipe=1, corpus=corpus, verify=Verify()),
    )


def read_tensor(path: Path, name: str) -> NDArray[Any]:
    """Read one tensor in numpy's order of axes."""
    header = gguf_header.read(path)
    tensor = next(each for each in header.tensors if each.name == name)
    dtype = {"F16": np.float16, "F32": np.float32}[tensor.type]
    offset = header.data_offset + tensor.offset
    values = np.fromfile(path, dtype=dtype, count=tensor.n_elements, offset=offset)
    return values.reshape(tensor.shape[::-1])


def rewritten(
    path: Path,
    into: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    drop: Iterable[str] = (),
) -> Path:
    """Copy a GGUF with other metadata (None removes a key), other or more tensors, or fewer."""
    reader = gguf.GGUFReader(path)
    changed, dropped = dict(metadata or {}), set(drop)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = gguf.GGUFWriter(into, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changed:
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for key, value in changed.items():
        if value is not None:
            kind = {
                bool: gguf.GGUFValueType.BOOL,
                int: gguf.GGUFValueType.UINT32,
                float: gguf.GGUFValueType.FLOAT32,
                str: gguf.GGUFValueType.STRING,
            }[type(value)]
            writer.add_key_value(key, value, kind)
    pending = dict(tensors or {})
    for tensor in reader.tensors:
        if tensor.name not in dropped:
            writer.add_tensor(tensor.name, pending.pop(tensor.name, np.asarray(tensor.data)))
    for name, values in pending.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return into


def bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Cut float32 to the bit patterns of bfloat16."""
    found: NDArray[np.uint16] = (
        np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16
    ).astype(np.uint16)
    return found


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bit patterns of bfloat16."""
    found: NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
    return found


def write_checkpoint(
    directory: Path, config: dict[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> Path:
    """Write config.json and model.safetensors; uint16 stands for BF16."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = {np.dtype(np.uint16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    header: dict[str, Any] = {}
    data = bytearray()
    for name, values in tensors.items():
        end = len(data) + math.prod(values.shape) * values.itemsize
        header[name] = {
            "dtype": names[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [len(data), end],
        }
        data += np.ascontiguousarray(values).tobytes()
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return directory


def write_gguf(path: Path, architecture: str, blocks: int, tensors: Mapping[str, Any]) -> Path:
    """Write a GGUF that has tensors and hardly any metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
