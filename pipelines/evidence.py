"""
Which measurements may be believed, and which of those may be compared.

A quant is `Trusted` or `Doubted`; there is nothing between. Doubt falls on a record that is
missing, of another file than the one that was built, not finite, outside what its unit allows,
INVALID by its own account, or measured under other conditions than the rest. "The rest" is a
strict majority: where two halves disagree, nobody can say which one is wrong, and both are doubted.

A quant whose only fault is that its measurement calls itself INVALID never wins either, but what
the disturbance cannot have touched may still be shown: its size, its divergence (arithmetic comes
out the same however busy the machine is), and memory that was counted for its own process alone.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipelines import wording
from pipelines.console import clean
from pipelines.records import EmbeddingQuality, QualityResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pipelines.params import ChooseSlice, QuantType
    from pipelines.records import AnyQuality, BenchmarkRecord, QuantizeRecord, Speed

MIB = 1 << 20
REASON_CHARACTERS = 300
# llama-perplexity prints six decimals of a mean over 16-bit logits: for two equal models it may
# print a hair below zero, which the divergence itself cannot be.
_LEAST_KLD_NATS = -1e-3
# The printed error takes tokens of one chunk as independent (the true one is about twice as large),
# yet all quants are scored on the same tokens, so that their differences vary less. Two printed
# errors are the compromise. The error of a mean cosine is over texts, which do not follow from one
# another; twice it is about 95 %.
_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """
    A value and the interval in which it lies with about 95 %.

    Of a speed it is the interval of the median (`stats.median_interval`): of fewer than six
    samples their whole range, which covers 94 % of five and 75 % of three.
    """

    value: float
    low: float
    high: float
    unit: str = ""


def exactly(value: float) -> Measured:
    """Return a value that has no noise, such as a size."""
    return Measured(value=value, low=value, high=value)


@dataclass(frozen=True)
class Readings:
    """
    The values of a quant that decide something, read from its two records.

    A model that goes on with texts is known by its decode speed and its KL divergence, an encoder
    by its prefill speed and the cosine of its embeddings. `speed_tok_s` and `divergence` are
    whichever of them there is: 0 is no divergence at all, less is better, for both.
    """

    key: str
    type: str
    quantized: QuantizeRecord
    benchmark: BenchmarkRecord

    @property
    def logits(self) -> QualityResult | None:
        """Divergence of a model that goes on with texts."""
        return _logits(self.benchmark.quality)

    @property
    def embeddings(self) -> EmbeddingQuality | None:
        """Agreement of the embeddings of an encoder."""
        return _embeddings(self.benchmark.quality)

    @property
    def is_encoder(self) -> bool:
        """Whether it makes embeddings, and goes on with no text."""
        return self.embeddings is not None

    @cached_property
    def deepest_decode(self) -> Speed | None:
        """The decode test with most tokens in the context: the one that users feel."""
        return _deepest_decode(self.benchmark)

    @cached_property
    def decode_tok_s(self) -> Measured | None:
        """Tokens generated in a second at the deepest measured depth; an encoder has none."""
        return _throughput(self.deepest_decode) if self.deepest_decode else None

    @cached_property
    def prefill_tok_s(self) -> Measured | None:
        """Prompt tokens read in a second at depth 0, if that was measured."""
        tests = (t for t in self.benchmark.speed if t.test == "prefill" and t.depth_tokens == 0)
        return next(map(_throughput, tests), None)

    @cached_property
    def speed_tok_s(self) -> Measured:
        """The speed that users feel: decode at the deepest depth; of an encoder prefill."""
        found = self.prefill_tok_s if self.is_encoder else self.decode_tok_s
        assert found is not None, "nothing else is trusted"
        return found

    @cached_property
    def kld_mean_nats(self) -> Measured | None:
        """Mean KL divergence from the model's own f16."""
        quality = self.logits
        if quality is None:
            return None
        return _above_zero(quality.kld_mean_nats, quality.kld_mean_error_nats, "nats")

    @cached_property
    def divergence(self) -> Measured:
        """How far it is from its own f16: mean KL divergence; of an encoder 1 - mean cosine."""
        if self.embeddings is not None:
            mean, error = self.embeddings.cosine_mean, self.embeddings.cosine_mean_error
            return _above_zero(1 - mean, error, "below cosine 1")
        assert self.kld_mean_nats is not None
        return self.kld_mean_nats

    @cached_property
    def size_mib(self) -> Measured:
        """Size of the file."""
        return exactly(self.quantized.gguf.size_bytes / MIB)

    @cached_property
    def memory_mib(self) -> Measured:
        """Memory at the declared context: the worse of what was predicted and what was seen."""
        memory = self.benchmark.memory
        return exactly(max(memory.estimate_mib, memory.measured_mib))

    def numbers(self) -> dict[str, str | float | None]:
        """Return what a choice records of the quant, as the fields of a `Candidate`."""
        return self.steady_numbers() | {
            "memory_mib": self.memory_mib.value,
            "decode_tok_s": self.decode_tok_s.value if self.decode_tok_s else None,
            "prefill_tok_s": self.prefill_tok_s.value if self.prefill_tok_s else None,
        }

    def steady_numbers(self) -> dict[str, str | float | None]:
        """Return those of them that hold whatever else the machine did meanwhile."""
        logits, embeddings, memory = self.logits, self.embeddings, self.benchmark.memory
        return {
            "gguf_sha256": self.quantized.gguf.sha256,
            "size_mib": self.size_mib.value,
            # The resident memory of a process is its own; on a card others may be counted in.
            "memory_mib": self.memory_mib.value if memory.method == "rss" else None,
            "decode_tok_s": None,
            "prefill_tok_s": None,
            "kld_mean_nats": self.kld_mean_nats.value if self.kld_mean_nats else None,
            "kld_p999_nats": logits.kld_p999_nats if logits else None,
            "same_top": logits.same_top if logits else None,
            "ppl_ratio": logits.ppl_ratio if logits else None,
            "cosine_mean": embeddings.cosine_mean if embeddings else None,
            "bits_per_weight": self.quantized.bits_per_weight,
        }


def _logits(quality: AnyQuality) -> QualityResult | None:
    return quality if isinstance(quality, QualityResult) else None


def _embeddings(quality: AnyQuality) -> EmbeddingQuality | None:
    return quality if isinstance(quality, EmbeddingQuality) else None


def _above_zero(mean: float, error: float, unit: str) -> Measured:
    value, spread = max(mean, 0.0), _ERRORS * error
    return Measured(value=value, low=max(value - spread, 0.0), high=value + spread, unit=unit)


def _throughput(test: Speed) -> Measured:
    return Measured(value=test.median_tok_s, low=test.low_tok_s, high=test.high_tok_s)


class Trusted(Readings):
    """A declared quant with records that belong together."""


@dataclass(frozen=True)
class Doubted:
    """
    A declared quant of which nothing may be concluded, and why.

    Attributes:
        key: Its key.
        type: Its type.
        reason: Why, as a clause.
        steady: Its records if their only fault is that the measurement was disturbed.
    """

    key: str
    type: str
    reason: str
    steady: Readings | None = None


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
    type_: QuantType = slice_.quants[key]
    if isinstance(quantized, str):
        return Doubted(key, type_, f"not built: {_brief(quantized)}")
    if isinstance(measured, str):
        return Doubted(key, type_, f"not measured: {_brief(measured)}")
    foreign = (
        _other_subject((slice_.model, key, type_), quantized, measured)
        or _not_finite(quantized.model_dump(warnings=False), "quantize")
        or _not_finite(measured.model_dump(warnings=False), "")
    )
    if foreign:
        return Doubted(key, type_, foreign)
    disturbed = _declared_invalid(measured)
    wrong = _impossible(measured) or _other_context(slice_, measured)
    if disturbed:
        steady = None if wrong else Readings(key, type_, quantized, measured)
        return Doubted(key, type_, disturbed, steady)
    return Doubted(key, type_, wrong) if wrong else Trusted(key, type_, quantized, measured)


def _brief(text: str) -> str:
    return wording.shortened(clean(text), REASON_CHARACTERS)


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
    reasons = "; ".join(wording.clause(clean(reason)) for reason in measured.validity.reasons)
    why = f"since {_brief(reasons)}" if reasons else "and no reason is given"
    return f"the measurement is INVALID, {why}"


def _impossible(measured: BenchmarkRecord) -> str:
    """Say which value its unit does not allow, if any: a sign of a wrong parse or of an edit."""
    memory = measured.memory
    tests = [(test.test, test.depth_tokens) for test in measured.speed]
    claims = (
        ("each test is there once", len(tests) == len(set(tests))),
        (
            "speeds lie in their intervals above zero",
            all(0 < t.low_tok_s <= t.median_tok_s <= t.high_tok_s for t in measured.speed),
        ),
        ("the file has a size", measured.size_bytes > 0),
        ("memory is above zero", min(memory.estimate_mib, memory.measured_mib) > 0),
        *_quality_claims(measured.quality, tests),
    )
    return next(
        (
            f"the numbers are impossible: it does not hold that {claim}"
            for claim, holds in claims
            if not holds
        ),
        "",
    )


def _quality_claims(
    quality: AnyQuality, tests: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, bool]]:
    """Yield what has to hold of a divergence, or of embeddings, and of the speed beside it."""
    if isinstance(quality, EmbeddingQuality):
        yield "prefill speed is measured", ("prefill", 0) in tests
        yield "an encoder decodes nothing", all(name == "prefill" for name, _ in tests)
        yield "texts were embedded", min(quality.texts_count, quality.scored_tokens) > 0
        yield "embeddings have dimensions", quality.dimensions > 0
        yield (
            "cosines lie in -1..1, the least, the 1st percentile and the mean in this order",
            -1 <= quality.cosine_min <= quality.cosine_p01 <= 1
            and quality.cosine_min <= quality.cosine_mean <= 1,
        )
        yield "the error of the cosine is not below zero", quality.cosine_mean_error >= 0
        yield "the share of equal nearest texts lies in 0..1", 0 <= quality.same_nearest <= 1
        return
    yield "decode speed is measured", any(name == "decode" for name, _ in tests)
    yield "tokens were scored", min(quality.scored_tokens, quality.chunks_count) > 0
    yield "the divergence is not below zero", quality.kld_mean_nats >= _LEAST_KLD_NATS
    yield "its error is not below zero", quality.kld_mean_error_nats >= 0
    yield "the share of equal top tokens lies in 0..1", 0 <= quality.same_top <= 1
    yield "the perplexity ratio is above zero", quality.ppl_ratio > 0


def _other_context(slice_: ChooseSlice, measured: BenchmarkRecord) -> str:
    found, wanted = measured.memory.context_tokens, slice_.context_tokens
    if found == wanted:
        return ""
    return f"its memory was measured at {found:,} tokens of context, {wanted:,} are declared"


def _deepest_decode(measured: BenchmarkRecord) -> Speed | None:
    tests = (test for test in measured.speed if test.test == "decode")
    return max(tests, key=lambda test: test.depth_tokens, default=None)


def _depth(measured: BenchmarkRecord) -> int | str:
    deepest = _deepest_decode(measured)
    return deepest.depth_tokens if deepest else "none"


def _scored_parts(measured: BenchmarkRecord) -> int:
    quality = measured.quality
    return quality.texts_count if isinstance(quality, EmbeddingQuality) else quality.chunks_count


def _tests(measured: BenchmarkRecord) -> str:
    """Spell the speed tests: `decode 128@0, prefill 512@0`; shorter ones run faster."""
    return ", ".join(sorted(f"{t.test} {t.tokens}@{t.depth_tokens}" for t in measured.speed))


# --- one quant among the others ---------------------------------------------------------------

# What has to be equal for two measurements to be compared. Commit and f16 of a benchmark are those
# of its file (`_other_subject`), so that files of two builds are told apart here as well.
_CONDITIONS: tuple[tuple[str, Callable[[BenchmarkRecord], str | int]], ...] = (
    (
        "kind of quality",
        lambda record: "embeddings" if _embeddings(record.quality) else "divergence",
    ),
    ("hardware", lambda record: record.machine.hw_id),
    ("backend", lambda record: record.machine.backend),
    ("llama.cpp commit", lambda record: record.llama_cpp_commit),
    ("f16 model", lambda record: record.f16_sha256),
    ("number of threads", lambda record: record.threads),
    ("decode depth", _depth),
    ("set of speed tests", _tests),
    ("evaluation corpus", lambda record: record.quality.corpus_sha256),
    ("evaluation window", lambda record: record.quality.context_tokens),
    ("number of chunks", _scored_parts),
    ("way to count memory", lambda record: record.memory.method),
)


def differing(one: BenchmarkRecord, other: BenchmarkRecord) -> tuple[str, ...]:
    """Name the conditions that two measurements do not share: `hardware`, `llama.cpp commit`."""
    return tuple(what for what, read in _CONDITIONS if read(one) != read(other))


def _doubt_the_odd_ones(evidence: Sequence[Evidence]) -> tuple[Evidence, ...]:
    """
    Doubt every record whose conditions are not those of the strict majority.

    Disturbed measurements have no vote; measured otherwise than the majority, nothing of them is
    shown beside the others.
    """
    trusted = [one for one in evidence if isinstance(one, Trusted)]
    disturbed = [one.steady for one in evidence if isinstance(one, Doubted) and one.steady]
    odd: dict[str, str] = {}
    for what, read in _CONDITIONS:
        common = _majority(read(one.benchmark) for one in trusted or disturbed)
        for one in (*trusted, *disturbed):
            value = read(one.benchmark)
            if value != common and one.key not in odd:
                odd[one.key] = _say_odd(what, value, common)
    return tuple(_doubt(one, odd[one.key]) if one.key in odd else one for one in evidence)


def _doubt(one: Evidence, reason: str) -> Doubted:
    return Doubted(one.key, one.type, one.reason if isinstance(one, Doubted) else reason)


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
