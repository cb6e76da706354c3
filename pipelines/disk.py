"""
Room on the disk, asked for before the first byte is written.

A GGUF fleet fills disks: source, 16-bit copy and every quant lie side by side. A tool that runs
out of room half-way leaves a torn file and an unreadable message, so the sum is made first, from
the declaration, and each stage asks again for its own part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines import dvc_state, records
from pipelines.errors import FleetError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import Declaration, Model, Quant

GIB: Final = 2**30
# For records, logs, DVC's databases and what is estimated too low.
RESERVE: Final = 0.05

# Upper bounds in bits for each weight of a whole file, metadata and mixtures included, from
# llama-quantize's own table (tools/quantize/quantize.cpp, sizes of Llama-3-8B) rounded up. They
# decide nothing but whether there is room: what a quant really takes is measured.
_BITS_PER_WEIGHT: Final = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.6, "Q6_K": 6.7,
    "Q5_K_M": 5.8, "Q5_K_S": 5.7, "Q5_1": 6.1, "Q5_0": 5.7,
    "Q4_K_M": 5.0, "Q4_K_S": 4.8, "Q4_1": 5.2, "Q4_0": 4.8, "IQ4_NL": 4.8, "IQ4_XS": 4.6,
    "MXFP4_MOE": 4.8, "Q3_K_L": 4.5, "Q3_K_M": 4.2, "Q3_K_S": 3.8,
    "IQ3_M": 3.9, "IQ3_S": 3.8, "IQ3_XS": 3.6, "IQ3_XXS": 3.4,
    "Q2_K": 3.4, "Q2_K_S": 3.2, "IQ2_M": 3.1, "IQ2_S": 2.9, "IQ2_XS": 2.7, "IQ2_XXS": 2.5,
    "IQ1_M": 2.3, "IQ1_S": 2.1, "TQ1_0": 2.2, "TQ2_0": 2.6, "Q2_0": 3.0, "Q1_0": 1.9,
}  # fmt: skip
_SMALL_PARAMETERS_COUNT: Final = 1_500_000_000
_SMALL_EXTRA_BITS: Final = 2.2


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is known of a model before it is fetched."""

    source_bytes: int
    parameters_count: int
    # None if it cannot be known yet.
    vocabulary_tokens: int | None = None
    # Of the source, what is here of an earlier fetch and need not be written again.
    here_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes that a declaration still has to write, by what they are."""

    source_bytes: int = 0
    # Of them, what lies in work already.
    here_bytes: int = 0
    f16_bytes: int = 0
    quants_bytes: int = 0
    # Scratch of the benchmark; DVC never sees it.
    logits_bytes: int = 0

    @property
    def cached_bytes(self) -> int:
        """What DVC will keep of it, with the reserve."""
        return int((self.source_bytes + self.f16_bytes + self.quants_bytes) * (1 + RESERVE))

    @property
    def total_bytes(self) -> int:
        """All of it, with the reserve."""
        return self.cached_bytes + int((self.logits_bytes - self.here_bytes) * (1 + RESERVE))

    def __add__(self, other: Plan) -> Plan:
        """Join the plans of two models."""
        return Plan(
            source_bytes=self.source_bytes + other.source_bytes,
            here_bytes=self.here_bytes + other.here_bytes,
            f16_bytes=self.f16_bytes + other.f16_bytes,
            quants_bytes=self.quants_bytes + other.quants_bytes,
            logits_bytes=self.logits_bytes + other.logits_bytes,
        )

    def __str__(self) -> str:
        """Say the parts, for the message."""
        parts = ((self.source_bytes - self.here_bytes, "sources"), (self.f16_bytes, "16-bit GGUFs"),
                 (self.quants_bytes, "quants"),
                 (self.logits_bytes, "logits of the 16-bit models"))  # fmt: skip
        return ", ".join(f"{_gib(size)} {what}" for size, what in parts if size)


def require(path: Path, needed_bytes: int, what: str) -> None:
    """
    Refuse to begin what does not fit.

    Args:
        path: Where it will be written; the nearest directory that exists is asked.
        needed_bytes: How much will be written there.
        what: What needs it, as the subject of a sentence.

    Raises:
        MachineError: Less is free; says how much is needed, how much is free, and where.
    """
    place = existing(path)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise MachineError(
            f"the disk is too small: {what} needs {_gib(needed_bytes)}, and {_gib(free_bytes)} "
            f"are free in {place.resolve()}.",
            hint="Make room, or declare fewer quants. Nothing was written.",
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """
    Turn what the operating system refuses while `path` is read or written into words.

    Raises:
        MachineError: The disk is full, or an operation on a file failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise MachineError(
                f"the disk filled up while {path} was written.",
                hint="Make room and run the same command again; nothing half-written was kept.",
            ) from error
        what = error.filename or path
        raise MachineError(f"{what}: {error.strerror or error}.") from error


def f16_bytes(parameters_count: int) -> int:
    """
    Upper bound of the 16-bit GGUF of a model.

    Two bytes for each weight, 1 % for the norms, which stay in 32 bits, and 64 MiB for the
    tokenizer, the largest of which take about half of that.
    """
    return int(parameters_count * 2 * 1.01) + (64 << 20)


def quant_bytes(type_: str, parameters_count: int) -> int:
    """
    Upper bound of a quant of `type_`, in bytes.

    Embeddings, which keep more bits, weigh more in a small model, and its rows are more often no
    multiple of 256, so that they fall back to wider types: Qwen2.5-0.5B takes 5.5 bits as Q2_K.
    """
    bits = _BITS_PER_WEIGHT[type_]
    if parameters_count < _SMALL_PARAMETERS_COUNT:
        bits += _SMALL_EXTRA_BITS
    return int(parameters_count * bits / 8 * 1.05) + (32 << 20)


def plan_bytes(size: Size, types: tuple[str, ...], *, fetched: bool, converted: bool) -> Plan:
    """
    Sum what one model still has to write.

    Args:
        size: Its source in bytes and its number of weights.
        types: Types of the quants that are not there yet.
        fetched: The source is there already.
        converted: The 16-bit GGUF is there already.
    """
    return Plan(
        source_bytes=0 if fetched else size.source_bytes,
        here_bytes=0 if fetched else min(size.here_bytes, size.source_bytes),
        f16_bytes=0 if converted else f16_bytes(size.parameters_count),
        quants_bytes=sum(quant_bytes(type_, size.parameters_count) for type_ in types),
    )


def check_disk(declared: Declaration, at: Layout) -> Plan:
    """
    Hold everything that is declared and not there yet against the free disk, before it begins.

    Sizes come from the fetch record, from the directory of a `path:` source, or from one question
    to the Hub. If the Hub cannot be asked, that model is left out here, and fetch itself asks
    before its first byte. A cache of DVC's on another file system holds a copy of everything but
    the logits, so it needs the same room.

    Raises:
        MachineError: Too little is free; nothing was written.
    """
    plan = Plan()
    for name, model in declared.models.items():
        size = _size_of(name, model, at)
        if size is not None:
            plan += _plan_of(name, model, declared, at, size)
    if not plan.total_bytes:
        return plan
    what = f"the fleet ({plan})"
    require(at.root / "work", plan.total_bytes, what)
    cache = dvc_state.cache_dir(at.root)
    if _device(cache) != _device(at.root / "work"):
        require(cache, plan.cached_bytes, f"{what} in DVC's cache")
    return plan


def _plan_of(name: str, model: Model, declared: Declaration, at: Layout, size: Size) -> Plan:
    """Sum what one declared model still has to write, by the records of what there is."""
    recipe = declared.toolchain.recipe
    fetched = _record(at.model_record("fetch", name), records.FetchRecord)
    fetched_here = (
        fetched is not None
        and fetched.source == model.source
        and fetched.revision == model.revision
        and at.source(name).is_dir()
    )
    converted = _record(at.model_record("convert", name), records.ConvertRecord)
    converted_here = (
        fetched_here
        and converted is not None
        and converted.revision == model.revision
        and converted.recipe == recipe
        and at.f16(name).exists()
    )
    missing = tuple(
        quant.type
        for key, quant in declared.quants.items()
        if quant.model == name and not (converted_here and _quantized_here(key, quant, at, recipe))
    )
    plan = plan_bytes(size, missing, fetched=fetched_here, converted=converted_here)
    return replace(plan, logits_bytes=_logits_bytes(name, declared, at, size))


def _logits_bytes(name: str, declared: Declaration, at: Layout, size: Size) -> int:
    """
    Bytes of scratch that the benchmarks of a model still have to write: the f16's logits, once.

    They are one file for all quants of a model and stay until a run has ended well. A vocabulary
    that cannot be known yet is left to the benchmark, which asks for its room itself.
    """
    from pipelines import llama_perplexity  # noqa: PLC0415 - not for the stages that ask us

    quants = [quant for quant in declared.quants.values() if quant.model == name]
    if size.vocabulary_tokens is None or all(_measured_here(quant, at) for quant in quants):
        return 0
    if _is_encoder(at.f16(name)):
        return 0  # which has embeddings instead
    quality = declared.benchmark.quality
    needed_bytes = llama_perplexity.base_size_bytes(
        llama_perplexity.BaseHeader(
            context_tokens=quality.context_tokens,
            vocabulary_tokens=size.vocabulary_tokens,
            chunks=quality.chunks,
        )
    )
    there = at.scratch(name).glob("logits-*.kld")
    return 0 if any(path.stat().st_size == needed_bytes for path in there) else needed_bytes


def _is_encoder(f16: Path) -> bool:
    """Tell whether a model that was converted here makes embeddings; before, nobody knows."""
    from pipelines import architectures, gguf_header  # noqa: PLC0415 - as above

    with contextlib.suppress(gguf_header.GgufError):
        return architectures.is_encoder(gguf_header.read(f16))
    return False


def _measured_here(quant: Quant, at: Layout) -> bool:
    """Tell whether a quant has a measurement of its present file that nobody has to repeat."""
    made = _record(at.quant_record("quantize", quant.model, quant.type), records.QuantizeRecord)
    found = _record(at.quant_record("benchmark", quant.model, quant.type), records.BenchmarkRecord)
    return (
        made is not None
        and found is not None
        and found.gguf_sha256 == made.gguf.sha256
        and found.validity.verdict == "VALID"
    )


def _quantized_here(key: str, quant: Quant, at: Layout, recipe: int) -> bool:
    record = _record(
        at.quant_record("quantize", quant.model, quant.type), records.QuantizeRecord
    )  # fmt: skip
    return record is not None and record.recipe == recipe and at.gguf(quant.model, key).exists()


def _size_of(name: str, model: Model, at: Layout) -> Size | None:
    """Find out how large a model is; None if that cannot be known now."""
    from pipelines import fetch, fetch_downloads  # noqa: PLC0415 - they ask this module, too

    known = _record(at.model_record("fetch", name), records.FetchRecord)
    if known is not None and (known.source, known.revision) == (model.source, model.revision):
        return Size(
            source_bytes=known.size_bytes,
            parameters_count=known.parameters_count,
            vocabulary_tokens=fetch.vocabulary_tokens(
                at.source(name)
                if at.source(name).is_dir() or not model.source.startswith("path:")
                else at.root / model.source.removeprefix("path:")
            ),
            here_bytes=fetch_downloads.here_bytes(at, name, model.source, model.revision),
        )
    try:
        return fetch.size_of(model.source, model.revision, at)
    except FleetError:
        return None  # fetch will say what is wrong with it, in its own words.


def _record(path: Path, kind: type[records.R]) -> records.R | None:
    """Read a record if there is a good one."""
    try:
        return records.read(path, kind)
    except records.RecordError:
        return None


def _device(path: Path) -> int:
    return existing(path).stat().st_dev


def existing(path: Path) -> Path:
    """Return the nearest ancestor that exists."""
    path = path if os.path.lexists(path) else path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _gib(size_bytes: int) -> str:
    """Render bytes so that small and large needs both read well."""
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:,.1f} GiB"
    return f"{size_bytes / 2**20:,.1f} MiB"
