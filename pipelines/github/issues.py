"""One issue for one subject: opened when there is something to say, closed when it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.github import identity
from pipelines.github.client import Unsent, taken
from pipelines.github.errors import UnknownOutcomeError
from pipelines.github.pulls import BODY_CHARACTERS

if TYPE_CHECKING:
    from pipelines.github.client import GitHub


def open_issues(gh: GitHub, label: str, marker: str = "") -> list[dict[str, Any]]:
    """
    Return the open issues of ours with a label, the oldest first.

    Args:
        gh: The repository.
        label: Of theirs.
        marker: That their bodies begin with; any of ours if empty. See `marker_line`.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    login = identity.login(gh)
    start = marker_line(marker) if marker else "<!-- "
    found = [
        each
        for each in gh.paged("issues", state="open", labels=label)
        if "pull_request" not in each
        and isinstance(each.get("body"), str)
        and each["body"].startswith(start)
        and identity.login_of(each) == login
    ]
    return sorted(found, key=lambda each: int(taken(each, "number", int)))


def upsert_issue(gh: GitHub, *, marker: str, label: str, title: str, body: str) -> int:
    """
    Leave exactly one open issue on a subject, with this text.

    Args:
        gh: The repository.
        marker: The subject, e.g. `fleet:runner gpu-1`; no `-->` in it.
        label: By which they are found.
        title: Of it.
        body: Markdown.

    Returns:
        Its number; 0 in a dry run that opens one.

    Raises:
        GitHubError: It is refused, or issues are turned off.
        RetryLaterError: It cannot be done now.
    """
    text = f"{marker_line(marker)}\n{body}"[:BODY_CHARACTERS]
    for _ in range(4):
        there = open_issues(gh, label, marker)
        if there:
            break
        try:
            made = gh.post("issues", {"title": title, "body": text, "labels": [label]})
        except UnknownOutcomeError:
            continue
        if isinstance(made, Unsent):
            return 0
        # Another run may have opened one at the same time.
        mine = int(taken(made, "number", int))
        there = open_issues(gh, label, marker) or [made]
        if mine not in {each["number"] for each in there}:
            there = [made, *there]
            there.sort(key=lambda each: int(each["number"]))
        break
    else:
        raise UnknownOutcomeError(
            f"The issue {title!r} could not be opened: every answer was lost.",
            hint="Run the job again.",
        )
    kept, *others = there
    for each in others:
        gh.patch(f"issues/{each['number']}", {"state": "closed", "state_reason": "not_planned"})
    changes = {"title": title, "body": text}
    changes = {key: value for key, value in changes.items() if value != kept.get(key)}
    if changes:
        gh.patch(f"issues/{kept['number']}", changes)
    return int(kept["number"])


def close_issue(gh: GitHub, *, marker: str, label: str, reason: str) -> int:
    """
    Close what is open on a subject, with a sentence why.

    Returns:
        How many were open.

    Raises:
        GitHubError, RetryLaterError: See `upsert_issue`.
    """
    there = open_issues(gh, label, marker)
    for each in there:
        # State and reason in one request: there is no issue that was closed without a word.
        body = f"{each['body']}\n\n{reason}"
        fields = {"state": "closed", "state_reason": "completed", "body": body[:BODY_CHARACTERS]}
        gh.patch(f"issues/{each['number']}", fields)
    return len(there)


def marker_line(marker: str) -> str:
    """Return the first line of an issue of ours, which GitHub does not show."""
    return f"<!-- {marker} -->"
