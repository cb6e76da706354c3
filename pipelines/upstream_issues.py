"""
One issue for everything upstream that a person has to look at.

Opened when something asks for a person or was silent for too long, renewed at every look, closed
when nothing is left. What is said there comes from the Hub, so every word of it is escaped. What
cannot be asked now keeps what it said last, and closes nothing: silence is no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pipelines import render, wording
from pipelines.github import issues

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.github.client import GitHub
    from pipelines.upstream_records import UpstreamRecord

LABEL: Final = "upstream"
MARKER: Final = "fleet:upstream"
# Of what is listed, escaped; with the rest it stays below what GitHub takes.
_MOST_CHARACTERS: Final = 50_000
_MOST_OF_A_SENTENCE: Final = 400
_HEAD: Final = ["| | from | why | next |", "| --- | --- | --- | --- |"]
_STILL: Final = "It cannot be asked now; this is what it said last."


class _Row(NamedTuple):
    """A model or an engine that asks for a person."""

    name: str
    source: str
    reason: str
    next_step: str


def is_open(gh: GitHub) -> bool:
    """
    Say whether there is an issue of ours.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    return bool(issues.open_issues(gh, LABEL, MARKER))


def settle(gh: GitHub, record: UpstreamRecord, *, run_url: str | None) -> str:
    """
    Open, renew or close the issue, so that it says what this look found.

    Args:
        gh: The repository; in a dry run nothing is changed.
        record: Of the look.
        run_url: Of this run, for the reader.

    Returns:
        What was done: `opened 7`, `renewed 7`, `closed`, `left`, `none`.

    Raises:
        GitHubError: Issues are turned off, or the token may not write them.
        RetryLaterError: GitHub cannot be asked now.
    """
    there = issues.open_issues(gh, LABEL, MARKER)
    rows = list(_rows(record))
    if not rows and not record.alarms:
        if not there:
            return "none"
        if _is_blind(record):
            return "left"
        reason = f"Nothing of it is left. {_origin(run_url)}".strip()
        issues.close_issue(gh, marker=MARKER, label=LABEL, reason=reason)
        return "closed"
    since = there[0].get("created_at") if there else None
    number = issues.upsert_issue(
        gh,
        marker=MARKER,
        label=LABEL,
        title=_title(rows, record),
        body=_body(rows, record, since if isinstance(since, str) else None, run_url),
    )
    return f"{'renewed' if there else 'opened'} {number}"


def _rows(record: UpstreamRecord) -> Iterator[_Row]:
    """Yield what asks for a person, by this look or, where this one heard nothing, by the last."""
    for each in record.models:
        if each.state == "asks":
            yield _Row(each.model, each.source, each.reason, each.next_step)
        elif each.state == "unknown" and each.last_state == "asks":
            yield _Row(each.model, each.source, each.last_reason, _STILL)
    for engine in record.engines:
        if engine.state == "asks":
            yield _Row(engine.engine, "", engine.reason, engine.next_step)


def _is_blind(record: UpstreamRecord) -> bool:
    """Whether there is something of which neither this look nor one before it heard anything."""
    return any(each.state == "unknown" and each.last_state is None for each in record.models) or (
        any(each.state == "unknown" for each in record.engines)
    )


def _title(rows: list[_Row], record: UpstreamRecord) -> str:
    """Name what asks; what is only silent is counted."""
    if rows:
        return f"Upstream asks for a person: {wording.first_few([row.name for row in rows])}"
    return f"Upstream was not seen for long: {wording.counted(len(record.alarms), 'alarm')}"


def _body(rows: list[_Row], record: UpstreamRecord, since: str | None, run_url: str | None) -> str:
    """Write the issue: a row for each with its next step, and the alarms."""
    lines = []
    if rows:
        lines += ["Nothing is proposed of these until a person has looked.", "", *_HEAD]
        lines += _fitting([f"| {' | '.join(_short(cell) for cell in row)} |" for row in rows])
    if record.alarms:
        lines += ["", "Not seen for two periods, so nobody knows what changed there:", ""]
        lines += _fitting([f"- {_short(alarm)}" for alarm in record.alarms])
    lines += ["", *([f"Known since {_short(since)}."] if since else [])]
    lines += [_origin(run_url)] if run_url else []
    lines.append("This issue is renewed at every look and closes itself when nothing is left.")
    return "\n".join(lines)


def _short(text: str) -> str:
    return render.escape_markdown(wording.shortened(text, _MOST_OF_A_SENTENCE))


def _fitting(rows: list[str]) -> list[str]:
    """Return as many rows as one half of the issue takes, and how many are left out."""
    kept: list[str] = []
    left = _MOST_CHARACTERS // 2
    for row in rows:
        left -= len(row) + 1
        if left < 0:
            return [*kept, "", f"{wording.counted(len(rows) - len(kept), 'more row')} left out."]
        kept.append(row)
    return kept


def _origin(run_url: str | None) -> str:
    """Link the run; its address is ours, from the runner's own variables."""
    return f"Found by [this run]({run_url})." if run_url else ""
