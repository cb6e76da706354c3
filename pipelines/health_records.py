"""
What `fleet runner-health` hands from job to job: what GitHub says of runners, what they say.

Both leave a job as artifacts, one of them a job on a self-hosted runner, so both are read as text
of a stranger: closed types, bounded strings, escaped where they are shown.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from pipelines.ci_records import HostName, Sentence, Word  # noqa: TC001 - pydantic reads them
from pipelines.params import Label  # noqa: TC001 - the same
from pipelines.records import Part, Record

# From good to bad. `unknown` is what could not be asked: it is neither well nor sick.
Status = Literal["ok", "unknown", "warn", "sick"]
STATUSES: Final[tuple[Status, ...]] = ("ok", "unknown", "warn", "sick")
_Few = Annotated[tuple["Finding", ...], Field(max_length=100)]


class Finding(Part):
    """
    One thing that was looked at.

    Attributes:
        rule: Its name: `disk-work`.
        status: What it means.
        value: What was found, with its unit.
        limit: What it is held against; empty if there is nothing.
        next_step: What to type or to look at; empty where all is well.
    """

    rule: Annotated[str, Field(pattern=r"^[a-z][a-z-]{1,40}$")]
    status: Status
    value: Sentence
    limit: Sentence = ""
    next_step: Sentence = ""


class RunnerSeen(Part):
    """One runner as GitHub lists it; `version` is None where GitHub does not say."""

    name: Word
    online: bool
    busy: bool
    version: Word | None = None


class HostSeen(Part):
    """
    A declared host and the runners whose labels are its own.

    Attributes:
        host: Key in `hosts:`.
        runs_on: Its labels.
        status: online if one of its runners is, absent if it has none, unknown if nobody could ask.
        runners: Those that have every label.
        waiting_count: Jobs in the queue that want one of them; None if nobody could ask.
        oldest_wait: When the first of these was queued, as GitHub says it.
        findings: What is to be said of them.
    """

    host: HostName
    runs_on: tuple[Label, ...]
    status: Literal["online", "offline", "absent", "unknown"]
    runners: Annotated[tuple[RunnerSeen, ...], Field(max_length=1000)] = ()
    waiting_count: Annotated[int, Field(ge=0)] | None = None
    oldest_wait: Word | None = None
    findings: _Few = ()


class RunnersRecord(Record):
    """
    What GitHub says of the runners of a fleet.

    Attributes:
        checked_at: UTC, ISO 8601.
        hosts: Every declared host with `runs_on`, in the order of the file.
        findings: What concerns the repository rather than a host.
    """

    stage: Literal["runners"] = "runners"
    checked_at: Word
    hosts: Annotated[tuple[HostSeen, ...], Field(max_length=1000)]
    findings: _Few = ()


class HealthRecord(Record):
    """
    What a runner found on itself.

    Attributes:
        host: Key in `hosts:` for which it was asked.
        checked_at: UTC, ISO 8601, by its own clock.
        status: The worst of the findings.
        findings: Everything that was looked at.
    """

    stage: Literal["runner-health"] = "runner-health"
    host: HostName
    checked_at: Word
    status: Status
    findings: _Few


def worst(findings: tuple[Finding, ...]) -> Status:
    """Return the worst status; ok if nothing was found."""
    return max((each.status for each in findings), key=STATUSES.index, default="ok")
