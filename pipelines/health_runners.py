"""
What GitHub says of the runners of a fleet: which is online, too old, or waited for.

A job that is aimed at a runner that is offline waits up to 24 hours, so GitHub is asked first. Only
an App's token with `administration: read` may; without one every host is `unknown`, which is said
and stops nothing.

Sources: docs.github.com, "REST API endpoints for self-hosted runners", "Self-hosted runners
reference" (a schedule of a public repository stops after 60 days without a commit).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pipelines import console
from pipelines.github import runners as asked
from pipelines.github.errors import GitHubError
from pipelines.health_records import Finding, HostSeen, RunnerSeen, RunnersRecord, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipelines.github.client import GitHub
    from pipelines.github.runners import Runner

# GitHub registers no older one (since 2026-09-25); newer ones stop to get jobs at some time, too.
OLDEST_RUNNER: Final = "2.329.0"
_SOON_DAYS: Final = 30
# Of the 60 days after which GitHub stops the schedules of a public repository.
_QUIET_DAYS: Final = 45
_SCHEDULES_STOP_DAYS: Final = 60
# Runs in the queue whose jobs are looked at; each costs one request.
_MOST_RUNS: Final = 20
_LONG_WAIT_MINUTES: Final = 60
_WHEN = re.compile(r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|\+00:00))?")


def look(gh: GitHub, hosts: Mapping[str, tuple[str, ...]], *, now: datetime) -> RunnersRecord:
    """
    Ask GitHub about every declared host.

    Args:
        gh: The repository.
        hosts: Labels by key of `hosts:`.
        now: In UTC.

    Raises:
        RetryLaterError: GitHub cannot be asked now.
    """
    findings: list[Finding] = []
    every, sees_all = _runners(gh, hosts.values(), findings)
    waiting = _waiting(gh, findings)
    hosts_seen = tuple(
        seen(
            gh,
            host,
            labels,
            every if sees_all or _of(labels, every) else None,
            waiting=waiting,
            now=now,
        )
        for host, labels in hosts.items()
    )
    findings += schedules(gh, now)
    return RunnersRecord(checked_at=stamp(now), hosts=hosts_seen, findings=tuple(findings))


def _runners(
    gh: GitHub, wanted: Iterable[tuple[str, ...]], findings: list[Finding]
) -> tuple[tuple[Runner, ...] | None, bool]:
    """
    Return the runners that may take jobs of this repository, and whether these are all.

    Those of an organization are asked for only if a host has none in the repository itself: it
    takes a right that few tokens have.
    """
    try:
        every = asked.runners(gh)
    except GitHubError as error:
        findings.append(_unasked("runners", error))
        return None, False
    if all(_of(labels, every) for labels in wanted):
        return every, True
    try:
        if not asked.is_of_organization(gh):
            return every, True
        grouped = [one for group in asked.groups(gh) for one in group.runners]
    except GitHubError as error:
        findings.append(_unasked("runners-of-organization", error))
        return every, False
    return tuple({one.id: one for one in (*every, *grouped)}.values()), True


def _of(labels: Iterable[str], every: Iterable[Runner] | None) -> list[Runner]:
    """Return the runners that take jobs with these labels, as GitHub routes them."""
    wanted = frozenset(label.lower() for label in labels)
    return [each for each in every or () if wanted <= each.labels]


def stamp(when: datetime) -> str:
    """Write a moment as GitHub does: 2026-11-22T00:30:00Z."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unasked(rule: str, error: GitHubError) -> Finding:
    return Finding(
        rule=rule,
        status="unknown",
        value=_short(error.message),
        next_step=_short(error.hint),
    )


def seen(  # noqa: PLR0913 - what is known of it, from four questions
    gh: GitHub,
    host: str,
    labels: tuple[str, ...],
    every: tuple[Runner, ...] | None,
    *,
    waiting: list[dict[str, Any]] | None,
    now: datetime,
) -> HostSeen:
    """
    Say what GitHub knows of one host.

    Args:
        gh: The repository; asked about versions of runners.
        host: Key in `hosts:`.
        labels: Of its runner.
        every: All runners of the repository; None if nobody may ask.
        waiting: Jobs that wait for a runner; None if nobody may ask.
        now: In UTC.

    Raises:
        RetryLaterError: GitHub cannot be asked now.
    """
    wanted = frozenset(label.lower() for label in labels)
    mine = _of(labels, every)
    jobs = [each for each in waiting or () if _labels(each) and _labels(each) <= wanted]
    oldest = min((each["created_at"] for each in jobs if _moment(each["created_at"])), default=None)
    status: Any = "unknown"
    if every is not None:
        status = "absent" if not mine else "online" if any(e.online for e in mine) else "offline"
    findings = [finding for each in mine if (finding := _version(gh, each, now)) is not None]
    if status in {"offline", "absent"}:
        findings.insert(0, _missing(status, labels, mine))
    if (late := _late(jobs, oldest, now)) is not None:
        findings.append(late)
    return HostSeen(
        host=host,
        runs_on=labels,
        status=status,
        runners=tuple(
            RunnerSeen(
                name=_short(each.name, 100),
                online=each.online,
                busy=each.busy,
                version=each.version and _short(each.version, 40),
            )
            for each in mine
        ),
        waiting_count=None if waiting is None else len(jobs),
        oldest_wait=oldest,
        findings=tuple(findings),
    )


def _missing(status: str, labels: tuple[str, ...], mine: list[Runner]) -> Finding:
    """Say that nobody takes the jobs of a host."""
    wanted = ", ".join(labels)
    if status == "absent":
        return Finding(
            rule="runner",
            status="sick",
            value=f"no runner has the labels {wanted}",
            limit="one",
            next_step="Register one as deploy/runner/README.md says, or give it the label.",
        )
    names = ", ".join(_short(each.name, 60) for each in mine[:5])
    return Finding(
        rule="runner",
        status="sick",
        value=f"offline: {names}",
        limit="one online",
        next_step="On that machine: systemctl status gguf-fleet-runner, "
        "journalctl -u gguf-fleet-runner.",
    )


def _version(gh: GitHub, runner: Runner, now: datetime) -> Finding | None:
    """Say that a runner's version gets no jobs, or soon gets none."""
    if runner.version is None:
        return None
    told = _short(f"{runner.name} runs {runner.version}", 200)
    renew = "Update the runner: deploy/runner/README.md, Update."
    if triple(runner.version) < triple(OLDEST_RUNNER):
        return Finding(
            rule="runner-version", status="sick", value=told, limit=OLDEST_RUNNER, next_step=renew
        )
    ends = _ends(asked.deprecation(gh, runner.version))
    if ends is None or (ends - now).days > _SOON_DAYS:
        return None
    status: Status = "sick" if ends <= now else "warn"
    return Finding(
        rule="runner-version",
        status=status,
        value=f"{told}, which gets no jobs from {ends:%Y-%m-%d} on",
        limit=f"{_SOON_DAYS} days",
        next_step=renew,
    )


def _ends(told: dict[str, Any] | None) -> datetime | None:
    """Return the first moment in what GitHub says of a version; its fields have no schema yet."""
    found = [_moment(value) for key, value in (told or {}).items() if "creat" not in key]
    return min((each for each in found if each is not None), default=None)


def _moment(value: object) -> datetime | None:
    if not isinstance(value, str) or not _WHEN.fullmatch(value):
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def triple(version: str) -> tuple[int, ...]:
    """Read 2.329.0; what is none counts as new: nobody is called sick for a word."""
    found = re.match(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})", version)
    return tuple(map(int, found.groups())) if found else (999_999,)


# --- the queue --------------------------------------------------------------------------------


def _waiting(gh: GitHub, findings: list[Finding]) -> list[dict[str, Any]] | None:
    """Return the jobs that wait for a runner; None if nobody may ask."""
    jobs: list[dict[str, Any]] = []
    try:
        for number, run in enumerate(gh.paged("actions/runs", "workflow_runs", status="queued")):
            if number >= _MOST_RUNS:
                break
            found = gh.paged(f"actions/runs/{int(run['id'])}/jobs", "jobs", filter="latest")
            jobs += [each for each in found if each.get("status") == "queued"]
    except GitHubError as error:
        findings.append(_unasked("queue", error))
        return None
    except (KeyError, TypeError, ValueError):
        return None
    return [each for each in jobs if isinstance(each.get("created_at"), str)]


def _labels(job: dict[str, Any]) -> frozenset[str]:
    labels = job.get("labels")
    return (
        frozenset(str(each).lower() for each in labels) if isinstance(labels, list) else frozenset()
    )


def _late(jobs: Iterable[dict[str, Any]], oldest: str | None, now: datetime) -> Finding | None:
    """Say that somebody waits for long."""
    since = _moment(oldest)
    if since is None or (minutes := (now - since).total_seconds() / 60) < _LONG_WAIT_MINUTES:
        return None
    return Finding(
        rule="queue",
        status="warn",
        value=f"{len(list(jobs))} jobs wait, the first for {minutes:,.0f} minutes",
        limit=f"{_LONG_WAIT_MINUTES} minutes",
        next_step="GitHub gives up after 24 hours. Start the runner, or cancel the runs.",
    )


# --- the repository ---------------------------------------------------------------------------


def schedules(gh: GitHub, now: datetime) -> list[Finding]:
    """
    Say that GitHub stopped the schedules, or soon does: nothing else would ever say so.

    Raises:
        RetryLaterError: GitHub cannot be asked now.
    """
    found: list[Finding] = []
    try:
        for each in gh.paged("actions/workflows", "workflows"):
            if each.get("state") in {"disabled_inactivity", "disabled_fork"}:
                name = _short(str(each.get("path")), 100)
                found.append(
                    Finding(
                        rule="schedules",
                        status="warn",
                        value=f"{name} is {each['state'].replace('_', ' by ', 1)}",
                        limit="active",
                        next_step=f"gh workflow enable {name.rpartition('/')[2]}",
                    )
                )
        repository = gh.get(f"/repos/{gh.repository}")
    except GitHubError as error:
        return [*found, _unasked("schedules", error)]
    pushed = _moment(repository.get("pushed_at")) if isinstance(repository, dict) else None
    if pushed is None or repository.get("private") is not False:
        return found
    if (quiet := (now - pushed).days) >= _QUIET_DAYS:
        found.append(
            Finding(
                rule="schedules",
                status="warn",
                value=f"the last push was {quiet} days ago",
                limit=f"{_SCHEDULES_STOP_DAYS} days, then GitHub stops the schedules of a public "
                "repository",
                next_step="Push something, or enable them again: gh workflow enable FILE.",
            )
        )
    return found


def _short(text: str, characters: int = 500) -> str:
    return console.clean(" ".join(text.split()))[:characters]
