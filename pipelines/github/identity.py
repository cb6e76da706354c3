"""
Under which name we write.

`GET /user` knows people only: the token of a job or of an App is refused there, and nothing else in
REST tells such a token its own name. So it is the name that a job's token has, or the one that the
workflow tells (the `app-slug` that its App token came with); and what GitHub answers to a first
comment is believed over both.

Source: docs.github.com, "GITHUB_TOKEN"; the schema `simple-user` of the OpenAPI description.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

from pipelines import console
from pipelines.errors import ParamsError
from pipelines.github.client import taken
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.github.client import GitHub

# Who writes with the token of a job.
ACTIONS_LOGIN: Final = "github-actions[bot]"
# Commits for bots are made in GitHub's own name.
_GITHUB: Final = "web-flow"
APP_SLUG_VARIABLE: Final = "FLEET_APP_SLUG"
_SLUG: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,98}")


def login(gh: GitHub) -> str:
    """
    Return the login under which a token writes, as far as it can be known before it writes.

    Raises:
        ParamsError: FLEET_APP_SLUG is no name of an App.
        RetryLaterError: GitHub cannot be asked.
    """
    slug = os.environ.get(APP_SLUG_VARIABLE, "")
    if slug:
        if not _SLUG.fullmatch(slug):
            raise ParamsError(
                f"{APP_SLUG_VARIABLE} is {slug[:50]!r}, which is no name of an App.",
                hint="It is the output `app-slug` of actions/create-github-app-token.",
            )
        return f"{slug}[bot]"
    if gh.is_installation:
        return ACTIONS_LOGIN
    try:
        return str(taken(gh.get("/user"), "login", str))
    except GitHubError as error:
        if error.status in {401, 403, 404}:
            return ACTIONS_LOGIN
        raise


def starts_checks(gh: GitHub) -> bool:
    """
    Tell whether GitHub starts workflows for what this token does, as far as a token shows it.

    For a pull request that the token of a job opens or renews it prepares them, and they wait for
    somebody's click; an App's token and a person's start them.

    Source: docs.github.com, "GITHUB_TOKEN", "When GITHUB_TOKEN triggers workflow runs".
    """
    return bool(os.environ.get(APP_SLUG_VARIABLE)) or not gh.is_installation


def login_of(answer: dict[str, Any]) -> str:
    """Return who wrote a comment or an issue; empty if that account is gone."""
    user = answer.get("user")
    name = user.get("login") if isinstance(user, dict) else None
    return name if isinstance(name, str) else ""


def strangers(
    gh: GitHub, listed: list[Any], is_ours: Callable[[str], bool] = lambda _: True
) -> Iterator[str]:
    """
    Yield who committed that is not us, as sentences.

    Args:
        gh: The repository.
        listed: Commits, as a comparison shows them.
        is_ours: Says of a message whether we write such ones.

    Raises:
        GitHubError, RetryLaterError: See `login`.
    """
    ours = {login(gh), ACTIONS_LOGIN}
    for each in listed:
        author, committer = _login_as(each, "author"), _login_as(each, "committer")
        told = taken(taken(each, "commit", dict), "message", str)
        if author not in ours or committer not in {*ours, _GITHUB} or not is_ours(told):
            who = committer if author in ours and committer != _GITHUB else author
            # "Update branch" is one too: what somebody resolved in it looks the same.
            did = "merged into it" if len(each.get("parents") or ()) > 1 else "committed there"
            yield f"{console.clean(who or 'somebody')} {did}."


def _login_as(commit: Any, role: str) -> str:  # noqa: ANN401 - JSON of GitHub's
    found = commit.get(role) if isinstance(commit, dict) else None
    name = found.get("login") if isinstance(found, dict) else None
    return name if isinstance(name, str) else ""
