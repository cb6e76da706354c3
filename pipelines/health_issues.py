"""
One issue for each sick host: opened when it falls sick, kept up to date, closed when it is well.

What is said there comes from artifacts, so every word of it is escaped. A host of which nothing is
known gets no issue and keeps the one that it has: silence is no health.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import render, wording
from pipelines.github import issues

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipelines.github.client import GitHub
    from pipelines.health_records import Finding, HealthRecord, HostSeen

LABEL: Final = "runner-health"
_MARKER: Final = "fleet:runner "
# A table row each; more would be a page that nobody reads.
_MOST_ROWS: Final = 40


@dataclass(frozen=True, kw_only=True)
class Judged:
    """
    A host, as it is after everything was looked at.

    Attributes:
        host: Key in `hosts:`.
        status: `unknown` if neither GitHub nor the host could be asked.
        findings: Of GitHub and of the host itself.
    """

    host: str
    status: str
    findings: tuple[Finding, ...]


def judge(seen: HostSeen, probe: HealthRecord | None, *, probed: bool) -> Judged:
    """
    Sum up one host.

    Args:
        seen: What GitHub says of it.
        probe: What it found on itself; None if it did not say.
        probed: Whether it was asked.
    """
    from pipelines.health_records import Finding, worst  # noqa: PLC0415 - pydantic

    findings = [*seen.findings, *(probe.findings if probe is not None else ())]
    if probed and probe is None:
        findings.append(
            Finding(
                rule="probe",
                status="sick",
                value="it was online and its probe left no record",
                limit="one record",
                next_step="Open the job `probe` of this run, and its last lines.",
            )
        )
    status: str = worst(tuple(findings))
    if status != "sick" and seen.status == "unknown" and probe is None:
        status = "unknown"
    return Judged(host=seen.host, status=status, findings=tuple(findings))


def settle(gh: GitHub, judged: Iterable[Judged], *, run_url: str | None) -> dict[str, str]:
    """
    Open, renew and close issues so that each sick host has exactly one.

    Args:
        gh: The repository; in a dry run nothing is changed.
        judged: Every declared host that has a runner.
        run_url: Of this run, for the reader.

    Returns:
        What was done, by host: `opened 7`, `renewed 7`, `closed`, `none`, `left`.

    Raises:
        GitHubError: Issues are turned off, or the token may not write them.
        RetryLaterError: GitHub cannot be asked now.
    """
    there = _by_host(gh)
    done: dict[str, str] = {}
    for each in judged:
        open_ = there.pop(each.host, None)
        done[each.host] = _settle_one(gh, each, open_, run_url=run_url)
    for host in there:
        issues.close_issue(
            gh,
            marker=f"{_MARKER}{host}",
            label=LABEL,
            reason=f"{render.escape_markdown(host)} has no `runs_on` in params.yaml any more.",
        )
        done[host] = "closed"
    return done


def _by_host(gh: GitHub) -> dict[str, dict[str, Any]]:
    """Return the oldest open issue for each host that has one."""
    found: dict[str, dict[str, Any]] = {}
    for issue in issues.open_issues(gh, LABEL):
        first = str(issue["body"]).split("\n", 1)[0].removeprefix("<!-- ").removesuffix(" -->")
        if first.startswith(_MARKER):
            found.setdefault(first.removeprefix(_MARKER), issue)
    return found


def _settle_one(
    gh: GitHub, each: Judged, open_: Mapping[str, Any] | None, *, run_url: str | None
) -> str:
    marker = f"{_MARKER}{each.host}"
    if each.status == "unknown":
        return "left" if open_ is not None else "none"
    if each.status != "sick":
        if open_ is None:
            return "none"
        issues.close_issue(gh, marker=marker, label=LABEL, reason=_healthy(each, run_url))
        return "closed"
    since = open_.get("created_at") if open_ is not None else None
    number = issues.upsert_issue(
        gh,
        marker=marker,
        label=LABEL,
        title=f"The runner of {each.host} is sick",
        body=body(each, since=since if isinstance(since, str) else None, run_url=run_url),
    )
    return f"{'renewed' if open_ is not None else 'opened'} {number}"


def body(each: Judged, *, since: str | None, run_url: str | None) -> str:
    """Write the issue: what is wrong with its next step, the rest folded."""
    escape = render.escape_markdown
    sick = [finding for finding in each.findings if finding.status == "sick"]
    count = wording.counted(len(sick), "finding")
    lines = [
        f"{escape(each.host)} measures nothing that can be trusted: {count} below.",
        "",
        *table(sick),
    ]
    rest = [finding for finding in each.findings if finding.status != "sick"]
    if rest:
        lines += ["", "<details><summary>What else was looked at</summary>", "", *table(rest)]
        lines += ["", "</details>"]
    lines += ["", f"Known since {escape(since)}." if since else "", _origin(run_url)]
    lines.append("This issue is renewed at every check and closes itself when the host is well.")
    return "\n".join(line for number, line in enumerate(lines) if line or lines[number - 1])


def table(findings: Iterable[Finding]) -> list[str]:
    """Return findings as rows of Markdown, the worst first, every word escaped."""
    from pipelines.health_records import STATUSES  # noqa: PLC0415 - pydantic

    escape = render.escape_markdown
    ordered = sorted(findings, key=lambda one: -STATUSES.index(one.status))
    rows = [
        "| {} | {} | {} | {} | {} |".format(
            *(escape(text) for text in (one.rule, one.status, one.value, one.limit, one.next_step))
        )
        for one in ordered[:_MOST_ROWS]
    ]
    more = len(ordered) - len(rows)
    head = ["| what | status | found | limit | next |", "| --- | --- | --- | --- | --- |"]
    return [
        *head,
        *rows,
        *([f"\n{wording.counted(more, 'more row')} left out."] if more > 0 else []),
    ]


def _healthy(each: Judged, run_url: str | None) -> str:
    warnings = sum(finding.status == "warn" for finding in each.findings)
    also = f", with {wording.counted(warnings, 'warning')}" if warnings else ""
    return f"{render.escape_markdown(each.host)} is well again{also}. {_origin(run_url)}".strip()


def _origin(run_url: str | None) -> str:
    """Link the run; its address is ours, from the runner's own variables."""
    return f"Found by [this run]({run_url})." if run_url else ""
