"""
Everything that a verdict on one model rests on, typed: a record, or as a clause why there is none.

`collect` reads it from a checkout; nothing else of the verdict reads a file or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipelines import records
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.errors import StoreError
from pipelines.evaluate_records import EvaluateRecord
from pipelines.load_records import LoadTestRecord
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    ChoiceRecord,
    ConvertRecord,
    FetchRecord,
    QuantizeRecord,
)
from pipelines.release_records import parse_release, release_bytes, release_id
from pipelines.verify_records import VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.layout import Layout
    from pipelines.params import JudgeSlice
    from pipelines.release_records import Release


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """
    What is known of one model.

    Attributes:
        declared: What params.yaml says now.
        quantized: By type.
        measured: By type.
        compared: None if nobody has compared anything: `fleet compare` is run by hand.
        engine: None if the engine was not measured alone: both sides ran on one, or nobody did.
        previous: The newest release, which results/ holds; None if there is none yet.
        today: The day in UTC, as 2027-01-31; a waiver counts on its last day, too.
    """

    declared: JudgeSlice
    fetched: FetchRecord | str
    converted: ConvertRecord | str
    verified: VerifyRecord | str
    calibrated: CalibrateRecord | str
    quantized: Mapping[str, QuantizeRecord | str]
    measured: Mapping[str, BenchmarkRecord | str]
    evaluated: EvaluateRecord | str
    choice: ChoiceRecord | str
    tested: LoadTestRecord | str
    compared: CompareRecord | str | None
    previous: Release | str | None
    today: str
    engine: EngineRecord | str | None = None

    def file(self, name: str) -> str:
        """Name a record of the model below results/: `tiny-llama/choice.json`."""
        return f"{self.declared.model}/{name}"

    def missing(self) -> dict[str, str]:
        """Return why each record is not there that has to be, by its path below the model's."""
        alone: dict[str, object] = {
            "fetch.json": self.fetched,
            "convert.json": self.converted,
            "verify.json": self.verified,
            "calibrate.json": self.calibrated,
            "evaluate.json": self.evaluated if self.declared.evals else None,
            "choice.json": self.choice,
            "load-test.json": self.tested,
            "release.json": self.previous,
        }
        found = {name: each for name, each in alone.items() if isinstance(each, str)}
        for stage, records_ in (("quantize", self.quantized), ("benchmark", self.measured)):
            for type_ in self.declared.quants.values():
                record = records_.get(type_, f"{type_}.json does not exist")
                if isinstance(record, str):
                    found[f"{stage}/{type_}.json"] = f"{stage}/{record}"
        return found


def today() -> str:
    """Return the day in UTC by which waivers count."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def collect(declared: JudgeSlice, at: Layout, *, day: str | None = None) -> Evidence:
    """
    Read every record of a model.

    Args:
        declared: What params.yaml says now.
        at: The checkout.
        day: The day in UTC by which waivers count; that of the clock if None.
    """
    model, types = declared.model, tuple(declared.quants.values())

    def of_model(stage: str, kind: type[records.R]) -> records.R | str:
        return records.read_or_reason(at.model_record(stage, model), kind)

    def of_quants(stage: str, kind: type[records.R]) -> dict[str, records.R | str]:
        paths = {type_: at.quant_record(stage, model, type_) for type_ in types}
        return {type_: records.read_or_reason(path, kind) for type_, path in paths.items()}

    comparison, engine = at.comparison(model), at.engine_record(model)
    return Evidence(
        declared=declared,
        fetched=of_model("fetch", FetchRecord),
        converted=of_model("convert", ConvertRecord),
        verified=of_model("verify", VerifyRecord),
        calibrated=of_model("calibrate", CalibrateRecord),
        quantized=of_quants("quantize", QuantizeRecord),
        measured=of_quants("benchmark", BenchmarkRecord),
        evaluated=of_model("evaluate", EvaluateRecord),
        choice=of_model("choose", ChoiceRecord),
        tested=of_model("load-test", LoadTestRecord),
        compared=records.read_or_reason(comparison, CompareRecord) if comparison.exists() else None,
        previous=previous(model, at),
        today=day or today(),
        engine=records.read_or_reason(engine, EngineRecord) if engine.exists() else None,
    )


def previous(model: str, at: Layout) -> Release | str | None:
    """Read the release that results/ holds; None if there is none yet, else why it is none."""
    path = at.release(model)
    name = path.relative_to(at.root).as_posix()
    try:
        data = path.read_bytes()
        release = parse_release(data, release_id(data), name)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except StoreError as error:
        return error.message.rstrip(".")
    if release_bytes(release) != data:
        return f"{name} was edited: a release never is"
    return f"{name} is of another model" if release.model != model else release
