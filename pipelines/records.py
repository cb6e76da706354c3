"""
What each stage leaves behind: one immutable type for each record, with its schema version.

A record of a stage whose result is decided by its inputs (fetch, convert, calibrate, quantize)
holds nothing else: no time, no duration, no host. Equal inputs give equal bytes, in git too.
Paths in a record are names below their directory, never absolute.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_serializer,
)

from pipelines import absent, atomic, console, migrations
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import SerializerFunctionWrapHandler

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a record: closed, frozen, finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Record(Part):
    """What all records share."""

    schema_version: Literal[1] = 1


class FileDigest(Part):
    """A file by name, size in bytes, and both digests."""

    name: str
    size_bytes: int
    sha256: str
    md5: str


class FetchRecord(Record):
    """
    The verified bytes of one upstream revision.

    `gated` is how the Hub guards the files of a model that not everybody may have; None, and then
    not written, where everybody may.
    """

    stage: Literal["fetch"] = "fetch"
    model: str
    source: str
    revision: str
    architecture: str
    license: str | None
    parameters_count: int
    dtypes: dict[str, int]
    size_bytes: int
    files: tuple[FileDigest, ...]
    gated: Literal["auto", "manual"] | None = Field(None, exclude_if=absent.is_none)


class ConvertRecord(Record):
    """The 16-bit GGUF made from them."""

    stage: Literal["convert"] = "convert"
    model: str
    revision: str
    architecture: str
    llama_cpp_commit: str
    recipe: int
    tensors_count: int
    tensor_types: dict[str, int]
    context_train_tokens: int
    gguf: FileDigest


class CalibrateRecord(Record):
    """The importance matrix, or the statement that none is declared."""

    stage: Literal["calibrate"] = "calibrate"
    model: str
    f16_sha256: str
    llama_cpp_commit: str
    recipe: int
    corpus: str | None
    corpus_sha256: str | None
    context_tokens: int
    chunks_count: int
    entries_count: int
    # Entries of which some experts never saw a token: those are quantized without an imatrix.
    partial_entries_count: int = 0
    # Inputs whose squares sum to zero, over all entries, and the first entries with holes.
    zero_columns_count: int = 0
    holes: tuple[str, ...] = ()
    imatrix: FileDigest | None

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out holes that are not there: records of before stay as they are."""
        fields: dict[str, Any] = handler(self)
        if not self.holes:
            del fields["zero_columns_count"], fields["holes"]
        return fields


class Fallback(Part):
    """A tensor that could not get the type of its recipe."""

    tensor: str
    wanted: str
    got: str


class RuleHits(Part):
    """A declared tensor rule and the number of tensors that it decided."""

    match: str
    type: str
    tensors_count: int


class QuantValues(Part):
    """
    Rows of a quant that were read back and compared with the 16-bit model.

    `worst_error` is the largest share, of all tensors, that the error of the sampled rows has of
    the rows themselves (root mean squares), `worst_tensor` where that is, `worst_limit` what is
    allowed there. Rounded to three digits: the last ones differ from one CPU to the next.
    `unreadable` are tensors of a type that gguf-py cannot read, `tiny_rows_count` rows of numbers
    so small that their scale has no digits: those are not judged.
    """

    tensors_count: int
    rows_count: int
    worst_tensor: str
    worst_error: Finite
    worst_limit: Finite
    tiny_rows_count: int = 0
    unreadable: tuple[str, ...] = ()


class QuantizeRecord(Record):
    """
    One quantized GGUF and what is really in it.

    `values` is None in records that were written before rows were read back, and then not written.
    """

    stage: Literal["quantize"] = "quantize"
    key: str
    model: str
    type: str
    f16_sha256: str
    llama_cpp_commit: str
    recipe: int
    imatrix_sha256: str | None
    imatrix_corpus_sha256: str | None
    bits_per_weight: Finite
    tensors_count: int
    tensor_types: dict[str, int]
    tensor_bytes: dict[str, int]
    rules: tuple[RuleHits, ...]
    fallbacks: tuple[Fallback, ...]
    gguf: FileDigest
    values: QuantValues | None = Field(None, exclude_if=absent.is_none)


class Speed(Part):
    """
    Throughput of one test in tokens a second: median and its interval over `samples`.

    The interval covers the median with 95 % or more from six samples on; of fewer it is their whole
    range, which covers 94 % of five and 75 % of three (`pipelines.stats.median_interval`).
    """

    test: Literal["prefill", "decode"]
    depth_tokens: int
    tokens: int
    median_tok_s: Finite
    low_tok_s: Finite
    high_tok_s: Finite
    samples_tok_s: tuple[Finite, ...]
    dropped_tok_s: tuple[Finite, ...]


class QualityResult(Part):
    """Divergence from the model's own f16 over the scored tokens of a corpus."""

    corpus_sha256: str
    context_tokens: int
    chunks_count: int
    scored_tokens: int
    kld_mean_nats: Finite
    kld_mean_error_nats: Finite
    kld_p999_nats: Finite
    kld_max_nats: Finite
    same_top: Finite
    same_top_error: Finite
    ppl: Finite
    ppl_f16: Finite
    ppl_ratio: Finite
    ppl_ratio_error: Finite


class EmbeddingQuality(Part):
    """
    What quantizing does to the embeddings of an encoder, beside those of its own f16.

    `cosine_*` are over the texts, one cosine for each; `cosine_p01` is the 1st percentile, nearest
    rank. `same_nearest` is the share of texts whose nearest other one, by cosine, is the same as
    with f16: what a search over them would find first. Texts are cut from the evaluation corpus,
    of `context_tokens` at most; `scored_tokens` is their sum.
    """

    kind: Literal["embeddings"] = "embeddings"
    corpus_sha256: str
    context_tokens: int
    texts_count: int
    scored_tokens: int
    dimensions: int
    cosine_mean: Finite
    cosine_mean_error: Finite
    cosine_p01: Finite
    cosine_min: Finite
    same_nearest: Finite


def _quality_kind(value: object) -> str:
    """Tell one from the other; a divergence names no kind, as it was the only one at first."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "embeddings" if kind == "embeddings" else "logits"


AnyQuality = Annotated[
    Annotated[QualityResult, Tag("logits")] | Annotated[EmbeddingQuality, Tag("embeddings")],
    Discriminator(_quality_kind),
]


class Memory(Part):
    """Memory at the declared context, in MiB."""

    context_tokens: int
    estimate_mib: Finite
    measured_mib: Finite
    method: Literal["nvml", "rss"]
    model_mib: Finite
    context_mib: Finite
    compute_mib: Finite


class MachineId(Part):
    """
    Where a number was measured.

    `hw_id` must be equal for two numbers to be compared; `env_id` should be. Both are digests of
    the facts beside them, so that no serial number and no host name is published.
    """

    hw_id: str
    env_id: str
    backend: str
    cpu: str
    cores_count: int
    memory_gib: int
    gpus: tuple[str, ...]


class Condition(Part):
    """
    One rule about the circumstances of a measurement: what was seen, and where its limit lies.

    The unit of both is the end of the rule's name; `limit` is where the outcome becomes `void`, or
    `note` of a rule that voids nothing. None where the rule has no number, or it could not be read.
    """

    rule: str
    outcome: Literal["ok", "note", "void", "unknown"]
    value: Finite | None
    limit: Finite | None


class Validity(Part):
    """
    Whether the measurement itself can be trusted, and why not.

    `conditions` holds each rule that was applied; empty in records of before there were any.
    """

    verdict: Literal["VALID", "INVALID"]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    load_before: Finite
    load_after: Finite
    steal_share: Finite
    gpu_info: str
    conditions: tuple[Condition, ...] = ()


class BenchmarkRecord(Record):
    """Everything measured of one quant on one machine."""

    stage: Literal["benchmark"] = "benchmark"
    key: str
    model: str
    type: str
    gguf_sha256: str
    f16_sha256: str
    size_bytes: int
    llama_cpp_commit: str
    machine: MachineId
    validity: Validity
    threads: int
    # As declared: first layers whose experts stayed in main memory; None, and not written, if none.
    cpu_moe_layers: int | Literal["all"] | None = Field(None, exclude_if=absent.is_none)
    speed: tuple[Speed, ...]
    quality: AnyQuality
    memory: Memory
    measured_at: str
    wall_s: Finite


class Candidate(Part):
    """
    The measured values of one quant that the choice looks at.

    None is what nobody may look at. A candidate that is INVALID only since its measurement was
    disturbed keeps the values that do not depend on that; it is never chosen.
    """

    key: str
    type: str
    gguf_sha256: str | None = None
    size_mib: Finite | None = None
    memory_mib: Finite | None = None
    decode_tok_s: Finite | None = None
    prefill_tok_s: Finite | None = None
    kld_mean_nats: Finite | None = None
    kld_p999_nats: Finite | None = None
    same_top: Finite | None = None
    ppl_ratio: Finite | None = None
    cosine_mean: Finite | None = Field(None, exclude_if=absent.is_none)
    bits_per_weight: Finite | None = None
    verdict: Literal["CHOSEN", "PASS", "REJECT", "INVALID"]
    on_frontier: bool
    sentence: str


class HostChoice(Part):
    """
    The best quant for one host, and one sentence for each other one.

    Quants are named by their type. `incumbent` is the winner that the last commit holds;
    `limit_mib` the memory of the host, of which `margin_mib` have to stay free.
    """

    host: str
    limit_mib: int | None
    margin_mib: int
    incumbent: str | None
    winner: str | None
    runner_up: str | None
    verdict: Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
    sentence: str
    binding: str
    candidates: tuple[Candidate, ...]


class ChoiceRecord(Record):
    """What was chosen, by which rule, for each host."""

    stage: Literal["choose"] = "choose"
    model: str
    objective: str
    context_tokens: int
    decode_depth_tokens: int | None
    hw_id: str | None
    gates: dict[str, Finite]
    notes: tuple[str, ...]
    hosts: tuple[HostChoice, ...]


class TrackedRun(Part):
    """
    A run that MLflow holds, by the key under which it is found again (its tag `fleet.run_key`).

    MLflow's own run id is drawn at random, so it is left out: equal records give an equal receipt
    in every checkout.
    """

    key: str
    run_key: str


class TrackReceipt(Record):
    """
    What the tracking server has been told; `pending` means that it could not be reached.

    `*_sha256` are the digests of the records that it speaks of. The report depends on receipts
    alone (DVC cannot list a file for each model), so they have to change whenever a choice, a load
    test, a release, a proof, evals or a comparison does. `missing` are the keys that there was
    nothing to tell of.
    """

    stage: Literal["track"] = "track"
    model: str
    status: Literal["tracked", "pending"]
    reason: str
    choice_sha256: str | None = None
    load_test_sha256: str | None = None
    publish_sha256: str | None = None
    verify_sha256: str | None = None
    evaluate_sha256: str | None = None
    compare_sha256: str | None = None
    runs: tuple[TrackedRun, ...]
    missing: tuple[str, ...] = ()


R = TypeVar("R", bound=Record)


class RecordError(FleetError):
    """A record is missing, unreadable or of another schema."""


def read(path: Path, kind: type[R]) -> R:
    """
    Read a record strictly.

    Raises:
        RecordError: It is missing, not JSON, or not of this type and version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist.", hint="fleet repro") from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        remake = "Remove it and run `fleet repro`."
        if (told := migrations.refusal(data)) is not None:
            advice = migrations.advice(data, remake)
            raise RecordError(f"{path} {told}.", hint=advice) from error
        first = error.errors(include_url=False)[0]
        # A place is spelt by the keys of the file, which a stranger may have written.
        where = console.clean(" ".join(".".join(_keys(first["loc"])).split()))
        place = f"{where[:100]}: " if where else ""
        raise RecordError(
            f"{path} is not a {kind.__name__} of this version: {place}{first['msg']}.",
            hint=remake,
        ) from error


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """Spell a place; which of the two kinds of quality it was taken for is no key of the file."""
    before = ("", *loc)
    return [
        str(part)
        for part, above in zip(loc, before, strict=False)
        if above != "quality" or part not in {"logits", "embeddings"}
    ]


def read_or_reason(path: Path, kind: type[R]) -> R | str:
    """Read a record, or say as a clause why there is none, without the folder it should be in."""
    try:
        return read(path, kind)
    except RecordError as error:
        return error.message.replace(str(path), path.name).rstrip(".")
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def write(path: Path, record: Record) -> None:
    """Write a record atomically; an equal one on disk is left as it is."""
    atomic.write_json(path, json.loads(record.model_dump_json()))
