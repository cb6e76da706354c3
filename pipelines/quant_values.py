"""
Whether the numbers in a quant are those of its source: sampled rows, read back and compared.

llama-quantize checks the blocks that it made for NaN, and that is all that anybody checks. A build
with a broken kernel, a tensor that got another one's data, a row that overflowed: all that ends
with exit code 0. So rows of every tensor are turned back into numbers by gguf-py's reference
implementation, which is not the code that made them, and held against the 16-bit model.

The measure is the root mean square of the error over that of the source: 0 for equal rows, 1 for
rows of zeros, 1.4 for other rows of equal size. A right quant stays below what its type can do,
which was measured (`WORST`; `python bench/quant_error.py` measures it again). A limit is twice that
for a single row, half as much again for all sampled rows of a tensor, and less than that of foreign
rows. Of the types that gguf-py cannot read (Q2_0, Q1_0) nothing is known, and that is recorded.

A scale is stored in 16 bits: in rows of very small numbers (1e-5 and less) it has few digits, or is
zero. The limit of a row grows by what that can do; where it is more than a quarter, the row is
counted and not judged.

Reading 16 rows of each tensor costs less than a hundredth of making them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import gguf_py
from pipelines.errors import ToolError
from pipelines.gguf_header import BLOCKS
from pipelines.records import QuantValues
from pipelines.wording import first_few, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from pipelines.gguf_header import Header, TensorInfo
    from pipelines.toolchain import Toolchain

ROWS_PER_TENSOR: Final = 16

# Worst row and worst tensor of `bench/quant_error.py`, as shares.
WORST: Final[Mapping[str, tuple[float, float]]] = {
    "Q8_0": (0.014, 0.011), "Q6_K": (0.146, 0.059), "Q5_K": (0.131, 0.050),
    "Q5_1": (0.072, 0.057), "Q5_0": (0.106, 0.072), "Q4_K": (0.165, 0.101),
    "Q4_1": (0.155, 0.100), "Q4_0": (0.189, 0.131), "IQ4_NL": (0.234, 0.123),
    "IQ4_XS": (0.191, 0.111), "MXFP4": (0.240, 0.167), "Q3_K": (0.284, 0.201),
    "IQ3_S": (0.632, 0.350), "IQ3_XXS": (0.640, 0.387), "Q2_K": (0.661, 0.347),
    "IQ2_S": (0.849, 0.645), "IQ2_XS": (0.832, 0.668), "IQ2_XXS": (1.032, 0.895),
    "IQ1_M": (0.889, 0.598), "IQ1_S": (1.045, 0.722), "TQ1_0": (0.874, 0.811),
    "TQ2_0": (0.874, 0.811),
}  # fmt: skip
# Rounding to bfloat16, or to float16 where the model is in more than that.
_ROUNDED: Final = (2**-8, 2**-8)
_ROW_MARGIN: Final = 2.0
_TENSOR_MARGIN: Final = 1.5
# Rows of zeros have an error of 1 and are looked for by themselves, foreign rows one of 1.4. Types
# of three values for numbers that have more come close to 1.
_MOST: Final = 1.2
# A row is not judged when its scale may be off by more than this.
_TINY: Final = 0.25
# Half of the last digit of the smallest numbers in 16 bits, and how many steps of the scale a row's
# largest value is: in types of two levels the scale of the scales is stored.
_SCALE_DIGITS: Final = 2.0**-25
_SCALE_STEPS: Final[Mapping[str, int]] = dict.fromkeys(WORST, 4096) | dict.fromkeys(
    ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"), 128
)
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# What is stored as it was, or in a type that holds every value of the other one.
_EXACT: Final = {"F32": {"F32", "F16", "BF16"}, "F16": {"F16"}, "BF16": {"BF16"}}
_HINT: Final = (
    "The toolchain is broken on this machine or the disk is: `fleet toolchain --verify`, and run "
    "it again. If it stays, report the type and the model."
)


def read_rows(
    header: Header, tensor: TensorInfo, rows: NDArray[np.int64], tools: Toolchain
) -> NDArray[np.float32] | None:
    """
    Read whole rows of a tensor as numbers.

    Returns:
        (rows, row length), or None if gguf-py cannot read the type.
    """
    import numpy as np  # noqa: PLC0415 - the extra `convert`

    elements, block_bytes = BLOCKS[tensor.type]
    count = tensor.n_elements // tensor.shape[0]
    data = np.memmap(
        header.path, dtype=np.uint8, mode="r", offset=header.data_offset + tensor.offset,
        shape=(count, tensor.shape[0] // elements * block_bytes),
    )[rows]  # fmt: skip
    if tensor.type == "BF16":
        wide: NDArray[np.float32] = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return wide
    if tensor.type in _DTYPES:
        return data.view(_DTYPES[tensor.type]).astype(np.float32)
    return gguf_py.dequantize(tools, data, tensor.type)


def row_errors(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Root mean square of each row's error over that of the row; 0 for a right row of zeros."""
    import numpy as np  # noqa: PLC0415

    error = np.square(found.astype(np.float64) - wanted).sum(axis=1)
    size = np.square(wanted.astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.sqrt(error / size)
    return np.where(size > 0, share, np.where(error > 0, np.inf, 0.0))


def whole_error(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Root mean square of the error of all rows over that of all rows."""
    return float(row_errors(wanted.reshape(1, -1), found.reshape(1, -1))[0])


def examine(source: Header, made: Header, tools: Toolchain) -> QuantValues:
    """
    Read sampled rows of every quantized tensor and compare them with the 16-bit model.

    Args:
        source: Header of the 16-bit model.
        made: Header of the quant, with the same tensors in the same shapes.
        tools: Whose gguf-py reads them.

    Raises:
        ToolError: A row is not finite, is zero where the source's is not, or is too far from it;
            names tensor and row.
    """
    before = {tensor.name: tensor for tensor in source.tensors}
    looked = [_tensor(source, before[tensor.name], made, tensor, tools) for tensor in made.tensors]
    judged = [one for one in looked if one.rows_count]
    worst = max(judged, key=lambda one: one.error / one.limit if one.limit else 0.0, default=None)
    return QuantValues(
        tensors_count=len(judged),
        rows_count=sum(one.rows_count for one in judged),
        worst_tensor=worst.name if worst else "",
        worst_error=_rounded(worst.error) if worst else 0.0,
        worst_limit=_rounded(worst.limit) if worst else 0.0,
        tiny_rows_count=sum(one.tiny_rows_count for one in looked),
        unreadable=tuple(one.name for one in looked if one.unreadable),
    )


def sample(name: str, rows_count: int) -> NDArray[np.int64]:
    """
    Pick the rows of a tensor: the first, the last, and others that depend on its name alone.

    Equal models are sampled equally on every machine; two tensors of equal shape are not.
    """
    import numpy as np  # noqa: PLC0415

    if rows_count <= ROWS_PER_TENSOR:
        return np.arange(rows_count)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = random.choice(rows_count - 2, ROWS_PER_TENSOR - 2, replace=False) + 1
    return np.sort(np.append(drawn, [0, rows_count - 1]))


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """What was found in one tensor."""

    name: str
    rows_count: int = 0
    tiny_rows_count: int = 0
    error: float = 0.0
    limit: float = 0.0
    unreadable: bool = False


def _tensor(
    source: Header, before: TensorInfo, made: Header, after: TensorInfo, tools: Toolchain
) -> _Looked:
    """Compare the sampled rows of one tensor."""
    import numpy as np  # noqa: PLC0415

    name, type_ = after.name, after.type
    rows = sample(name, before.n_elements // before.shape[0])
    wanted = read_rows(source, before, rows, tools)
    found = read_rows(made, after, rows, tools)
    if wanted is None or found is None:
        return _Looked(name=name, unreadable=True)
    every = np.logical_and.reduce
    _require(
        after, rows, every(np.isfinite(found), axis=1), "holds values that are NaN or infinite"
    )
    if before.type in _EXACT.get(type_, ()):
        equal = every(wanted == found, axis=1)
        _require(after, rows, equal, f"differs from the 16-bit model's although it is {type_}")
        return _Looked(name=name, rows_count=len(rows))
    size = np.sqrt(np.square(wanted.astype(np.float64)).mean(axis=1))
    with np.errstate(divide="ignore"):
        slack = np.where(size > 0, _SCALE_DIGITS * _SCALE_STEPS.get(type_, 0) / size, 0.0)
    judged = slack <= _TINY
    tiny = int(np.count_nonzero(~judged))
    rows, wanted, found = rows[judged], wanted[judged], found[judged]
    if not len(rows):
        return _Looked(name=name, tiny_rows_count=tiny)
    _require(after, rows, (size[judged] == 0) | found.any(axis=1),
             "is zero, the 16-bit model's is not")  # fmt: skip
    _require(after, rows, (size[judged] > 0) | ~found.any(axis=1),
             "is not zero, the 16-bit model's is")  # fmt: skip
    row_worst, tensor_worst = WORST.get(type_, _ROUNDED)
    errors = row_errors(wanted, found)
    limits = min(_ROW_MARGIN * row_worst, _MOST) + slack[judged]
    far = int(np.argmax(errors - limits))
    _require(
        after, rows, errors <= limits,
        f"is {number(float(errors[far]))} of its size away from the 16-bit model's, "
        f"{number(float(limits[far]))} is allowed for {type_}", far,
    )  # fmt: skip
    limit = min(_TENSOR_MARGIN * tensor_worst, _MOST) + float(slack[judged].max())
    error = whole_error(wanted, found)
    if error > limit:
        raise ToolError(
            f"llama-quantize made {name} wrong: {len(rows)} sampled rows are {number(error)} of "
            f"their size away from the 16-bit model's, {number(limit)} is allowed for {type_}.",
            hint=_HINT,
        )
    return _Looked(name=name, rows_count=len(rows), tiny_rows_count=tiny, error=error, limit=limit)


def _require(
    tensor: TensorInfo,
    rows: NDArray[np.int64],
    right: NDArray[np.bool_],
    what: str,
    first: int | None = None,
) -> None:
    """Raise if a row is not right; row numbers count through all axes but the last."""
    wrong = [row for row, fine in zip(rows.tolist(), right.tolist(), strict=True) if not fine]
    if not wrong:
        return
    shown = wrong[0] if first is None else int(rows[first])
    raise ToolError(
        f"llama-quantize made {tensor.name} wrong: row {shown:,} {what}; so are {len(wrong)} of "
        f"{len(rows)} sampled rows ({first_few([f'{row:,}' for row in wrong])}).",
        hint=_HINT,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
