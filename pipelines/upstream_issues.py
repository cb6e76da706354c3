"""
One issue for everything upstream that a person has to look at.

Opened when something asks for a person or was silent for too long, renewed at every look, closed
when nothing is left. What is said there comes from the Hub, so every word of it is escaped. A model
that cannot be asked now keeps the line that it has: silence is no answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from pipelines import render, wording
from pipelines.github import issues
from pipelines.params import MODEL_KEY

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipelines.github.client import GitHub
    from pipelines.upstream_records import ModelUpstream, UpstreamRecord

LABEL: Final = "upstream"
MARKER: Final = "fleet:upstream"
# The second line of the issue: which models it names, for the next look.
_NAMED: Final = re.compile(r"<!-- fleet:asks ([^<>]*) -->")
# Of what is listed, escaped; with the rest it stays below what GitHub takes.
_MOST_CHARACTERS: Final = 50_000
_MOST_OF_A_SENTENCE: Final = 400
_HEAD: Final = ["| model | source | why | next |", "| --- | --- | --- | --- |"]
_STILL: Final = "It could not be asked again; what an earlier look found stands."


def is_open(gh: GitHub) -> bool:
    """
    Say whether there is an issue of ours.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    return bool(issues.open_issues(gh, LABEL, MARKER))


def settle(
    gh: GitHub, record: UpstreamRecord, *, declared: Collection[str], run_url: str | None
) -> str:
    """
    Open, renew or close the issue, so that it says what this look found.

    Args:
        gh: The repository; in a dry run nothing is changed.
        record: Of the look.
        declared: Models of params.yaml: of another one nothing is said any more.
        run_url: Of this run, for the reader.

    Returns:
        What was done: `opened 7`, `renewed 7`, `closed`, `none`.

    Raises:
        GitHubError: Issues are turned off, or the token may not write them.
        RetryLaterError: GitHub cannot be asked now.
    """
    there = issues.open_issues(gh, LABEL, MARKER)
    open_: dict[str, Any] | None = there[0] if there else None
    asks = [each for each in record.models if each.state == "asks" and each.model in declared]
    kept = _kept(_named(open_), record, declared)
    if not asks and not kept and not record.alarms:
        if open_ is None:
            return "none"
        reason = f"Nothing of it is left. {_origin(run_url)}".strip()
        issues.close_issue(gh, marker=MARKER, label=LABEL, reason=reason)
        return "closed"
    since = open_.get("created_at") if open_ is not None else None
    number = issues.upsert_issue(
        gh,
        marker=MARKER,
        label=LABEL,
        title=_title([*(each.model for each in asks), *kept], record),
        body=body(
            asks, kept, record, since=since if isinstance(since, str) else None, run_url=run_url
        ),
    )
    return f"{'renewed' if open_ is not None else 'opened'} {number}"


def _named(open_: dict[str, Any] | None) -> list[str]:
    """Return the models that the open issue names; anybody may have edited it."""
    found = _NAMED.search(str(open_["body"])) if open_ is not None else None
    words = found[1].split() if found is not None else []
    return [word for word in words if re.fullmatch(MODEL_KEY, word)]


def _kept(named: list[str], record: UpstreamRecord, declared: Collection[str]) -> list[str]:
    """Return those of them that this look says nothing of."""
    told = {each.model for each in record.models if each.state != "unknown"}
    return sorted({model for model in named if model in declared and model not in told})


def _title(models: list[str], record: UpstreamRecord) -> str:
    """Name the models; only what is silent has no name of its own."""
    if models:
        return f"Upstream asks for a person: {wording.first_few(sorted(models))}"
    return f"Upstream was not seen for long: {wording.counted(len(record.alarms), 'alarm')}"


def body(
    asks: list[ModelUpstream],
    kept: list[str],
    record: UpstreamRecord,
    *,
    since: str | None,
    run_url: str | None,
) -> str:
    """
    Write the issue: a row for each model with its next step, and the alarms.

    Args:
        asks: Models that a person has to look at.
        kept: Models of an earlier look that this one says nothing of.
        record: Of the look.
        since: When the issue was opened, as GitHub writes times; None if it is new.
        run_url: Of this run.
    """
    names = [*(each.model for each in asks), *kept]
    lines = [f"<!-- fleet:asks {' '.join(names)} -->"] if names else []
    if names:
        count = wording.counted(len(names), "model")
        lines += [f"Nothing is proposed for {count} until a person has looked.", "", *_HEAD]
        rows = [
            f"| {each.model} | {_short(each.source)} | {_short(each.reason)} "
            f"| {_short(each.next_step)} |"
            for each in asks
        ]
        rows += [f"| {model} |  | {_STILL} | Wait for the next look. |" for model in kept]
        lines += _fitting(rows)
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
