"""
What the headers of two revisions' weights say, before a byte of a weight is fetched.

Only files that are on one side alone are looked at: a shard that has the digest of one of the other
side is that shard, whatever its name. That a tensor looks the same in two files says nothing of its
values; it counts as touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from pipelines import safetensors_header, wording
from pipelines.errors import UpstreamError
from pipelines.safetensors_header import UNQUANTIZED, RangeError
from pipelines.upstream_difference_words import NotToldError, several, shown
from pipelines.upstream_records import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipelines.hub import RemoteFile
    from pipelines.safetensors_header import Tensor

# A model of 400 billion weights comes in some 190 shards. More are not looked at, since each costs
# a request and the Hub counts them.
MAX_FILES: Final = 256
MAX_HEADER_BYTES: Final = 16 << 20
MAX_BYTES: Final = 128 << 20
_NAMED: Final = 20
_WORD: Final = 200


class NotWeightsError(NotToldError):
    """A file is no safetensors, whatever it is called: fetch would not take it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """
    The weights of one side that the other side has not.

    Attributes:
        files: In their order.
        read_range: Returns the bytes of a file from one position up to, not with, another.
    """

    files: Sequence[RemoteFile]
    read_range: Callable[[RemoteFile, int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found: the record's part, sentences, and why fetch would refuse the new weights."""

    changes: TensorChanges
    notes: tuple[str, ...]
    refusals: tuple[str, ...]


def compare(old: Weights, new: Weights, *, same_count: int) -> Found:
    """
    Read the headers and compare them.

    Args:
        old: Files of the old side that the new one has not.
        new: Files of the new side that the old one has not.
        same_count: Tensors in files that both have.

    Raises:
        NotToldError: A header cannot be had, or there are too many.
        NotWeightsError: One of the new files is none.
        RetryLaterError: And every other kind of UpstreamError that reading raises; the plain one
            says that a server does not hand out parts of files.
    """
    if len(old.files) + len(new.files) > MAX_FILES:
        raise NotToldError(
            f"{len(old.files) + len(new.files):,} changed files are more than are looked at"
        )
    budget = _Budget()
    now = _tensors(new, budget)
    try:
        then = _tensors(old, budget)
    except NotWeightsError as error:
        raise NotToldError(error.message) from error
    added = sorted(now.keys() - then.keys())
    removed = sorted(then.keys() - now.keys())
    both = sorted(now.keys() & then.keys())
    retyped = [name for name in both if _kind(then[name]) != _kind(now[name])]
    changes = TensorChanges(
        compared_count=len(now),
        added=tuple(shown(name, _WORD) for name in added[:_NAMED]),
        added_count=len(added),
        removed=tuple(shown(name, _WORD) for name in removed[:_NAMED]),
        removed_count=len(removed),
        retyped=tuple(_retyping(then[name], now[name]) for name in retyped[:_NAMED]),
        retyped_count=len(retyped),
        touched_count=len(both) - len(retyped),
        same_count=same_count,
        header_bytes=budget.spent_bytes,
    )
    quantized = [
        each for each in now.values() if each.dtype not in UNQUANTIZED and not each.is_buffer
    ]
    return Found(
        changes=changes,
        notes=(_sentence(changes, then, now, retyped, (len(old.files), len(new.files))),),
        refusals=_refusals(quantized),
    )


def count(side: Weights) -> int:
    """
    Count the tensors of some files.

    Raises:
        NotToldError, RetryLaterError: See `compare`.
    """
    if len(side.files) > MAX_FILES:
        raise NotToldError(f"{len(side.files):,} files are more than are looked at")
    return len(_tensors(side, _Budget()))


class _Budget:
    """How many bytes of headers were fetched, and whether there may be more."""

    def __init__(self) -> None:
        self.spent_bytes = 0

    def limit_bytes(self) -> int:
        """Return what the next header may have."""
        left = MAX_BYTES - self.spent_bytes
        if left < safetensors_header.GUESS_BYTES:
            raise NotToldError(f"the headers have more than {MAX_BYTES:,} bytes")
        return min(MAX_HEADER_BYTES, left)


def _tensors(side: Weights, budget: _Budget) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in side.files:
        limit_bytes = budget.limit_bytes()
        try:
            tensors, spent_bytes = safetensors_header.read_ranges(
                partial(_part, side, file),
                name=file.name,
                size_bytes=file.size_bytes,
                limit_bytes=limit_bytes,
            )
        except UpstreamError as error:
            if type(error) is RangeError:
                raise NotToldError(wording.clause(error.message)) from error
            if type(error) is UpstreamError:
                raise NotWeightsError(wording.clause(error.message)) from error
            raise
        budget.spent_bytes += spent_bytes
        for tensor in tensors:
            if tensor.name in found:
                raise NotWeightsError(f"tensor {shown(tensor.name, 100)} is in two files")
            found[tensor.name] = tensor
    return found


def _part(side: Weights, file: RemoteFile, start: int, end: int) -> bytes:
    try:
        return side.read_range(file, start, end)
    except UpstreamError as error:
        if type(error) is UpstreamError:
            raise RangeError(error.message) from error
        raise


def _kind(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _retyping(then: Tensor, now: Tensor) -> str:
    """Say `NAME: OLD -> NEW` of one tensor: of its dtype, its shape, or both."""
    parts = []
    if then.dtype != now.dtype:
        parts.append(f"{then.dtype} -> {now.dtype}")
    if then.shape != now.shape:
        parts.append(f"{_shape(then)} -> {_shape(now)}")
    told = ", ".join(parts)[: _WORD // 2]
    return f"{shown(now.name, _WORD - len(told) - 2)}: {told}"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(length) for length in tensor.shape[:6]) or "scalar"


def _sentence(
    changes: TensorChanges,
    then: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    retyped: Sequence[str],
    files: tuple[int, int],
) -> str:
    old_files, new_files = files
    clauses = []
    for count, names, what in (
        (changes.added_count, changes.added, "new"),
        (changes.removed_count, changes.removed, "gone"),
    ):
        if count:
            more = ", …" if count > 2 else ""  # noqa: PLR2004 - two are named
            clauses.append(
                f"{wording.counted(count, 'tensor')} {what} ({', '.join(names[:2])}{more})"
            )
    clauses += _retypings(then, now, retyped)
    if changes.touched_count:
        clauses.append(
            f"{wording.counted(changes.touched_count, 'tensor')} of the same name, type and shape, "
            "whose values may differ"
        )
    if changes.same_count:
        clauses.append(
            f"{wording.counted(changes.same_count, 'tensor')} in files that are the same"
        )
    sharding = ""
    if old_files != new_files and old_files and new_files:
        sharding = f"{wording.counted(old_files, 'file')} became {new_files:,}: "
    return f"Weights: {sharding}{several(clauses) or 'there is no tensor in them'}."


def _retypings(
    then: Mapping[str, Tensor], now: Mapping[str, Tensor], retyped: Sequence[str]
) -> list[str]:
    """Sum up what would be a wall: `290 tensors BF16 -> F16`, `lm_head.weight: ...`."""
    by_dtype: dict[str, int] = {}
    reshaped = [name for name in retyped if then[name].shape != now[name].shape]
    for name in retyped:
        if then[name].dtype != now[name].dtype:
            told = f"{then[name].dtype} -> {now[name].dtype}"
            by_dtype[told] = by_dtype.get(told, 0) + 1
    clauses = [f"{wording.counted(count, 'tensor')} {told}" for told, count in by_dtype.items()]
    if reshaped:
        first = reshaped[0]
        more = f" and {len(reshaped) - 1:,} more" if len(reshaped) > 1 else ""
        clauses.append(f"another shape: {_retyping(then[first], now[first])}{more}")
    return clauses


def _refusals(quantized: Sequence[Tensor]) -> tuple[str, ...]:
    if not quantized:
        return ()
    dtypes = ", ".join(sorted({each.dtype for each in quantized}))
    example = shown(quantized[0].name, 80)
    return (f"the weights are stored in {dtypes} ({example}), not in F32, F16 or BF16",)
