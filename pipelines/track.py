"""
Track: MLflow shows one run for each measured quant; the records in results/ stay the truth.

A run is a projection of records. Its `run_key` is the digest of what it shows: model, quant, GGUF
and the bytes of the benchmark record. It is found again by that key, so telling twice makes nothing
twice, and a lost store is told everything again. What was decided about a quant, and what its load
test showed if it was chosen, is not in that key: the run follows when they change. MLflow forgets
no metric, so one that a newer load test does not have becomes NaN.

A store that cannot be reached never holds up the chain: after 10 s at most the receipt says
`pending`, with the reason, and the next `fleet repro` tries again. MLflow itself runs in a process
of its own, `pipelines.mlflow_runs`: it takes seconds to import, retries for a minute by default
and may hang; a process can be ended by its clock, a thread cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict

from pipelines import atomic, console, harm, proc, records, wording
from pipelines.compare_records import CompareRecord
from pipelines.errors import DigestError, FleetError, MachineError, StoreError, ToolError
from pipelines.evaluate_records import EvaluateRecord
from pipelines.load_records import LoadTestRecord, metrics_rows
from pipelines.records import (
    BenchmarkRecord,
    ChoiceRecord,
    EmbeddingQuality,
    FetchRecord,
    QuantizeRecord,
    RecordError,
    TrackedRun,
    TrackReceipt,
)
from pipelines.verdict_rules import outcome_of
from pipelines.verify_records import VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.layout import Layout
    from pipelines.params import TrackSlice
    from pipelines.records import AnyQuality

RUN_KEY_TAG = "fleet.run_key"
# Changes with everything that a run says of a load test; MLflow groups metrics by the prefix.
LOAD_TEST_TAG = "fleet.load_test_sha256"
LOAD_TEST_PREFIX = "load-test/"
_NO_LOAD_TEST = "none"
# MLflow refuses a tag of more than 5,000 bytes (mlflow/utils/validation.py).
_TAG_CHARACTERS = 1000
# A database is on this machine or near it; creating its tables takes 2 s, 10 s on a busy machine.
_TABLES_WITHIN_S = 120
# What a server may take for one run (ten requests). With the start of Python and the import of
# mlflow it makes the 10 s.
_ANSWER_WITHIN_S = 7
_CREDENTIALS = re.compile(r"//[^/@\s]*@")
SQLITE = "sqlite:///"


class RunSpec(BaseModel):
    """One run as it has to be, whatever the store holds now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_key: str
    key: str
    started_ms: int
    ended_ms: int
    params: dict[str, str]
    metrics: dict[str, float]
    # Those of the load test: they change while the run stays.
    load_metrics: dict[str, float]
    tags: dict[str, str]
    # Name below the run's artifacts: file of ours.
    artifacts: dict[str, str]


class Task(BaseModel):
    """What `pipelines.mlflow_runs` is asked to do; the URI comes by its environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    artifacts: str | None
    answer_within_s: int
    runs: tuple[RunSpec, ...]


def run(slice_: TrackSlice, at: Layout) -> TrackReceipt:
    """
    Tell the store about every declared quant of a model that has its records.

    A quant without them is named and left out: a report of the others is worth more than none.

    Args:
        slice_: Model, quants, tracking URI and experiment.
        at: The checkout.

    Returns:
        The receipt: the runs that the store holds now; `pending`, with the reason, if it could not
        be told all of them.

    Raises:
        RecordError: A record of the model itself is missing or unreadable.
        DigestError: A benchmark is of another GGUF than the one that was quantized.
    """
    if slice_.quants:
        records.read(at.model_record("fetch", slice_.model), FetchRecord)
        records.read(at.model_record("choose", slice_.model), ChoiceRecord)
    if at.model_record("load-test", slice_.model).exists():
        records.read(at.model_record("load-test", slice_.model), LoadTestRecord)
    return _tell(slice_, *_specs(slice_, at, RecordError), at)


def rebuild(slice_: TrackSlice, at: Layout) -> TrackReceipt:
    """
    Tell a new or lost store everything that results/ holds of a model.

    Quants without records are left out, with a warning.

    Raises:
        StoreError: The store cannot be told; somebody asked for it, so it is no mere warning.
    """
    receipt = _tell(slice_, *_specs(slice_, at, RecordError, DigestError), at)
    if receipt.status == "pending":
        raise StoreError(f"{slice_.model} was not tracked: {receipt.reason}")
    return receipt


def withdraw_pending(at: Layout) -> list[str]:
    """
    Remove receipts that say `pending` or nothing readable, so that DVC runs their stage again.

    Returns:
        The models whose receipt was removed.
    """
    removed = []
    for path in sorted((at.root / "work/track").glob("*.json")):
        try:
            settled = records.read(path, TrackReceipt).status == "tracked"
        except RecordError:
            settled = False
        if not settled:
            atomic.remove(path)
            removed.append(path.stem)
    return removed


# --- from records to runs ---------------------------------------------------------------------


def _specs(
    slice_: TrackSlice, at: Layout, *left_out: type[FleetError]
) -> tuple[tuple[RunSpec, ...], tuple[str, ...]]:
    """Compose the runs of the quants; return the keys of those with such an error beside them."""
    specs, missing = [], []
    for key, type_ in slice_.quants.items():
        try:
            specs.append(_spec(slice_.model, key, type_, at))
        except left_out as error:
            console.warn(f"{key} is not tracked: {error.message}")
            missing.append(key)
    return tuple(specs), tuple(missing)


def _spec(model: str, key: str, type_: str, at: Layout) -> RunSpec:
    """
    Compose the run of one quant.

    Raises:
        RecordError: A record is missing or unreadable.
        DigestError: The records are of different GGUFs.
    """
    paths = {
        "quantize": at.quant_record("quantize", model, type_),
        "benchmark": at.quant_record("benchmark", model, type_),
        "choice": at.model_record("choose", model),
    }
    load_test = at.model_record("load-test", model)
    tested = records.read(load_test, LoadTestRecord) if load_test.exists() else None
    if tested is not None:
        paths["load-test"] = load_test
    fetched = records.read(at.model_record("fetch", model), FetchRecord)
    quantized = records.read(paths["quantize"], QuantizeRecord)
    measured = records.read(paths["benchmark"], BenchmarkRecord)
    choice = records.read(paths["choice"], ChoiceRecord)
    if measured.gguf_sha256 != quantized.gguf.sha256:
        raise DigestError(
            f"{paths['benchmark']} measured {measured.gguf_sha256[:12]}, but {key} is "
            f"{quantized.gguf.sha256[:12]}.",
            hint=f"fleet repro {key}",
        )
    run_key = run_key_of(model, key, quantized.gguf.sha256, paths["benchmark"].read_bytes())
    started = _time_of(measured.measured_at)
    return RunSpec(
        run_key=run_key,
        key=key,
        started_ms=_ms(started),
        ended_ms=_ms(started + timedelta(seconds=measured.wall_s)),
        params=_params(quantized, measured),
        metrics=_metrics(quantized, measured),
        load_metrics=_load_metrics(quantized, tested),
        tags={
            **_tags(fetched, quantized, measured),
            **_verdict(key, choice),
            **_load_tags(quantized, tested),
            **_proof_tags(model, quantized, at),
            "fleet.choice_sha256": hashlib.sha256(paths["choice"].read_bytes()).hexdigest(),
            # Last: a run without it is told the whole load test again.
            LOAD_TEST_TAG: _sha256(load_test) or _NO_LOAD_TEST,
        },
        artifacts={f"records/{name}.json": str(path) for name, path in paths.items()},
    )


def _proof_tags(model: str, quantized: QuantizeRecord, at: Layout) -> dict[str, str]:
    """
    Say what came of the proof of the conversion, of the task evals and of the comparison.

    `none` of a record that is not there, cannot be read or speaks of another file: the same tags
    for all, so that old ones go.
    """
    verified = records.read_or_reason(at.model_record("verify", model), VerifyRecord)
    evaluated = records.read_or_reason(at.model_record("evaluate", model), EvaluateRecord)
    compared = records.read_or_reason(at.comparison(model), CompareRecord)
    tags = dict.fromkeys(("fleet.verify", "fleet.harmed_on", "fleet.compare"), "none")
    if isinstance(verified, VerifyRecord) and verified.f16_sha256 == quantized.f16_sha256:
        tags["fleet.verify"] = verified.outcome
    if isinstance(evaluated, EvaluateRecord):
        harmed = harm.found(evaluated, quantized.type, quantized.gguf.sha256)
        tags["fleet.harmed_on"] = ", ".join(one.name for one, _ in harmed) or "none"
    if isinstance(compared, CompareRecord):
        is_it = compared.challenger.gguf_sha256 == quantized.gguf.sha256
        outcome = outcome_of(compared) if compared.validity.verdict == "VALID" else "INVALID"
        tags["fleet.compare"] = outcome or "none" if is_it else "none"
    return {
        name: wording.shortened(console.clean(text), _TAG_CHARACTERS) for name, text in tags.items()
    }


def run_key_of(model: str, key: str, gguf_sha256: str, benchmark: bytes) -> str:
    """Digest of everything that a run shows and that never changes about it."""
    parts = (model, key, gguf_sha256, hashlib.sha256(benchmark).hexdigest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _time_of(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise RecordError(f"{console.clean(text)!r} is no time.") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _ms(time: datetime) -> int:
    return int(time.timestamp() * 1000)


def _params(quantized: QuantizeRecord, measured: BenchmarkRecord) -> dict[str, str]:
    """What was asked for, in llama.cpp's words."""
    values: dict[str, Any] = {
        "model": quantized.model,
        "key": quantized.key,
        "type": quantized.type,
        "recipe": quantized.recipe,
        "imatrix": quantized.imatrix_sha256 is not None,
        "imatrix_corpus_sha256": quantized.imatrix_corpus_sha256,
        "fallbacks_count": len(quantized.fallbacks),
        "context_tokens": measured.memory.context_tokens,
        "threads": measured.threads,
        "backend": measured.machine.backend,
        "cpu": measured.machine.cpu,
        "cores_count": measured.machine.cores_count,
        "gpus": ", ".join(measured.machine.gpus),
        "quality_corpus_sha256": measured.quality.corpus_sha256,
        "quality_context_tokens": measured.quality.context_tokens,
        **_scored(measured.quality),
        "memory_method": measured.memory.method,
    }
    # An empty value is no value to MLflow.
    return {name: str(value) for name, value in values.items() if value not in {None, ""}}


def _scored(quality: AnyQuality) -> dict[str, int]:
    """Say over how much text quality was measured: windows of it, or texts of an encoder."""
    if isinstance(quality, EmbeddingQuality):
        return {"quality_texts_count": quality.texts_count}
    return {"quality_chunks_count": quality.chunks_count}


def _quality_metrics(quality: AnyQuality) -> dict[str, float]:
    if isinstance(quality, EmbeddingQuality):
        return {
            "cosine_mean": quality.cosine_mean,
            "cosine_mean_error": quality.cosine_mean_error,
            "cosine_p01": quality.cosine_p01,
            "cosine_min": quality.cosine_min,
            "same_nearest": quality.same_nearest,
        }
    return {
        "kld_mean_nats": quality.kld_mean_nats,
        "kld_mean_error_nats": quality.kld_mean_error_nats,
        "kld_p999_nats": quality.kld_p999_nats,
        "kld_max_nats": quality.kld_max_nats,
        "same_top": quality.same_top,
        "ppl": quality.ppl,
        "ppl_f16": quality.ppl_f16,
        "ppl_ratio": quality.ppl_ratio,
    }


def _metrics(quantized: QuantizeRecord, measured: BenchmarkRecord) -> dict[str, float]:
    """What was measured; speed by test and depth, e.g. `decode_tok_s_d4096`."""
    memory = measured.memory
    values: dict[str, float] = {
        "size_mib": measured.size_bytes / 2**20,
        "bits_per_weight": quantized.bits_per_weight,
        **_quality_metrics(measured.quality),
        "memory_mib": memory.measured_mib,
        "memory_estimate_mib": memory.estimate_mib,
        "benchmark_wall_s": measured.wall_s,
    }
    for speed in measured.speed:
        name = f"{speed.test}_tok_s_d{speed.depth_tokens}"
        values[name] = speed.median_tok_s
        values[f"{name}_low"] = speed.low_tok_s
        values[f"{name}_high"] = speed.high_tok_s
    return values


def _tags(
    fetched: FetchRecord, quantized: QuantizeRecord, measured: BenchmarkRecord
) -> dict[str, str]:
    """Where it comes from."""
    return {
        "fleet.model": quantized.model,
        "fleet.key": quantized.key,
        "fleet.source": fetched.source,
        "fleet.revision": fetched.revision,
        "fleet.llama_cpp_commit": quantized.llama_cpp_commit,
        "fleet.gguf_sha256": quantized.gguf.sha256,
        "fleet.f16_sha256": quantized.f16_sha256,
        "fleet.hw_id": measured.machine.hw_id,
        "fleet.env_id": measured.machine.env_id,
        "fleet.validity": measured.validity.verdict,
    }


def _verdict(key: str, choice: ChoiceRecord) -> dict[str, str]:
    """What was decided about a quant: these tags follow the choice when it changes."""
    mine = [
        (host.host, candidate)
        for host in choice.hosts
        for candidate in host.candidates
        if candidate.key == key
    ]
    chosen_for = [host for host, candidate in mine if candidate.verdict == "CHOSEN"]
    verdict = "CHOSEN" if chosen_for else (mine[0][1].verdict if mine else "INVALID")
    sentences = "\n".join(f"{host}: {candidate.sentence}" for host, candidate in mine)
    return {
        "fleet.verdict": verdict,
        "fleet.chosen_for": ", ".join(chosen_for) or "no host",
        # MLflow shows this tag as the description of the run.
        "mlflow.note.content": sentences or "not part of the choice",
    }


def _load_metrics(quantized: QuantizeRecord, tested: LoadTestRecord | None) -> dict[str, float]:
    """What the load test measured of a quant, if it served this very file."""
    if tested is None or not _was_served(quantized, tested):
        return {}
    row = metrics_rows(tested).get(quantized.type, {})
    return {f"{LOAD_TEST_PREFIX}{name}": value for name, value in row.items()}


def _was_served(quantized: QuantizeRecord, tested: LoadTestRecord) -> bool:
    served = (one.served for one in tested.winners if one.type == quantized.type)
    return any(one is not None and one.gguf_sha256 == quantized.gguf.sha256 for one in served)


def _load_tags(quantized: QuantizeRecord, tested: LoadTestRecord | None) -> dict[str, str]:
    """What served a quant, and what follows; the same tags for all, so that old ones go."""
    test = next((t for t in tested.winners if t.type == quantized.type), None) if tested else None
    if tested is None or test is None or not _was_served(quantized, tested):
        names = ("engine", "engine_version", "engine_llama_cpp", "manifest_sha256", "load_test")
        return {f"fleet.{name}": "none" for name in names}
    engine, served = tested.engine, test.served
    said = (one for one in tested.verdicts if one.winner == quantized.type)
    sentences = "\n".join(f"{one.host}: {one.verdict}: {one.sentence}" for one in said)
    return {
        "fleet.engine": engine.kind if engine else "none",
        "fleet.engine_version": (engine.version if engine else "") or "unknown",
        "fleet.engine_llama_cpp": (engine.llama_cpp if engine else "") or "unknown",
        "fleet.manifest_sha256": (served.manifest_sha256 if served else None) or "none",
        "fleet.load_test": wording.shortened(console.clean(sentences), _TAG_CHARACTERS) or "none",
    }


# --- telling ----------------------------------------------------------------------------------


def _tell(
    slice_: TrackSlice, specs: tuple[RunSpec, ...], missing: tuple[str, ...], at: Layout
) -> TrackReceipt:
    if not specs:
        return _receipt(slice_, at, missing=missing)
    uri, secrets, artifacts = _store(slice_.track.tracking_uri, at.root)
    is_remote = not uri.startswith(SQLITE)
    task = Task(
        experiment=slice_.track.experiment,
        artifacts=artifacts,
        answer_within_s=_ANSWER_WITHIN_S if is_remote else _TABLES_WITHIN_S,
        runs=specs,
    )
    task_file = at.scratch(slice_.model) / "track.json"
    told_file = task_file.with_name("tracked.jsonl")
    atomic.write_text(task_file, task.model_dump_json())
    told_file.unlink(missing_ok=True)
    reason = ""
    try:
        with console.Progress(f"telling {without_credentials(uri)}", total=len(specs)) as progress:
            proc.run(
                [sys.executable, "-m", "pipelines.mlflow_runs", task_file, told_file],
                log=at.log("track", slice_.model),
                env={"MLFLOW_TRACKING_URI": uri, **secrets, **_environment()},
                on_line=_counter(progress.update),
            )
    except (ToolError, MachineError) as error:
        reason = _reason(error, task.answer_within_s)
    told = _told(told_file)
    for file in (task_file, told_file):
        file.unlink(missing_ok=True)
    untold = [spec.key for spec in specs if spec.run_key not in {run.run_key for run in told}]
    if reason or untold:
        reason = reason or f"no word of {', '.join(untold)}"
        console.warn(
            f"{without_credentials(uri)} was not told about {slice_.model}: {reason}. "
            "The next `fleet repro` tries again."
        )
    return _receipt(slice_, at, told, reason, missing=missing)


def _receipt(
    slice_: TrackSlice,
    at: Layout,
    told: tuple[TrackedRun, ...] = (),
    reason: str = "",
    *,
    missing: tuple[str, ...],
) -> TrackReceipt:
    return TrackReceipt(
        model=slice_.model,
        status="pending" if reason else "tracked",
        reason=reason,
        choice_sha256=_sha256(at.model_record("choose", slice_.model)),
        load_test_sha256=_sha256(at.model_record("load-test", slice_.model)),
        publish_sha256=_sha256(at.model_record("publish", slice_.model)),
        verify_sha256=_sha256(at.model_record("verify", slice_.model)),
        evaluate_sha256=_sha256(at.model_record("evaluate", slice_.model)),
        compare_sha256=_sha256(at.comparison(slice_.model)),
        runs=told,
        missing=missing,
    )


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _store(uri: str, root: Path) -> tuple[str, dict[str, str], str | None]:
    """
    Make a declared URI usable from anywhere and free of secrets.

    Returns:
        The URI; the user and the password of a server, as the variables that MLflow reads them
        from; for a sqlite file of ours the place of the artifacts, beside it, since MLflow would
        put them into whatever the working directory is.
    """
    if uri.startswith(SQLITE):
        file = Path(root.resolve(), uri.removeprefix(SQLITE))
        file.parent.mkdir(parents=True, exist_ok=True)
        return f"{SQLITE}{file}", {}, (file.parent / "mlartifacts").as_uri()
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"} or "@" not in parts.netloc:
        return uri, {}, None
    user, _, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    secrets = {
        "MLFLOW_TRACKING_USERNAME": unquote(name),
        "MLFLOW_TRACKING_PASSWORD": unquote(password),
    }
    return urlunsplit(parts._replace(netloc=host)), secrets, None


def without_credentials(uri: str) -> str:
    """Return a URI as it may be shown: no user, no password, no query."""
    return scrubbed(uri.partition("?")[0])


def scrubbed(text: str) -> str:
    """Return text of a store as it may be shown: without the credentials of a URI in it."""
    return console.clean(_CREDENTIALS.sub("//", text))


def _environment() -> dict[str, str]:
    """Variables of the process that talks to MLflow; read by MLflow when it is imported."""
    return {
        # The defaults are 7 retries of 120 s each.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_WITHIN_S - 2),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).resolve().parent.parent), *_words("PYTHONPATH")]
        ),
    }


def _words(variable: str) -> list[str]:
    value = os.environ.get(variable)
    return [value] if value else []


def _counter(update: Callable[[float], None]) -> Callable[[str], None]:
    done = 0

    def on_line(line: str) -> None:
        nonlocal done
        if line.startswith("tracked "):
            done += 1
            update(done)

    return on_line


def _told(told_file: Path) -> tuple[TrackedRun, ...]:
    """Read the runs that the store confirmed; the last line may be cut."""
    told = []
    lines = told_file.read_text(encoding="utf-8").splitlines() if told_file.exists() else []
    for line in lines:
        try:
            told.append(TrackedRun(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return tuple(told)


def _reason(error: ToolError | MachineError, answer_within_s: int) -> str:
    """Say in one line why the store could not be told, without a secret in it."""
    if "died of SIGALRM" in error.message:
        return f"the server takes more than {answer_within_s} s"
    said = re.findall(r"^\s*cannot: (.*)$", error.message, re.MULTILINE)
    return scrubbed(said[-1] if said else error.message.splitlines()[0])[:300].rstrip(".")
