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

from pipelines.errors import ParamsError
from pipelines.github.client import taken
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from pipelines.github.client import GitHub

# Who writes with the token of a job.
ACTIONS_LOGIN: Final = "github-actions[bot]"
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
