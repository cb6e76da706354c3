"""
Tensors of upstream's safetensors as arrays over the files: nothing is loaded that is not looked at.

numpy has no bfloat16. Such a tensor comes as its bit patterns (uint16), and `as_float32` widens
them, which is exact.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipelines import safetensors_header
from pipelines.errors import UpstreamError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_LENGTH_BYTES: Final = 8
_INDEX: Final = "model.safetensors.index.json"
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """
    One upstream tensor.

    Attributes:
        name: Upstream's name of it.
        dtype: "F32", "F16" or "BF16".
        shape: As upstream writes it, row length last.
        path: File that holds it.
        offset: Position of its first byte in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def elements_count(self) -> int:
        """Number of elements; a scalar has one."""
        return int(np.prod(self.shape, dtype=np.int64))

    def array(self) -> NDArray[Any]:
        """Map it into memory, read-only, in its own shape; BF16 as uint16."""
        return np.memmap(
            self.path, dtype=_DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape
        )


def as_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Widen values of a `SourceTensor` to float32; exact for all three types."""
    if dtype == "BF16":
        widened: NDArray[np.float32] = (values.astype(np.uint32) << 16).view(np.float32)
        return widened
    return values.astype(np.float32, copy=False)


def open_all(directory: Path) -> dict[str, SourceTensor]:
    """
    Find every weight of a checkpoint, by upstream's name; buffers of integers are left out.

    Raises:
        UpstreamError: A file is not whole, or holds weights that are quantized already.
    """
    index = directory / _INDEX
    if index.is_file():
        shards = sorted(set(safetensors_header.weight_map(index).values()))
    else:
        shards = sorted(path.name for path in directory.glob("*.safetensors"))
    found: dict[str, SourceTensor] = {}
    for shard in shards:
        path = directory / shard
        tensors = safetensors_header.read(path)
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
        # The data follows without gaps, in the order in which `read` returns the tensors.
        offset = _LENGTH_BYTES + header_bytes
        for tensor in tensors:
            if not tensor.is_buffer:
                if tensor.dtype not in _DTYPES:
                    raise UpstreamError(f"{shard}: {tensor.name} is stored in {tensor.dtype}.")
                found[tensor.name] = SourceTensor(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    path=path,
                    offset=offset,
                )
            offset += tensor.size_bytes
    if not found:
        raise UpstreamError(f"{directory} holds no safetensors with weights.")
    return found
