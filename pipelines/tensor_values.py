"""
Every value of a GGUF against upstream's: a flipped bit is found wherever it is.

The files are streamed, a few MB at a time, both mapped and never loaded. What upstream stores in
bfloat16 or float32 is rounded to the nearest float16, ties to even, as IEEE 754 says; then bit
patterns are compared, so equal means equal. Rounding bfloat16 is a look-up in a table of all its
65,536 values, which is as fast as memory.

Where it is not known in which order a class's values must lie (`Origin.certain` is False) and they
do not lie in upstream's, the multiset of all bit patterns is compared: a permutation leaves it
alone, everything else does not. If a few values differ, values were damaged; if most do, the class
needs a rule that we do not know, and that is said and proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipelines.source_tensors import as_float32
from pipelines.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from pipelines.gguf_header import Header, TensorInfo
    from pipelines.tensor_origins import Origin

# Large enough that Python's own steps cost nothing, small enough that a chunk stays in the cache.
_CHUNK_ELEMENTS: Final = 1 << 20
_F16_EXPONENT: Final = 0x7C00
_F16_MAGNITUDE: Final = 0x7FFF
_F16_LARGEST: Final = 65504.0
# Fewer than this share of all values: damage. A rule that is not known changes nearly all.
_DAMAGE_SHARE: Final = 0.01
# Of what is computed of config.json in float32, once here and once in the converter.
_COMPUTED_TOLERANCE: Final = 1e-5
_DTYPES: Final = {"F16": "<u2", "F32": "<f4"}
# A factor between GGUF and upstream: from so many values, to within two roundings to float16.
_FEW: Final = 8
_FACTOR_TOLERANCE: Final = 2e-3


@dataclass(kw_only=True)
class Compared:
    """
    What was found in all tensors.

    Attributes:
        values_count: Values that were looked at.
        tensors_count: Tensors that were compared with upstream's.
        differing: One sentence for each tensor whose values are wrong.
        reordered: Tensors of which only the multiset of values could be compared, and is equal.
        unexplained: Tensors whose numbers are made by a rule that is not known here.
        untraced: Tensors that nothing was given to compare with.
        unread: Tensors in a type that no 16-bit GGUF has; their values were not looked at.
    """

    values_count: int = 0
    tensors_count: int = 0
    differing: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    untraced: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Seen:
    """What was found in one tensor so far."""

    name: str
    row_length: int
    not_finite_count: int = 0
    not_finite_row: int = -1
    not_finite_upstream: float | None = None
    zero_rows_count: int = 0
    zero_row: int = -1
    differing_count: int = 0
    first: tuple[int, float, float] | None = None


def compare(
    header: Header,
    origins: Mapping[str, Origin],
    computed: Mapping[str, NDArray[np.float32]],
    progress: Callable[[float], None],
) -> Compared:
    """
    Look at every value of every tensor.

    Args:
        header: Of the 16-bit GGUF.
        origins: Where its tensors come from, those of equal shape only.
        computed: Tensors that follow from config.json alone.
        progress: Called with the bytes of tensor data done so far.
    """
    result = Compared()
    done_bytes = 0
    for tensor in header.tensors:
        if tensor.type in _DTYPES:
            _one(header, tensor, origins, computed, result)
            result.values_count += tensor.n_elements
        else:
            result.unread.append(tensor.name)
        done_bytes += tensor.size_bytes
        progress(done_bytes)
    return result


def _one(
    header: Header,
    tensor: TensorInfo,
    origins: Mapping[str, Origin],
    computed: Mapping[str, NDArray[np.float32]],
    result: Compared,
) -> None:
    """Look at one tensor and file what is wrong with it."""
    values, origin = _mapped(header, tensor), origins.get(tensor.name)
    seen = _Seen(name=tensor.name, row_length=values.shape[1])
    for start, stop in _chunks(values.shape):
        got = values[start:stop]
        expected = None if origin is None else _expected(origin, start, stop, tensor, got.shape)
        _look(seen, start, got, expected)
    if tensor.name in computed:
        _computed(seen, values, computed[tensor.name])
    if origin is None and tensor.name not in computed:
        result.untraced.append(tensor.name)
    else:
        result.tensors_count += 1
    if problem := _unusable(seen):
        result.differing.append(problem)
    elif seen.differing_count and origin is not None:
        _judge(seen, tensor, values, origin, origins, result)
    elif seen.differing_count:
        result.differing.append(_differs(seen, "config.json"))


def _mapped(header: Header, tensor: TensorInfo) -> NDArray[Any]:
    """Map the data of a tensor as rows: F16 as bit patterns, F32 as numbers."""
    rows = tensor.n_elements // tensor.shape[0]
    return np.memmap(
        header.path,
        dtype=_DTYPES[tensor.type],
        mode="r",
        offset=header.data_offset + tensor.offset,
        shape=(rows, tensor.shape[0]),
    )


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows, length = shape
    step = max(1, _CHUNK_ELEMENTS // length)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


@dataclass(frozen=True)
class _Expected:
    """What a chunk has to hold, as bit patterns; `also` is another rounding that is as right."""

    bits: NDArray[Any]
    also: NDArray[Any] | None
    upstream: Callable[[], NDArray[np.float32]]


def _expected(
    origin: Origin, start: int, stop: int, tensor: TensorInfo, shape: tuple[int, ...]
) -> _Expected:
    """Read upstream's values of a chunk and round them to the type of the GGUF."""
    # Elements of a vector are rows of its origin, and axes of length 1 may have been dropped.
    each = 1 if origin.first_rows else origin.rows_count * tensor.shape[0] // tensor.n_elements
    raw = origin.matrix(start * each, stop * each)

    def upstream() -> NDArray[np.float32]:
        return (as_float32(raw, origin.dtype) + np.float32(origin.plus)).reshape(shape)

    if tensor.type == "F16":
        if origin.dtype == "BF16" and not origin.plus:
            return _Expected(np.take(_rounded(), raw.reshape(shape)), None, upstream)
        if origin.dtype == "F16" and not origin.plus:
            return _Expected(raw.view(np.uint16).reshape(shape), None, upstream)
        with np.errstate(over="ignore"):
            return _Expected(upstream().astype(np.float16).view(np.uint16), None, upstream)
    wide = upstream()
    also = None
    if origin.dtype == "F16" and origin.plus:
        # Where upstream stores float16, the sum may have been rounded to that before.
        also = wide.astype(np.float16).astype(np.float32).view(np.uint32)
    return _Expected(wide.view(np.uint32), also, upstream)


_ROUNDED: list[NDArray[np.uint16]] = []


def _rounded() -> NDArray[np.uint16]:
    """Bit pattern of float16 for each bit pattern of bfloat16."""
    if not _ROUNDED:
        every = as_float32(np.arange(1 << 16, dtype=np.uint16), "BF16")
        with np.errstate(over="ignore", invalid="ignore"):
            _ROUNDED.append(every.astype(np.float16).view(np.uint16))
    return _ROUNDED[0]


def _look(seen: _Seen, start: int, got: NDArray[Any], expected: _Expected | None) -> None:
    """Look for values that are not finite, for rows of zeros, and for differences."""
    half = got.dtype == np.uint16
    if half:
        largest = (got & _F16_MAGNITUDE).max(axis=1)
        bad_rows = np.flatnonzero(largest >= _F16_EXPONENT)
    else:
        largest = np.abs(got).max(axis=1)
        bad_rows = np.flatnonzero(~np.isfinite(largest))
    numbers = got.view(np.float16) if half else got
    if len(bad_rows):
        _not_finite(seen, start, numbers, bad_rows, expected)
    if expected is None:
        return
    if len(zeros := np.flatnonzero(largest == 0)):
        lost = zeros[expected.upstream()[zeros].any(axis=1)]
        if len(lost) and seen.zero_row < 0:
            seen.zero_row = start + int(lost[0])
        seen.zero_rows_count += len(lost)
    if not np.array_equal(got if half else got.view(np.uint32), expected.bits):
        _unequal(seen, start, numbers, expected)


def _not_finite(
    seen: _Seen,
    start: int,
    numbers: NDArray[Any],
    rows: NDArray[np.int64],
    expected: _Expected | None,
) -> None:
    bad = ~np.isfinite(numbers[rows])
    if seen.not_finite_row < 0:
        seen.not_finite_row = start + int(rows[0])
        if expected is not None:
            seen.not_finite_upstream = float(expected.upstream()[rows[0]][bad[0]][0])
    seen.not_finite_count += int(bad.sum())


def _unequal(seen: _Seen, start: int, numbers: NDArray[Any], expected: _Expected) -> None:
    bits = numbers.view(np.uint16 if numbers.dtype == np.float16 else np.uint32)
    wrong = bits != expected.bits
    if expected.also is not None:
        wrong &= bits != expected.also
    count = int(wrong.sum())
    if count and seen.first is None:
        row, column = (int(each[0]) for each in np.nonzero(wrong))
        seen.first = (
            (start + row) * seen.row_length + column,
            float(numbers[row, column]),
            float(expected.upstream()[row, column]),
        )
    seen.differing_count += count


def _computed(seen: _Seen, values: NDArray[Any], wanted: NDArray[np.float32]) -> None:
    """Compare a tensor that is computed of config.json."""
    got = values.ravel() if values.dtype == np.float32 else values.view(np.float16).ravel()
    wrong = ~np.isclose(got, wanted, rtol=_COMPUTED_TOLERANCE, atol=0)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        seen.first = (at, float(got[at]), float(wanted[at]))
        seen.differing_count = int(wrong.sum())


def _unusable(seen: _Seen) -> str:
    """Say what makes a tensor useless by itself: values that are not finite, rows of zeros."""
    if seen.not_finite_count:
        upstream, why = seen.not_finite_upstream, ""
        if upstream is not None:
            why = f"; upstream's is {upstream:.6g}"
            if math.isfinite(upstream) and abs(upstream) > _F16_LARGEST:
                why += ", too large for 16 bits"
        return (
            f"{seen.name} holds NaN or infinity in {counted(seen.not_finite_count, 'value')}, the "
            f"first in row {seen.not_finite_row:,}{why}"
        )
    if seen.zero_rows_count:
        return (
            f"{seen.name} holds {counted(seen.zero_rows_count, 'row')} of zeros only, where "
            f"upstream's has numbers, the first is row {seen.zero_row:,}"
        )
    return ""


def _differs(seen: _Seen, upstream: str) -> str:
    assert seen.first is not None
    at, got, wanted = seen.first
    count = counted(seen.differing_count, "value")
    return (
        f"{seen.name} differs from {upstream} in {count}, the first in "
        f"row {at // seen.row_length:,}, column {at % seen.row_length:,}: {got:.6g} instead of "
        f"{wanted:.6g}"
    )


def _judge(  # noqa: PLR0913, PLR0917 - what there is to know about one tensor
    seen: _Seen,
    tensor: TensorInfo,
    values: NDArray[Any],
    origin: Origin,
    origins: Mapping[str, Origin],
    result: Compared,
) -> None:
    """Find out what kind of difference it is, and file it."""
    moved = _multiset_distance(tensor, values, origin)
    if not origin.certain and moved == 0:
        result.reordered.append(tensor.name)
        return
    if not origin.certain and moved > _DAMAGE_SHARE * tensor.n_elements:
        result.unexplained.append(tensor.name)
        return
    why = ""
    if other := _other_origin(tensor, values, origin, origins):
        why = f"; it holds {other}"
    elif moved == 0:
        why = "; the same values lie in another order"
    elif factor := _factor(tensor, values, origin):
        why = f"; its values are {factor:.6g} times upstream's"
    result.differing.append(_differs(seen, origin.upstream) + why)


def _multiset_distance(tensor: TensorInfo, values: NDArray[Any], origin: Origin) -> int:
    """Count the values that have no equal on the other side, whatever the order."""
    if tensor.type == "F32":
        flat = np.sort(np.asarray(values).ravel())
        source = np.sort(_every(tensor, values, origin).view(np.float32))
        return int((flat != source).sum())
    balance = np.zeros(1 << 16, dtype=np.int64)
    for start, stop in _chunks(values.shape):
        expected = _expected(origin, start, stop, tensor, values[start:stop].shape)
        balance += np.bincount(values[start:stop].ravel(), minlength=1 << 16)
        balance -= np.bincount(expected.bits.ravel(), minlength=1 << 16)
    return int(np.abs(balance).sum()) // 2


def _every(tensor: TensorInfo, values: NDArray[Any], origin: Origin) -> NDArray[Any]:
    chunks = _chunks(values.shape)
    return np.concatenate(
        [
            _expected(origin, start, stop, tensor, values[start:stop].shape).bits.ravel()
            for start, stop in chunks
        ]
    )


def _other_origin(
    tensor: TensorInfo, values: NDArray[Any], origin: Origin, origins: Mapping[str, Origin]
) -> str:
    """Name the upstream tensor of equal shape whose first rows are found here instead."""
    stop = next(_chunks(values.shape))[1]
    bits = values[:stop] if tensor.type == "F16" else values[:stop].view(np.uint32)
    for other in origins.values():
        if other.parts != origin.parts and other.shape == origin.shape:
            expected = _expected(other, 0, stop, tensor, bits.shape)
            if np.array_equal(bits, expected.bits):
                return other.upstream
    return ""


def _factor(tensor: TensorInfo, values: NDArray[Any], origin: Origin) -> float:
    """Return the factor between the GGUF and upstream if it is one for all values, else 0."""
    stop = next(_chunks(values.shape))[1]
    got = values[:stop] if tensor.type == "F32" else values[:stop].view(np.float16)
    wanted = _expected(origin, 0, stop, tensor, got.shape).upstream()
    # Away from the smallest numbers, whose last bit is a large part of them.
    large = np.abs(wanted) > np.float32(1e-3)
    if large.sum() < _FEW:
        return 0.0
    ratios = got[large].astype(np.float32) / wanted[large]
    middle = float(np.median(ratios))
    spread = float(np.abs(ratios - middle).max())
    return middle if spread <= _FACTOR_TOLERANCE * abs(middle) and middle != 1 else 0.0
