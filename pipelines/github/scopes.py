"""
Which permission a request needs: what a refusal of GitHub leaves out.

A token that may not see something is told 404, not 403. Names are those of `permissions:` in a
workflow; `administration` is an App's alone.

Source: docs.github.com, "Permissions required for GitHub Apps".
"""

from __future__ import annotations

import re
from typing import Final

_READ: Final = "read"
_WRITE: Final = "write"
# Below repos/OWNER/NAME; the first that fits.
_SCOPES: Final = (
    (r"issues(/comments/\d+|/\d+/(comments|labels))", "pull-requests (or issues)"),
    (r"issues", "issues"),
    (r"pulls", "pull-requests"),
    (r"check-runs|commits/[^/]+/check-runs", "checks"),
    (r"actions/(runners|permissions)", "administration"),
    (r"vulnerability-alerts|branches/[^/]+/protection", "administration"),
    (r"actions/(organization-)?secrets", "secrets"),
    (r"actions/(organization-)?variables", "variables"),
    (r"environments/[^/]+/secrets", "environments"),
    (r"environments", "actions"),
    (r"actions", "actions"),
    (r"git/|contents/|codeowners|branches|commits|compare|releases", "contents"),
    (r"attestations", "attestations"),
    (r"deployments", "deployments"),
    (r"labels", "issues"),
)
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_UNPROCESSABLE: Final = 422


def scope_of(method: str, path: str) -> str | None:
    """Return the permission that a request needs, `checks: write`; None if it is not known."""
    found = re.match(r"/repos/[^/]+/[^/]+/(.*)", path)
    below = found[1] if found else ""
    for pattern, name in _SCOPES:
        if re.match(pattern, below):
            return f"{name}: {_READ if method == 'GET' else _WRITE}"
    return None


def hint_of(status: int, method: str, path: str) -> str:
    """Return the next step after a refusal."""
    if status == _UNAUTHORIZED:
        return "The token is wrong or has expired (a job's token ends with its job): renew it."
    scope = scope_of(method, path)
    if status in {_FORBIDDEN, _NOT_FOUND} and scope:
        start = "" if status == _FORBIDDEN else "If it is there, the token may not see it: "
        if scope.startswith("administration"):
            return f"{start}only an App's token can have `{scope}`; give it to the App."
        return (
            f"{start}the token needs `{scope}`: under `permissions:` of the job, or, for an App, "
            "in its settings. A pull request from a fork never gets a token that may write."
        )
    if status == _UNPROCESSABLE:
        return "GitHub does not take these values; its words say which."
    return ""
