"""
Which measurements may be believed, and which of those may be compared.

A quant is `Trusted` or `Doubted`; there is nothing between. Doubt falls on a record that is
missing, of another file than the one that was built, not finite, outside what its unit allows,
INVALID by its own account, or measured under other conditions than the rest. "The rest" is a
strict majority: where two halves disagree, nobody can say which one is wrong, and both are doubted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipelines.console import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pipelines.params import ChooseSlice
    from pipelines.records import BenchmarkRecord, QuantizeRecord, Speed

MIB = 1 << 20
REASON_CHARACTERS = 300
# llama-perplexity prints six decimals of a mean over 16-bit logits: for two equal models it may
# print a hair below zero, which the divergence itself cannot be.
_LEAST_KLD_NATS = -1e-3
# The printed error takes tokens of one chunk as independent (the true one is about twice as large),
# yet all quants are scored on the same tokens, so that their differences vary less. Two printed
# errors are the compromise.
_KLD_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A value and the interval in which it lies with about 95 %."""

    value: float
    low: float
    high: float


def exactly(value: float) -> Measured:
    """Return a value that has no noise, such as a size."""
    return Measured(value=value, low=value, high=value)


@dataclass(frozen=True)
class Doubted:
    """A declared quant of which nothing may be concluded, and why."""

    key: str
    type: str
    reason: str


@dataclass(frozen=True)
class Trusted:
    """A declared quant with records that belong together."""

    key: str
    type: str
    quantized: QuantizeRecord
    benchmark: BenchmarkRecord

    @cached_property
    def deepest_decode(self) -> Speed:
        """The decode test with most tokens in the context: the one that users feel."""
        return _deepest_decode(self.benchmark)

    @cached_property
    def decode_tok_s(self) -> Measured:
        """Tokens generated in a second at the deepest measured depth."""
        test = self.deepest_decode
        return Measured(value=test.median_tok_s, low=test.low_tok_s, high=test.high_tok_s)

    @cached_property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens read in a second at depth 0, if that was measured."""
        tests = self.benchmark.speed
        return next(
            (t.median_tok_s for t in tests if t.test == "prefill" and t.depth_tokens == 0), None
        )

    @cached_property
    def kld_mean_nats(self) -> Measured:
        """Mean KL divergence from the model's own f16."""
        quality = self.benchmark.quality
        value = max(quality.kld_mean_nats, 0.0)
        spread = _KLD_ERRORS * quality.kld_mean_error_nats
        return Measured(value=value, low=max(value - spread, 0.0), high=value + spread)

    @cached_property
    def size_mib(self) -> Measured:
        """Size of the file."""
        return exactly(self.quantized.gguf.size_bytes / MIB)

    @cached_property
    def memory_mib(self) -> Measured:
        """Memory at the declared context: the worse of what was predicted and what was seen."""
        memory = self.benchmark.memory
        return exactly(max(memory.estimate_mib, memory.measured_mib))


Evidence = Trusted | Doubted


def examine(
    slice_: ChooseSlice,
    quantized: Mapping[str, QuantizeRecord | str],
    measured: Mapping[str, BenchmarkRecord | str],
) -> tuple[Evidence, ...]:
    """
    Sort the declared quants into trusted and doubted ones, in the order of the declaration.

    Args:
        slice_: Names the quants; records of others are not looked at.
        quantized: Record of each key, or why there is none.
        measured: Record of each key, or why there is none.
    """
    alone = tuple(
        _examine_one(slice_, key, quantized.get(key, "absent"), measured.get(key, "absent"))
        for key in slice_.quants
    )
    return _doubt_the_odd_ones(alone)


# --- one quant by itself ----------------------------------------------------------------------


def _examine_one(
    slice_: ChooseSlice, key: str, quantized: QuantizeRecord | str, measured: BenchmarkRecord | str
) -> Evidence:
    type_ = slice_.quants[key]
    if isinstance(quantized, str):
        return Doubted(key, type_, f"not built: {clean(quantized)[:REASON_CHARACTERS]}")
    if isinstance(measured, str):
        return Doubted(key, type_, f"not measured: {clean(measured)[:REASON_CHARACTERS]}")
    named = (slice_.model, key, type_)
    for doubt in (
        _other_subject(named, quantized, measured),
        _not_finite(quantized.model_dump(warnings=False), "quantize")
        or _not_finite(measured.model_dump(warnings=False), ""),
        _declared_invalid(measured),
        _impossible(measured),
        _other_context(slice_, measured),
    ):
        if doubt:
            return Doubted(key, type_, doubt)
    return Trusted(key, type_, quantized, measured)


def _other_subject(
    named: tuple[str, str, str], quantized: QuantizeRecord, measured: BenchmarkRecord
) -> str:
    """Say in what the two records do not speak of one file, if so."""
    pairs = (
        ("model", quantized.model, named[0], "the declaration"),
        ("key", quantized.key, named[1], "the declaration"),
        ("type", quantized.type, named[2], "the declaration"),
        ("model", measured.model, named[0], "the declaration"),
        ("key", measured.key, named[1], "the declaration"),
        ("type", measured.type, named[2], "the declaration"),
        ("sha256", measured.gguf_sha256, quantized.gguf.sha256, "the file that was built"),
        ("size", measured.size_bytes, quantized.gguf.size_bytes, "the file that was built"),
        ("f16 sha256", measured.f16_sha256, quantized.f16_sha256, "the file that was built"),
        (
            "llama.cpp commit",
            measured.llama_cpp_commit,
            quantized.llama_cpp_commit,
            "the file that was built",
        ),
    )
    for what, found, wanted, whose in pairs:
        if found != wanted:
            seen, due = _short(found), _short(wanted)
            return f"the records are of something else: {what} {seen}, not {due} as in {whose}"
    return ""


def _short(value: object) -> str:
    return clean(str(value))[:12]


def _not_finite(value: object, where: str) -> str:
    """Name the first number in a record that is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} is not a finite number"
    if isinstance(value, dict):
        inside: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    else:
        return ""
    return next(
        (found for k, v in inside if (found := _not_finite(v, f"{where}.{k}".lstrip(".")))), ""
    )


def _declared_invalid(measured: BenchmarkRecord) -> str:
    if measured.validity.verdict == "VALID":
        return ""
    reasons = "; ".join(clean(reason) for reason in measured.validity.reasons)[:REASON_CHARACTERS]
    return f"the measurement is INVALID: {reasons or 'no reason is given'}"


def _impossible(measured: BenchmarkRecord) -> str:
    """Say which value its unit does not allow, if any: a sign of a wrong parse or of an edit."""
    quality, memory = measured.quality, measured.memory
    tests = [(test.test, test.depth_tokens) for test in measured.speed]
    claims = (
        ("decode speed is measured", any(name == "decode" for name, _ in tests)),
        ("each test is there once", len(tests) == len(set(tests))),
        (
            "speeds lie in their intervals above zero",
            all(0 < t.low_tok_s <= t.median_tok_s <= t.high_tok_s for t in measured.speed),
        ),
        ("the file has a size", measured.size_bytes > 0),
        ("memory is above zero", min(memory.estimate_mib, memory.measured_mib) > 0),
        ("tokens were scored", min(quality.scored_tokens, quality.chunks_count) > 0),
        ("the divergence is not below zero", quality.kld_mean_nats >= _LEAST_KLD_NATS),
        ("its error is not below zero", quality.kld_mean_error_nats >= 0),
        ("the share of equal top tokens lies in 0..1", 0 <= quality.same_top <= 1),
        ("the perplexity ratio is above zero", quality.ppl_ratio > 0),
    )
    return next(
        (
            f"the numbers are impossible: it does not hold that {claim}"
            for claim, holds in claims
            if not holds
        ),
        "",
    )


def _other_context(slice_: ChooseSlice, measured: BenchmarkRecord) -> str:
    found, wanted = measured.memory.context_tokens, slice_.context_tokens
    if found == wanted:
        return ""
    return f"its memory was measured at {found:,} tokens of context, {wanted:,} are declared"


def _deepest_decode(measured: BenchmarkRecord) -> Speed:
    tests = (test for test in measured.speed if test.test == "decode")
    return max(tests, key=lambda test: test.depth_tokens)


# --- one quant among the others ---------------------------------------------------------------

# What has to be equal for two measurements to be compared. Commit and f16 of a benchmark are those
# of its file (`_other_subject`), so that files of two builds are told apart here as well.
_CONDITIONS: tuple[tuple[str, Callable[[BenchmarkRecord], str | int]], ...] = (
    ("hardware", lambda record: record.machine.hw_id),
    ("backend", lambda record: record.machine.backend),
    ("llama.cpp commit", lambda record: record.llama_cpp_commit),
    ("f16 model", lambda record: record.f16_sha256),
    ("number of threads", lambda record: record.threads),
    ("decode depth", lambda record: _deepest_decode(record).depth_tokens),
    ("evaluation corpus", lambda record: record.quality.corpus_sha256),
    ("evaluation window", lambda record: record.quality.context_tokens),
    ("number of chunks", lambda record: record.quality.chunks_count),
)


def _doubt_the_odd_ones(evidence: Sequence[Evidence]) -> tuple[Evidence, ...]:
    """Doubt every record whose conditions are not those of the strict majority."""
    trusted = [one for one in evidence if isinstance(one, Trusted)]
    odd: dict[str, str] = {}
    for what, read in _CONDITIONS:
        found = {one.key: read(one.benchmark) for one in trusted}
        common = _majority(found.values())
        for key, value in found.items():
            if value != common and key not in odd:
                odd[key] = _say_odd(what, value, common)
    return tuple(Doubted(one.key, one.type, odd[one.key]) if one.key in odd else one
                 for one in evidence)  # fmt: skip


def _majority(values: Iterable[str | int]) -> str | int | None:
    """Return the value of more than half, if there is one."""
    counts = Counter(values)
    if not counts:
        return None
    value, count = counts.most_common(1)[0]
    return value if 2 * count > counts.total() else None


def _say_odd(what: str, value: str | int, common: str | int | None) -> str:
    if common is None:
        return f"the records disagree about the {what}: measure all quants again, together"
    return f"measured under another {what} ({_short(value)}) than the others ({_short(common)})"
