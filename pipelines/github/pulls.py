"""Pull requests: find one by its branch, open it, renew what we wrote of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from pipelines.github.client import taken
from pipelines.github.errors import GitHubError, MovedError, UnknownOutcomeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.github.client import GitHub

# Of the body of a pull request, an issue or a comment.
BODY_CHARACTERS: Final = 65_536
BEGIN: Final = "<!-- fleet:begin -->"
END: Final = "<!-- fleet:end -->"
_OURS: Final = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_UNPROCESSABLE: Final = 422
# Of what cannot be repeated blindly; each after a look.
_ATTEMPTS: Final = 4


def find_by_head(
    gh: GitHub, branch: str, *, repository: str | None = None, sha: str | None = None
) -> dict[str, Any] | None:
    """
    Return the open pull request from a branch.

    Args:
        gh: The repository that it wants to change.
        branch: Name of its branch.
        repository: OWNER/NAME of the one that the branch is in; ours if absent.
        sha: Commit that its branch has to be at.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    wanted = repository or gh.repository
    for pull in gh.paged("pulls", state="open", head=f"{wanted.partition('/')[0]}:{branch}"):
        head = pull.get("head")
        # An owner may have a fork of ours beside it, with a branch of the same name.
        if not isinstance(head, dict) or head.get("ref") != branch or _repository(head) != wanted:
            continue
        if sha is None or head.get("sha") == sha:
            return pull
    return None


def _repository(head: dict[str, Any]) -> str | None:
    found = head.get("repo")
    return found.get("full_name") if isinstance(found, dict) else None


def upsert_pull(  # noqa: PLR0913 - what a pull request is made of
    gh: GitHub,
    *,
    head: str,
    base: str,
    title: str,
    body: str,
    labels: Sequence[str] = (),
    opens: bool = True,
) -> dict[str, Any]:
    """
    Open a pull request from a branch of ours, or renew the one that is open.

    What people wrote before or after our part of its body stays; so do labels and reviewers that
    they added. A title that somebody changed is changed back: it says what is in it.

    Args:
        gh: The repository.
        head: Branch, without the owner.
        base: Branch to change.
        title: Of it.
        body: Our part, Markdown.
        labels: To be added.
        opens: Whether it may be opened; not if one was open just now, which somebody may close.

    Returns:
        The pull request, as GitHub describes it.

    Raises:
        MovedError: There is none, and it may not be opened.
        GitHubError, RetryLaterError: See `client.GitHub.post`.
    """
    pull = find_by_head(gh, head)
    if pull is None and not opens:
        text = f"the pull request from {head} was closed in this very moment."
        raise MovedError(text, branch=head, found=None)
    if pull is None:
        pull = _opened(gh, head=head, base=base, title=title, body=body)
    wanted = {
        "title": title,
        "body": merged(pull.get("body"), body),
        "base": base,
    }
    base_ref = pull.get("base")
    there = {
        "title": pull.get("title"),
        "body": pull.get("body"),
        "base": base_ref.get("ref") if isinstance(base_ref, dict) else base,
    }
    changes = {key: value for key, value in wanted.items() if value != there[key]}
    number = pull["number"]
    if changes and not (gh.dry_run and not there["title"]):
        pull = gh.patch(f"pulls/{number}", changes)
    has = {each.get("name") for each in pull.get("labels") or () if isinstance(each, dict)}
    missing = [label for label in labels if label not in has]
    if missing:
        gh.post(f"issues/{number}/labels", {"labels": missing}, repeatable=True)
    return pull


def merged(there: str | None, body: str) -> str:
    """Return a body in which our part is `body`, and the rest as people wrote it."""
    # What is left of one within another is one again.
    while BEGIN in body or END in body:
        body = body.replace(BEGIN, "").replace(END, "")
    ours = f"{BEGIN}\n{body}\n{END}"
    there = (there or "").replace("\r\n", "\n")
    if _OURS.search(there):
        return _OURS.sub(lambda _: ours, there, count=1)[:BODY_CHARACTERS]
    return (f"{ours}\n\n{there}" if there.strip() else ours)[:BODY_CHARACTERS]


def ours(body: object) -> str:
    """Return our part of a body; empty if it has none."""
    found = _OURS.search(body.replace("\r\n", "\n")) if isinstance(body, str) else None
    return found[0].removeprefix(BEGIN).removesuffix(END).strip("\n") if found else ""


def _opened(gh: GitHub, *, head: str, base: str, title: str, body: str) -> dict[str, Any]:
    request = {"title": title, "head": head, "base": base, "body": merged(None, body)}
    for attempt in range(_ATTEMPTS):
        try:
            made = gh.post("pulls", request)
        except (GitHubError, UnknownOutcomeError) as error:
            if isinstance(error, GitHubError) and error.status != _UNPROCESSABLE:
                raise
            # Somebody else opened it, or we did and did not hear of it.
            found = find_by_head(gh, head)
            if found is not None:
                return found
            if isinstance(error, GitHubError) or attempt + 1 == _ATTEMPTS:
                raise
        else:
            taken(made, "number", int)
            return made if isinstance(made, dict) else {}
    raise AssertionError  # pragma: no cover - the last attempt returns or raises
