"""
What the jobs of a pull request hand to one another: the plan, the bundles, the gate.

    plan    (hosted)       what has to be measured, where, and what that costs
    bundle  (self-hosted)  what was measured of some models for one host, with its place in dvc.lock
    gate    (hosted)       the plan, all bundles, and the verdict on them

They leave a job as artifacts, so every field may come from a stranger: each type is closed, strings
and numbers are bounded, and nothing of them is shown without being escaped or written without its
path being looked at (`pipelines.bundle`).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from pipelines.params import MODEL_KEY, QUANT_KEY, REVISION, SHA256, Label
from pipelines.records import FileDigest, Finite, Part, Record

# The label that lets a plan over its budget pass.
OVER_BUDGET_LABEL: Final = "over-budget"
# GitHub starts no more jobs in one run (its limits page); some are ours.
MAX_LEGS: Final = 200
# The stages of a model that a pull request measures, in the order of the graph; what comes after
# them (publish, track, report) is done from the default branch.
MEASURING: Final = (
    "fetch", "convert", "verify", "calibrate", "quantize", "benchmark", "evaluate", "choose",
    "load-test",
)  # fmt: skip

Commit = Annotated[str, StringConstraints(pattern=REVISION)]
Digest = Annotated[str, StringConstraints(pattern=SHA256)]
ModelName = Annotated[str, StringConstraints(pattern=MODEL_KEY)]
HostName = Annotated[str, StringConstraints(pattern=MODEL_KEY)]
Key = Annotated[str, StringConstraints(pattern=QUANT_KEY)]
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]{1,30}$")]
Sentence = Annotated[str, StringConstraints(max_length=2000)]
Word = Annotated[str, StringConstraints(max_length=200)]
Size = Annotated[int, Field(ge=0, le=1 << 60)]
# What a person decides by: from good to bad, as check runs of GitHub call it.
Conclusion = Literal["success", "action_required", "failure", "neutral"]
# success: PROMOTE. action_required: HOLD. failure: REJECT, or the declaration is wrong, or a job
# failed. neutral: INVALID, measure again.


class PlanProblem(Part):
    """One line of params.yaml that is wrong."""

    file: Word
    line: Annotated[int, Field(ge=1, le=10_000_000)]
    column: Annotated[int, Field(ge=1, le=10_000_000)]
    text: Sentence


class PlannedRun(Part):
    """One stage that has to run, and why: `Q4_K_M is new`, `gates changed: max_kld_mean_nats`."""

    stage: StageName
    key: Key
    why: Sentence


class Budget(Part):
    """
    What a plan costs; None is what nothing is known of, and `unknown` says why.

    Attributes:
        gpu_minutes: On self-hosted runners, from how long the same stages took before.
        disk_bytes: New files on the runners.
        network_bytes: To be fetched from the Hub; nothing for a `path:` source.
    """

    gpu_minutes: Finite | None = None
    disk_bytes: Size | None = None
    network_bytes: Size | None = None
    unknown: tuple[Sentence, ...] = ()


class LeftOut(Part):
    """
    A host that measures nothing of a model, because it cannot hold it.

    Attributes:
        host: Key in `hosts:`.
        why: As a clause.
    """

    host: HostName
    why: Sentence


class ModelPlan(Part):
    """
    What a pull request means for one model.

    Attributes:
        model: Its key.
        change: What happened to it in the declaration, against the base.
        what: The difference, as sentences: `max_kld_mean_nats 0.05 -> 0.02`.
        line: Where it is declared in params.yaml; None if it is no more.
        runs: Stages that the records in git do not cover.
        budget: Of these.
        covered: Whether there is nothing to measure: the records in git are those of the head.
        left_out: Hosts on which no job is started.
    """

    model: ModelName
    change: Literal["added", "changed", "removed", "unchanged"]
    what: tuple[Sentence, ...] = ()
    line: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    runs: tuple[PlannedRun, ...] = ()
    budget: Budget = Budget()
    covered: bool
    left_out: tuple[LeftOut, ...] = ()


class Leg(Part):
    """
    One job: some models, for one host.

    Attributes:
        host: Key in `hosts:`.
        models: One, unless there are more legs than GitHub starts jobs.
        runs_on: Labels of the runner.
        primary: Whether its records are those of results/MODEL; those of another host go to
            results/MODEL/on/HOST.
        timeout_minutes: After which the job is ended.
    """

    host: HostName
    models: Annotated[tuple[ModelName, ...], Field(min_length=1)]
    runs_on: tuple[Label, ...]
    primary: bool
    timeout_minutes: Annotated[int, Field(ge=1, le=1440)]


class PlanRecord(Record):
    """
    What a pull request needs.

    Attributes:
        base: Commit that it is held against: where it left the default branch.
        head: Commit that was planned; for a pull request that of its branch, not the merge.
        params_blob: git's name of params.yaml at the head.
        problems: Why it cannot be planned; nothing else is filled in then.
        models: Every model that differs from the base, in its declaration or in its records, or is
            not covered, in the order of the file.
        legs: What has to be measured.
        budget: Of all legs together.
        over: Why it costs more than the declaration allows, as sentences.
        allowed: Whether it is within the budget, or somebody agreed.
    """

    stage: Literal["plan"] = "plan"
    base: Commit | None
    head: Commit
    params_blob: Commit | None
    problems: tuple[PlanProblem, ...] = ()
    models: tuple[ModelPlan, ...] = ()
    legs: tuple[Leg, ...] = ()
    budget: Budget = Budget()
    over: tuple[Sentence, ...] = ()
    allowed: bool = True


class BundleRecord(Record):
    """
    What was measured of one model for one host.

    Attributes:
        head: Commit that was measured.
        model: Its key.
        host: Key in `hosts:`.
        primary: As in `Leg`.
        machine_id: sha256 of the hardware facts, as every benchmark of it says.
        toolchain_id: md5 by which dvc.lock knows work/toolchain.json.
        lock: Entries of dvc.lock, by the name of the stage.
        files: Text of each record, by its path below the repository: `results/M/choice.json`.
        ggufs: The files that were measured; their bytes are in the DVC remote.
        remote: Whether they were sent there: the name of the remote, None if there is none.
        times_s: How long each stage ran, by its name; those that were not cached.
        machine: Text of work/machine.json; empty if git tells of an earlier measurement.
        toolchain: Text of work/toolchain.json, which git keeps as results/M/toolchain.json.
        failures: Why it is not all of it, as sentences.
        again: Whether all of these pass by themselves: the Hub did not answer, the machine was
            busy.
    """

    stage: Literal["bundle"] = "bundle"
    head: Commit
    model: ModelName
    host: HostName
    primary: bool
    machine_id: Word
    toolchain_id: Word
    lock: dict[str, Any]
    files: dict[str, str]
    ggufs: tuple[FileDigest, ...]
    remote: Word | None
    times_s: dict[str, Finite] = Field(default_factory=dict)
    machine: str = ""
    toolchain: str = ""
    failures: tuple[Sentence, ...] = ()
    again: bool = False


class TimesRecord(Record):
    """
    How long the stages of a model took when they last ran, for the budget of the next plan.

    results/M/times.json of the primary host, results/M/on/HOST/times.json of another; a run keeps
    its own in work/times.json, of all models.

    Attributes:
        wall_s: By the name of the stage in dvc.lock: `benchmark@tiny-llama-Q8_0`.
        failed: What the last run could not do, and why, by the same names; in work/ only.
        codes: With what those of them ended that ran: 75 is what passes by itself.
    """

    stage: Literal["times"] = "times"
    wall_s: dict[str, Finite] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)
    codes: dict[str, int] = Field(default_factory=dict)


class GateModel(Part):
    """The verdict on one model for one host, for those who only read it."""

    model: ModelName
    host: HostName
    verdict: Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
    sentence: Sentence
    next_step: Sentence
    line: Annotated[int, Field(ge=1, le=10_000_000)] | None = None


class GateRecord(Record):
    """
    What the gate found; whoever shows or writes it judges the bundles again.

    Attributes:
        base: As in the plan.
        head: As in the plan; None if nobody knows.
        verdict: The worst of the models.
        conclusion: What that means for the pull request.
        sentence: The verdict in words.
        models: For each model and host.
        plan: The plan; None if there was none.
        bundles: Everything that was measured, or that git holds for the head.
        failures: What went wrong before there was something to judge, as sentences.
    """

    stage: Literal["gate"] = "gate"
    base: Commit | None
    head: Commit | None
    verdict: Literal["PROMOTE", "HOLD", "REJECT", "INVALID"] | None
    conclusion: Conclusion
    sentence: Sentence
    models: tuple[GateModel, ...] = ()
    plan: PlanRecord | None = None
    bundles: tuple[BundleRecord, ...] = ()
    failures: tuple[Sentence, ...] = ()


def is_records_of(message: str, head: str) -> bool:
    """Tell whether a commit has the message by which `fleet adopt` puts records of `head` there."""
    return message.startswith("Records: ") and f" at {head}." in message
