"""
What stands against a release: one sentence for each thing, with what to do about it.

Nothing is judged here. `pipelines.verdict` has judged every record, every host, the licence and
upstream's terms; a release needs that nothing counts against the whole model, that no host is
INVALID, and that somebody is promoted. What a person may let pass (`waivers` of the model: a HOLD,
a licence, a gate of upstream's) is named in the release.

Nothing here reads a file or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import verdict, wording
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.load_records import LoadTestRecord
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    ChoiceRecord,
    ConvertRecord,
    FetchRecord,
    QuantizeRecord,
)
from pipelines.release_records import Release
from pipelines.verdict_chain import served_of
from pipelines.verdict_rules import license_files
from pipelines.verdict_words import tidy, without_verb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.release_records import ReleaseWaiver
    from pipelines.verdict import HostFinal, ModelVerdict
    from pipelines.verdict_evidence import Evidence

__all__ = ["Judgement", "Papers", "judge", "license_files", "papers_of", "served_of"]


@dataclass(frozen=True, kw_only=True)
class Papers:
    """Every record of a model, and the release before; quants by their type."""

    fetched: FetchRecord
    converted: ConvertRecord
    calibrated: CalibrateRecord
    quantized: Mapping[str, QuantizeRecord]
    measured: Mapping[str, BenchmarkRecord]
    choice: ChoiceRecord
    tested: LoadTestRecord
    compared: CompareRecord | None
    previous: Release | None
    engine: EngineRecord | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """
    What follows from the verdict.

    Attributes:
        reasons: Why there is no release; empty if there may be one.
        verdict: The verdict that says so.
        waivers: Those without which there would be more reasons.
        hosts: The final verdict for each host.
        released: Hosts that are served by the release.
        types: Quants that it holds, in the order of the declaration.
        license: The Hub's word for the licence.
    """

    reasons: tuple[str, ...]
    verdict: ModelVerdict
    waivers: tuple[ReleaseWaiver, ...]
    hosts: tuple[HostFinal, ...]
    released: tuple[str, ...]
    types: tuple[str, ...]
    license: str


def papers_of(evidence: Evidence) -> Papers | None:
    """Return the records of a model if all are there."""
    if evidence.missing():
        return None
    known = evidence
    assert isinstance(known.fetched, FetchRecord)
    assert isinstance(known.converted, ConvertRecord)
    assert isinstance(known.calibrated, CalibrateRecord)
    assert isinstance(known.choice, ChoiceRecord)
    assert isinstance(known.tested, LoadTestRecord)
    return Papers(
        fetched=known.fetched,
        converted=known.converted,
        calibrated=known.calibrated,
        quantized={k: v for k, v in known.quantized.items() if isinstance(v, QuantizeRecord)},
        measured={k: v for k, v in known.measured.items() if isinstance(v, BenchmarkRecord)},
        choice=known.choice,
        tested=known.tested,
        compared=known.compared if isinstance(known.compared, CompareRecord) else None,
        previous=known.previous if isinstance(known.previous, Release) else None,
        engine=known.engine if isinstance(known.engine, EngineRecord) else None,
    )


def judge(evidence: Evidence) -> Judgement:
    """Say whether there may be a release, and of what."""
    found = verdict.judge(evidence)
    return Judgement(
        reasons=tuple(_refusals(found, evidence)),
        verdict=found,
        waivers=found.waivers,
        hosts=found.hosts,
        released=found.released,
        types=found.types,
        license=found.license,
    )


def _refusals(found: ModelVerdict, evidence: Evidence) -> list[str]:
    """Put into sentences what stands against a release; the most basic first."""
    missing = evidence.missing()
    if missing:
        return _missing(found, missing)
    # What holds for the whole model, in the order in which it was asked.
    reasons = [
        f"{wording.sentence(each.clause)} {each.next_step}"
        for each in found.reasons
        if each.counts and not each.host
    ]
    reasons += [
        f"Host {one.host} is INVALID: {wording.sentence(_without_verb(one))} "
        f"`fleet repro {found.model}` measures again what is not to be trusted."
        for one in found.hosts
        if one.own_verdict == "INVALID"
    ]
    held = [
        one
        for one in found.hosts
        if one.own_verdict == "HOLD" and any(each.host and each.counts for each in one.reasons)
    ]
    if held:
        names = wording.listed([one.host for one in held])
        step = next(each.next_step for each in held[0].reasons if each.host and each.counts)
        reasons.append(f"{names}: HOLD: {wording.sentence(_without_verb(held[0]))} {step}")
    if not reasons and not found.released:
        why = next((f": {tidy(one.own_sentence)}" for one in found.hosts), "")
        reasons.append(
            f"No host is PROMOTE{wording.sentence(why)} Declare a quant, a gate or a host that "
            "fits; `fleet report` says what kept each quant out."
        )
    if not reasons and not found.types:
        reasons.append(
            f"No quant that passed its gates was served. Run `fleet repro {found.model}`."
        )
    return reasons


def _missing(found: ModelVerdict, missing: Mapping[str, str]) -> list[str]:
    """Say which records are not there, with what brings each of them back."""
    steps = {
        each.file.partition("/")[2]: each.next_step
        for each in found.reasons
        if each.rule == "records"
    }
    again = f"Run `fleet repro {found.model}`."
    return [
        f"Nothing is released without every record: {tidy(why)}. {steps.get(file, again)}"
        if file != "release.json"
        else f"{tidy(why)}. {steps.get(file, again)}"
        for file, why in missing.items()
    ]


def _without_verb(one: HostFinal) -> str:
    """Return the sentence of a verdict that is named before it."""
    return tidy(without_verb(one.own_sentence, one.own_verdict))
